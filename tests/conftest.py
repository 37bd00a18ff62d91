"""Fixtures for all tests: a small cache, a LeRobot v3 data set that knows its frames, and the other layouts.

`tiny_dataset` is written once a session (about a second): 6 episodes of 32 to 40 frames, 2 cameras, 64 × 64
H.264, several episodes a file, two tasks, episodes 0–3 in `train` and 4–5 in `validation`. A square moves
over a drifting background; a strip of black and white blocks holds (episode, camera, frame), which survives
compression and is read back by the fixture `read_code`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from salt_vla.cache import CacheWriter, Key, Manifest, Record
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.data.segments import Cutting
from salt_vla.data.video_writer import EpisodeVideoFile
from salt_vla.jobs.data_index import index_data


def pytest_configure() -> None:
    """Signals act on this process and its children as in a terminal, also where the tests run under nohup or
    were started with `&`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def of_usual_priority() -> Iterator[None]:
    """SVT-AV1's encoder makes a root's thread a real-time one (SCHED_FIFO, 99), and its children with it:
    whatever they start then starves everything else on the machine."""
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def words_of(process: psutil.Process) -> list[str]:
    """What it was started with; none for one that has died meanwhile, as other tests' children may."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # Of which `ZombieProcess` is one.
        return []


@pytest.fixture(scope="session")
def spawned() -> Callable[[psutil.Process], list[psutil.Process]]:
    """The living processes below one that Python has started for a loader or a decoder."""

    def below(process: psutil.Process) -> list[psutil.Process]:
        children = process.children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(words_of(child))]

    return below


LENGTHS = (34, 40, 32, 37, 33, 36)
FIRST_VALIDATION_EPISODE = 4
CAMERAS = ("observation.images.front", "observation.images.side")
TASKS = ("Push the square to the right.", "Push the square down.")
SIZE, BLOCK, FPS = 64, 8, 30
FEATURES = {
    "observation.state": Feature("float32", (4,), ("x", "y", "z", "frame")),
    "observation.environment_state": Feature("float32", (9,)),
    "action": Feature("float32", (4,), ("delta_x", "delta_y", "episode", "frame")),
}


def _place(episode: int, frames: np.ndarray) -> np.ndarray:
    """(frames, 2): where the square is, in pixels; tasks differ in direction, episodes in start and speed."""
    start = np.array([4 + 3 * episode, 20 + 2 * episode])
    direction = np.eye(2)[episode % len(TASKS)] * (0.5 + 0.1 * episode)
    return start + frames[:, None] * direction


def _film(episode: int, camera: int, length: int) -> np.ndarray:
    """uint8 (frames, 64, 64, 3); the upper 16 rows are 2 × 8 blocks, one bit each."""
    frames = np.arange(length)
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(x / 9 + camera) + np.cos(y / 7 - episode)
    shade = 96 + 40 * np.sin(wave + frames[:, None, None] / 10)
    film = np.stack([shade, 255 - shade, shade / 2 + 60], axis=-1).astype(np.uint8)
    for frame, (left, top) in enumerate(_place(episode, frames).astype(int)):
        film[frame, top : top + 10, left : left + 10] = (220, 40, 40) if camera == 0 else (40, 40, 220)
        code = (episode << 12) | (camera << 8) | frame
        bits = np.array([code >> bit & 1 for bit in range(16)], dtype=np.uint8).reshape(2, 8)
        film[frame, : 2 * BLOCK] = np.kron(bits * 219 + 16, np.ones((BLOCK, BLOCK)))[..., None]
    return film


def _episode(number: int, length: int) -> Episode:
    frames = np.arange(length)
    place = _place(number, frames)
    zeros, which = np.zeros(length), np.full(length, number)
    columns = {
        "observation.state": np.column_stack([place, zeros, frames]),
        "observation.environment_state": np.column_stack([place[:, ::-1], np.tile(which, (7, 1)).T]),
        "action": np.column_stack([np.gradient(place, axis=0), which, frames]),
    }
    films = {key: _film(number, camera, length) for camera, key in enumerate(CAMERAS)}
    return Episode(TASKS[number % len(TASKS)], {k: v.astype(np.float32) for k, v in columns.items()}, films)


def write_tiny_dataset(folder: Path) -> Path:
    layout = DatasetLayout(FPS, FEATURES, CAMERAS, (SIZE, SIZE), robot_type="square")
    with writing_dataset(folder, layout) as writer:
        writer.start_split("train")
        for number, length in enumerate(LENGTHS):
            if number == FIRST_VALIDATION_EPISODE:
                writer.start_split("validation")
            writer.add_episode(_episode(number, length))
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the data set described above; shared by all tests, so nobody may write into it."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_table(tiny_dataset: Path) -> ClipTable:
    """Its 24 clips of 8 frames at stride 2 (15 file frames), one every 16 frames."""
    return index_data(tiny_dataset, Cutting(ViewConfig(frame_stride=2), 8))[0]


@pytest.fixture(scope="session")
def read_code() -> Callable[[np.ndarray], tuple[int, int, int]]:
    """(episode, camera, frame) of a decoded 64 × 64 frame of the data set."""

    def read(image: np.ndarray) -> tuple[int, int, int]:
        blocks = image[: 2 * BLOCK].mean(axis=2).reshape(2, BLOCK, 8, BLOCK).mean(axis=(1, 3))
        code = sum(int(bright) << bit for bit, bright in enumerate((blocks > 128).ravel()))
        return code >> 12, code >> 8 & 15, code & 255

    return read


BuildCache = Callable[..., dict[Key, np.ndarray]]


@pytest.fixture(scope="session")
def build_cache() -> BuildCache:
    """`build_cache(folder, clips=5, views=2, shape=(3, 4), per_shard=4, encoding="float16", bad=())` writes a
    cache of random halves (exact in float16) and returns its arrays by key; `bad` keys are quarantined.
    """

    def build(
        folder: Path,
        clips: int = 5,
        views: int = 2,
        shape: tuple[int, ...] = (3, 4),
        per_shard: int = 4,
        encoding: str = "float16",
        bad: tuple[Key, ...] = (),
    ) -> dict[Key, np.ndarray]:
        manifest = Manifest("latents", encoding, shape, views, per_shard, {"teacher": "t", "clip_table": "c"})
        keys = [(f"clip/{clip}", view) for clip in range(clips) for view in range(views)]
        rng = np.random.default_rng(0)
        arrays = {key: rng.normal(size=shape).astype(np.float16).astype(np.float32) for key in keys}
        with CacheWriter(folder, manifest, list(dict.fromkeys(clip for clip, _ in keys))) as writer:
            for shard in writer.pending():
                records = [
                    Record(k, None, "unreadable") if k in bad else Record(k, arrays[k]) for k in shard.keys
                ]
                writer.write_shard(shard, records)
            writer.finish()
        return {key: array for key, array in arrays.items() if key not in bad}

    return build


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="kill and damage as often as docs/reliability.md")


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`times(quick, long)`: how often to do something: `long` with --torture, which `make torture` gives."""
    is_long = bool(request.config.getoption("--torture"))
    return lambda quick, long: long if is_long else quick


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes, hidden ones too: what "byte-equal" means."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


def write_video_file(path: Path, frames: int = 24, fps: int = 12, seed: int = 0, codec: str = "") -> Path:
    """A film of 48 × 64 pictures, in the codec its ending stands for: webm is VP9, the others H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = codec or ("libvpx-vp9" if path.suffix == ".webm" else "libx264")
    fast = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libsvtav1": {"preset": "12"}}
    y, x = np.mgrid[:48, :64]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=fast.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            shade = 128 + 100 * np.sin((x + 3 * number + 11 * seed) / 9) * np.cos((y - seed) / 7)
            picture = np.repeat(shade.astype(np.uint8)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return write_video_file


SSV2_TEMPLATES = (
    "Putting [something] on [something]",
    "Pushing [something] so that it falls",
    "Moving [part] up",
)
SSV2_LISTS = {"train": range(1, 7), "validation": range(7, 10), "test": range(10, 12)}


def write_ssv2(folder: Path, films: int = 4, lists: dict[str, range] = SSV2_LISTS) -> Path:
    """Something-Something V2 as published: webm files in one folder, lists beside it. `films` different ones,
    copied."""
    made = [
        write_video_file(folder.parent / f"films-{folder.name}" / f"{n}.webm", seed=n) for n in range(films)
    ]
    videos = folder / "20bn-something-something-v2"
    videos.mkdir(parents=True)
    for split, ids in lists.items():
        rows = []
        for number in ids:
            shutil.copy(made[number % films], videos / f"{number}.webm")
            template = SSV2_TEMPLATES[number % len(SSV2_TEMPLATES)]
            row = {
                "id": str(number),
                "label": template.lower(),
                "template": template,
                "placeholders": ["a cup"],
            }
            rows.append(row if split != "test" else {"id": str(number)})
        (folder / f"something-something-v2-{split}.json").write_text(json.dumps(rows))
    names = {name.replace("[", "").replace("]", ""): str(n) for n, name in enumerate(SSV2_TEMPLATES)}
    (folder / "something-something-v2-labels.json").write_text(json.dumps(names))
    return folder


def write_folder(folder: Path) -> Path:
    """Splits, classes, containers."""
    places = ("train/push/a.mp4", "train/push/a.webm", "train/pull/b.mkv", "train/c.avi", "val/push/d.mp4")
    for number, place in enumerate(places):
        codec = "mpeg4" if place.endswith("avi") else ""
        write_video_file(folder / place, frames=20 + 2 * number, seed=number, codec=codec)
    (folder / "train" / "notes.txt").write_text("no video")
    return folder


UCF101_CLASSES = ("ApplyEyeMakeup", "Archery")


def write_ucf101(folder: Path, groups: int = 4, films: int = 2) -> Path:
    """UCF101 as published: AVI films in class folders, lists beside them. Even groups are tested on."""
    lines: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    for number, name in enumerate(UCF101_CLASSES, 1):
        for group, clip in product(range(1, groups + 1), range(1, films + 1)):
            film = f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
            write_video_file(folder / "UCF-101" / film, seed=10 * number + group, codec="mpeg4")
            lines["trainlist01.txt" if group % 2 else "testlist01.txt"].append(
                f"{film} {number}" if group % 2 else film
            )
    (folder / "ucfTrainTestlist").mkdir()
    for name, said in lines.items():
        (folder / "ucfTrainTestlist" / name).write_text("\n".join(said) + "\n")
    return folder


def write_kinetics(folder: Path, classes: int = 2, films: int = 2) -> Path:
    """Kinetics as published: a list a split, stretches of 10 s under the names of their films. `films` of a
    class are trained on, half as many tested."""
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for split, kind in product(lists, range(classes)):
        for film in range(films if split == "train" else max(films // 2, 1)):
            name, start = f"{split}-{kind}_{film}", 7 * film
            path = folder / split / f"{name}_{start:06d}_{start + 10:06d}.mp4"
            write_video_file(path, frames=20 + film, seed=40 * kind + 2 * film + (split == "val"))
            lists[split].append(f'"class {kind}",{name},{start},{start + 10},{split}')
    (folder / "annotations").mkdir()
    for split, rows in lists.items():
        text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
        (folder / "annotations" / f"{split}.csv").write_text(text + "\n")
    return folder


def write_list(folder: Path) -> Path:
    """A CSV of three films, one in two stretches."""
    for name in ("a", "b", "c"):
        write_video_file(folder / "films" / f"{name}.mp4", frames=30, seed=ord(name))
    rows = (
        ("films/a.mp4", "0", "1.0", "lift", "train", "kitchen"),
        ("films/a.mp4", "1.0", "2.5", "drop", "train", "kitchen"),
        ("films/b.mp4", "", "", "lift", "validation", ""),
        ("films/c.mp4", "0.5", "", "drop", "train", ""),
    )
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "start", "end", "label", "split", "group"), *rows])
    return folder / "list.csv"


INTPHYS2_HEADER = "SceneIndex,name,file_name,game_name,condition,env,type,occluder,Difficulty,Camera"
INTPHYS2_TYPES = ("1_Possible", "1_Impossible", "2_Possible", "2_Impossible")


def write_intphys2(folder: Path, scenes: int = 3, films: int = 4) -> Path:
    """IntPhys 2 as published: four films a scene in Main, and a HeldOut split without types. `films`
    different ones, copied."""
    made = [
        write_video_file(folder.parent / f"films-{folder.name}" / f"{n}.mp4", seed=n) for n in range(films)
    ]
    for split, types in (("Main", INTPHYS2_TYPES), ("HeldOut", ("", ""))):
        (folder / split / "Videos").mkdir(parents=True)
        rows = []
        for scene in range(scenes if split == "Main" else 1):
            for number, kind in enumerate(types):
                name = f"{split.lower()}-{scene}-{number}"
                shutil.copy(made[(scene + number) % films], folder / split / "Videos" / f"{name}.mp4")
                rest = ("Game", "permanence", "Env_0", kind, "None", "Easy", "Fixed")
                rows.append((str(scene), name, f"Videos/{name}.mp4", *rest))
        with (folder / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([INTPHYS2_HEADER.split(","), *rows])
    return folder


# Scenes, of four films each, in a split of IntPhys 2; a HeldOut split lists its films without types.
INTPHYS2_CONDITIONS = ("permanence", "immutability", "continuity", "solidity")
INTPHYS2_LEVELS = (("Easy", "Fixed"), ("Medium", "Fixed"), ("Hard", "Moving"))


def moving_square(scene: int, run: int, jumps: bool, frames: int, size: int) -> np.ndarray:
    """A bright square that moves evenly over a plain ground of the scene's own; in the middle of the film it
    `jumps` half the picture. (frames, size, size, 3)"""
    rng = np.random.default_rng([scene, run])
    side = size // 4
    ground, colour = rng.integers(20, 90, 3), rng.integers(150, 255, 3)
    row, start = int(rng.integers(0, size - side)), int(rng.integers(0, size))
    speed = (1, -1)[run % 2]
    film = np.broadcast_to(ground.astype(np.uint8), (frames, size, size, 3)).copy()
    for number, image in enumerate(film):
        leap = size // 2 if jumps and number >= frames // 2 else 0
        columns = (start + speed * number + leap + np.arange(side)) % size
        image[row : row + side, columns] = colour
    return film


def write_squares(folder: Path, splits: dict[str, int], frames: int = 20, size: int = 32) -> Path:
    """IntPhys 2's layout, `splits` saying how many scenes each has: the impossible film of a pair is its
    possible one with a jump."""
    for split, scenes in splits.items():
        (folder / split / "Videos").mkdir(parents=True)
        rows = []
        for scene, kind in product(range(scenes), INTPHYS2_TYPES):
            run, _, label = kind.partition("_")
            name = f"{split.lower()}-{scene:03d}-{kind}"
            film = EpisodeVideoFile(folder / split / "Videos" / f"{name}.mp4", FPS, (size, size), 18)
            film.append(moving_square(scene, int(run), label == "Impossible", frames, size))
            film.close()
            condition, levels = INTPHYS2_CONDITIONS[scene % 4], INTPHYS2_LEVELS[scene % 3]
            said = "" if split == "HeldOut" else kind
            rows.append(
                (str(scene), name, f"Videos/{name}.mp4", "Game", condition, "Env", said, "None", *levels)
            )
        with (folder / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([INTPHYS2_HEADER.split(","), *rows])
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`squares(splits, frames=20, size=32)`: a new folder of films in pairs, as `write_squares` says."""
    return lambda splits, **options: write_squares(tmp_path_factory.mktemp("squares"), splits, **options)


def write_lerobot_v21(folder: Path, v3: Path) -> Path:
    """The data set `tiny_dataset` as version 2.1 lays it out: a table and a film for each episode."""
    info = json.loads((v3 / "meta" / "info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "chunks_size": 4,
        "total_chunks": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    rows = pq.read_table(v3 / "data/chunk-000/file-000.parquet", partitioning=None)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    lines = []
    for number, length in enumerate(LENGTHS):
        places = {"episode_chunk": number // 4, "episode_index": number}
        lines.append({"episode_index": number, "tasks": [TASKS[number % len(TASKS)]], "length": length})
        table = folder / info["data_path"].format(**places)
        table.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.filter(pc.equal(rows["episode_index"], number)), table)
        for camera, key in enumerate(CAMERAS):
            path = folder / info["video_path"].format(**places, video_key=key)
            path.parent.mkdir(parents=True, exist_ok=True)
            film = EpisodeVideoFile(path, FPS, (SIZE, SIZE), 26)
            film.append(_film(number, camera, length))
            film.close()
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = ({"task_index": number, "task": task} for number, task in enumerate(TASKS))
    (folder / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    return folder


@pytest.fixture(scope="session")
def write_layout(tiny_dataset: Path) -> Callable[..., Path]:
    """`write_layout(source, folder)` writes a small data set of that source's layout into a new folder, and
    returns what is to be indexed; those of film data sets take their size."""
    writers: dict[str, Callable[..., Path]] = {
        "folder": write_folder,
        "intphys2": write_intphys2,
        "kinetics": write_kinetics,
        "lerobot": lambda folder: Path(shutil.copytree(tiny_dataset, folder)),
        "lerobot-v2.1": lambda folder: write_lerobot_v21(folder, tiny_dataset),
        "sim": lambda folder: Path(shutil.copytree(tiny_dataset, folder)),  # as it is after rendering
        "ssv2": write_ssv2,
        "table": write_list,
        "ucf101": write_ucf101,
    }

    def write(source: str, folder: Path, **sizes: object) -> Path:
        return writers[source](folder, **sizes)

    return write
