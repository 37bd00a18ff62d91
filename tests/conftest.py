"""Fixtures for all tests: a small cache, and a small LeRobot v3 data set that knows its own frames.

`tiny_dataset` is written once a session (about a second): 6 episodes of 32 to 40 frames, 2 cameras, 64 × 64
H.264, several episodes a file, two tasks, episodes 0–3 in `train` and 4–5 in `validation`. A square moves
over a drifting background; a strip of black and white blocks holds (episode, camera, frame), which survives
compression and is read back by the fixture `read_code`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Manifest
from salt_vla.cache.writer import Key, Record
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.data.segments import Cutting
from salt_vla.jobs.data_index import index_data

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
        with CacheWriter(folder, manifest, keys) as writer:
            for shard in writer.missing_shards():
                records = [
                    Record(k, None, "unreadable") if k in bad else Record(k, arrays[k]) for k in shard.keys
                ]
                writer.write_shard(shard, records)
            writer.finish()
        return {key: array for key, array in arrays.items() if key not in bad}

    return build


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes, hidden ones too: what "byte-equal" means."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read
