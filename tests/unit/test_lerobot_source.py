"""A LeRobot v3 data set as clips and signals: stable ids, its own templates, sentences for the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.decode import read_frames
from salt_vla.data.segments import Cutting, SourceOptions
from salt_vla.data.sources.lerobot_meta import read_meta
from salt_vla.data.sources.lerobot_signals import read_signals
from salt_vla.errors import ConfigError, DataError
from salt_vla.jobs.data_index import index_data

FRONT, SIDE = "observation.images.front", "observation.images.side"
LENGTHS = (34, 40, 32, 37, 33, 36)
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIEW = ViewConfig(frame_stride=2)


def index(
    root: Path, num_frames: int, frame_stride: int, hop: int = 16, cameras: tuple[str, ...] = ()
) -> ClipTable:
    cutting = Cutting(ViewConfig(frame_stride=frame_stride), num_frames, hop)
    return index_data(root, cutting, "lerobot", SourceOptions(cameras=cameras))[0]


@pytest.fixture
def dataset(tiny_dataset, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "tiny"))


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in info.items() if value != "GONE"}))


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def test_clips_are_named_after_data_set_episode_camera_and_start(tiny_table):
    expected = [
        f"tiny/{episode:06d}/{camera}/{start:06d}"
        for episode, length in enumerate(LENGTHS)
        for camera in (FRONT, SIDE)
        for start in range(0, length - 14, 16)
    ]
    assert tiny_table.clip_ids == expected and len(expected) == 24


def test_a_clip_knows_its_episode_file_task_and_split(tiny_table, tiny_dataset):
    clip = tiny_table.clip(f"tiny/000004/{SIDE}/000016")
    first = sum(LENGTHS[:4])
    assert (clip.file, clip.source) == (f"videos/{SIDE}/chunk-000/file-000.mp4", "lerobot")
    assert (clip.episode, clip.episode_first_frame, clip.episode_frames) == (4, first, 33)
    assert (clip.first_frame, clip.start_in_episode) == (first + 16, 16)
    assert (clip.camera, clip.fps) == (SIDE, 30.0)
    assert (clip.label, clip.split) == ("Push the square to the right.", "validation")
    assert tiny_table.root == tiny_dataset.resolve()


def test_splits_and_tasks_come_from_the_data_set(tiny_table):
    for clip in tiny_table.clips():
        assert clip.split == ("train" if clip.episode < 4 else "validation")
        assert ("down" in clip.label) == (clip.episode % 2 == 1)


def test_first_frames_are_the_ones_in_the_file(tiny_table, read_code):
    for clip in tiny_table.clips():
        (image,) = read_frames(tiny_table.video(clip), [clip.first_frame], clip.fps)
        assert read_code(image) == (clip.episode, int(clip.camera == SIDE), clip.start_in_episode)


def test_ids_do_not_depend_on_which_cameras_or_how_many_clips_are_taken(tiny_dataset, tiny_table):
    one_camera = index(tiny_dataset, 8, 2, cameras=(SIDE,))
    assert set(one_camera.clip_ids) == {clip for clip in tiny_table.clip_ids if SIDE in clip}
    dense = index(tiny_dataset, 8, 2, hop=4)
    assert set(tiny_table.clip_ids) <= set(dense.clip_ids)
    for clip_id in tiny_table.clip_ids:
        assert dense.clip(clip_id) == tiny_table.clip(clip_id)
    assert index(tiny_dataset, 8, 2).hash == tiny_table.hash


def test_ids_and_hash_do_not_depend_on_where_the_data_set_lies(dataset, tiny_table):
    assert index(dataset, 8, 2).hash == tiny_table.hash


def test_episodes_that_are_too_short_give_no_clip_and_no_other_id_moves(tiny_dataset):
    table = index(tiny_dataset, num_frames=18, frame_stride=2, hop=16)
    assert {clip.episode for clip in table.clips()} == {1, 3, 5}
    assert table.clip_ids[0] == f"tiny/000001/{FRONT}/000000"
    with pytest.raises(DataError, match=r"gives no clip; .* too short: 34 frames, a clip needs 41"):
        index(tiny_dataset, num_frames=21, frame_stride=2)


def test_the_last_frame_of_an_episode_can_be_a_clips_last(tiny_dataset):
    table = index(tiny_dataset, num_frames=40, frame_stride=1, hop=1)
    assert [(clip.episode, clip.first_frame) for clip in table.clips()] == [(1, 34), (1, 34)]


def test_signals_are_those_of_the_clips_frames(tiny_table):
    signals = read_signals(tiny_table, num_frames=8, view=VIEW)
    assert signals.clip_ids == tuple(tiny_table.clip_ids) and signals.fps == 30
    assert set(signals.signals) == {"observation.state", "observation.environment_state", "action"}
    for row, clip in enumerate(tiny_table.clips()):
        frames = clip.start_in_episode + np.arange(15)
        for name in ("observation.state", "action"):
            assert signals.signals[name].dtype == np.float32
            assert np.array_equal(signals.signals[name][row, :, 3], frames)
        assert (signals.signals["action"][row, :, 2] == clip.episode).all()
        assert signals.episodes[row] == clip.episode and signals.tasks[row] == clip.label


def test_pixels_and_signals_tell_of_the_same_moment(tiny_table, read_code):
    signals = read_signals(tiny_table, 8, VIEW, names=("action",))
    assert set(signals.signals) == {"action"}
    for row, clip in enumerate(tiny_table.clips()):
        frames = [clip.first_frame + step for step in range(15)]
        images = read_frames(tiny_table.video(clip), frames, clip.fps)
        seen = [(episode, frame) for episode, _, frame in map(read_code, images)]
        assert seen == [tuple(pair) for pair in signals.signals["action"][row, :, 2:].astype(int)]


def test_signals_follow_a_selection_and_rows_in_any_order(dataset, tiny_table):
    whole = read_signals(tiny_table, 8, VIEW)
    order = np.random.default_rng(0).permutation(sum(LENGTHS))
    edit_table(dataset / DATA, lambda rows: rows.take(order))
    table = index(dataset, 8, 2).select(split="validation", camera=SIDE)
    part = read_signals(table, 8, VIEW)
    rows = [whole.clip_ids.index(clip_id) for clip_id in part.clip_ids]
    for name, values in part.signals.items():
        assert np.array_equal(values, whole.signals[name][rows])


def move_to_own_layout(root: Path) -> None:
    """As another tool might lay it out: other templates, a data file an episode, another video chunk."""
    rows = pq.read_table(root / DATA, partitioning=None)
    for episode in range(len(LENGTHS)):
        path = root / "tables" / f"e{episode}" / "000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(rows.filter(pa.compute.equal(rows["episode_index"], episode)), path)
    (root / DATA).write_bytes(b"not this one")
    for camera in (FRONT, SIDE):
        (root / "films" / "7").mkdir(parents=True, exist_ok=True)
        (root / f"videos/{camera}/chunk-000/file-000.mp4").rename(root / "films" / "7" / f"{camera}_02.mp4")

    def move(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for row in rows:
            row |= {"data/chunk_index": 0, "data/file_index": row["episode_index"]}
            for camera in (FRONT, SIDE):
                row |= {f"videos/{camera}/chunk_index": 7, f"videos/{camera}/file_index": 2}
        return pa.Table.from_pylist(rows)

    edit_table(root / EPISODES, move)
    edit_info(
        root,
        data_path="tables/e{file_index}/{chunk_index:03d}.parquet",
        video_path="films/{chunk_index}/{video_key}_{file_index:02d}.mp4",
    )


def test_the_templates_in_info_json_are_used(dataset, tiny_table, read_code):
    move_to_own_layout(dataset)
    table = index(dataset, 8, 2)
    clip = table.clip(f"tiny/000003/{FRONT}/000016")
    assert clip.file == f"films/7/{FRONT}_02.mp4"
    (image,) = read_frames(table.video(clip), [clip.first_frame], clip.fps)
    assert read_code(image) == (3, 0, 16)
    ours, before = read_signals(table, 8, VIEW), read_signals(tiny_table, 8, VIEW)
    for name in before.signals:
        assert np.array_equal(ours.signals[name], before.signals[name])


def test_scalars_and_wider_floats_are_signals_but_images_and_matrices_are_not(dataset):
    def widen(rows: pa.Table) -> pa.Table:
        height = pa.array(np.arange(len(rows), dtype=np.float64))
        matrix = pa.array([[[1.0, 2.0]]] * len(rows))
        return rows.append_column("height", height).append_column("matrix", matrix)

    edit_table(dataset / DATA, widen)
    features = read_meta(dataset).info["features"]
    features |= {
        "height": {"dtype": "float64", "shape": [1]},
        "matrix": {"dtype": "float64", "shape": [1, 2]},
    }
    edit_info(dataset, features=features)
    signals = read_signals(index(dataset, 8, 2), 8, VIEW).signals
    assert signals["height"].shape == (24, 15, 1) and signals["height"].dtype == np.float32
    assert "matrix" not in signals and "timestamp" not in signals


def sentence(action: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codebase_version": "v1.6"},
            "version 'v1.6' is not v2.0 or v2.1 or v3.0; convert it with lerobot's",
        ),
        *(
            ({name: "GONE"}, f"lacks the field {name!r}")
            for name in ("codebase_version", "fps", "features", "splits", "data_path", "video_path")
        ),
        ({"fps": 0}, "fps is 0, not a positive number"),
        (
            {"fps": 10**400},
            "fps is 1000000000000000000000000000000000000000, not a positive number up to 10000",
        ),
        ({"splits": {"train": "0:" + "9" * 5000}}, "split 'train' is '0:999"),
        ({"fps": "thirty"}, "fps is 'thirty', not a positive number"),
        ({"features": []}, "features must be an object of objects"),
        (
            {"features": {"action": {"shape": [4]}}},
            "features must be an object of objects, each with a dtype",
        ),
        ({"features": {"action": {"dtype": "float32"}}}, "no feature has dtype 'video'"),
        ({"splits": ["train"]}, "splits is ['train'], not an object of name: range"),
        ({"splits": {"train": "first ten"}}, "split 'train' is 'first ten', not episodes as in '0:10'"),
        ({"splits": {"train": "0:5"}}, "no split holds episode 5; `splits` must cover all"),
        ({"splits": {}}, "no split holds episode 0"),
        (
            {"video_path": None},
            "video_path is None; it must be a template of chunk_index, file_index, video_key",
        ),
        (
            {"video_path": "{episode_chunk}.mp4"},
            "video_path is '{episode_chunk}.mp4'; it must be a template of",
        ),
        ({"video_path": "{video_key.secret}"}, "it must be a template of"),
        ({"video_path": "{0}.mp4"}, "it must be a template of"),
    ],
)
def test_info_json_that_does_not_fit_is_a_sentence_naming_file_and_field(dataset, changes, message):
    edit_info(dataset, **changes)
    said = sentence(lambda: index(dataset, 8, 2))
    assert message in said and f"{dataset}/meta/info.json" in said


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_info_json_that_is_no_object_is_a_sentence(dataset, content):
    (dataset / "meta" / "info.json").write_bytes(content)
    assert f"{dataset}/meta/info.json" in sentence(lambda: index(dataset, 8, 2))


def test_missing_meta_files_are_sentences(dataset, tmp_path):
    assert "is not a LeRobot data set" in sentence(lambda: index(tmp_path / "nowhere", 8, 2))
    (dataset / EPISODES).write_bytes(b"PAR1 cut off")
    assert f"{dataset / EPISODES} is not a Parquet file, or a damaged" in sentence(lambda: read_meta(dataset))
    (dataset / EPISODES).unlink()
    assert sentence(lambda: read_meta(dataset)) == f"{dataset}/meta/episodes holds no Parquet file"
    (dataset / "meta" / "info.json").unlink()
    assert f"{dataset / 'meta' / 'info.json'} is missing" in sentence(lambda: index(dataset, 8, 2))


@pytest.mark.parametrize(
    "name",
    ["episode_index", "length", "tasks", *(f"videos/{SIDE}/{n}" for n in ("file_index", "from_timestamp"))],
)
def test_a_column_missing_from_the_episodes_is_named(dataset, name):
    edit_table(dataset / EPISODES, lambda rows: rows.drop_columns([name]))
    said = sentence(lambda: index(dataset, 8, 2))
    assert f"{dataset}/meta/episodes" in said and repr(name) in said


def test_a_stretch_of_film_that_is_too_short_for_its_episode_is_a_problem(dataset):
    """Its last frames would be the next episode's."""

    def shorten(rows: pa.Table) -> pa.Table:
        ends = rows[f"videos/{SIDE}/to_timestamp"].to_pylist()
        ends[2] -= 5 / 30
        ends[3] -= 1 / 30  # A frame is a matter of rounding.
        return rows.set_column(
            rows.column_names.index(f"videos/{SIDE}/to_timestamp"),
            f"videos/{SIDE}/to_timestamp",
            pa.array(ends),
        )

    whole = index(dataset, 8, 2)
    edit_table(dataset / EPISODES, shorten)
    table, problems = index_data(
        dataset, Cutting(VIEW, 8), "lerobot", SourceOptions("tiny"), max_bad_share=0.1
    )
    assert table.clip_ids == [clip for clip in whole.clip_ids if not clip.startswith(f"tiny/000002/{SIDE}")]
    (problem,) = problems
    assert problem.key == f"tiny/000002/{SIDE}"
    assert problem.reason == "film too short: it lacks 5 of the 32 frames of the episode"


def test_an_unknown_camera_is_answered_with_the_known_ones(tiny_dataset):
    said = sentence(lambda: index(tiny_dataset, 8, 2, cameras=("wrist",)))
    assert said == f"{tiny_dataset} has no camera 'wrist'; it has: {FRONT}, {SIDE}"
    with pytest.raises(ConfigError, match="hop is 0"):
        index(tiny_dataset, 8, 2, hop=0)


def test_an_unknown_signal_is_answered_with_the_known_ones(tiny_table):
    said = sentence(lambda: read_signals(tiny_table, 8, VIEW, names=("torque",)))
    assert "has no vector of floats 'torque'; it has: observation.state," in said


def test_data_tables_that_do_not_fit_the_clips_are_sentences(dataset):
    """Fewer rows than frames would otherwise shift every later signal against its pixels."""
    table = index(dataset, 8, 2)
    whole = pq.read_table(dataset / DATA, partitioning=None)
    edit_table(dataset / DATA, lambda rows: pa.concat_tables([rows.slice(0, 20), rows.slice(21)]))
    said = sentence(lambda: read_signals(table, 8, VIEW))
    assert f"the data tables lack frame 20 of episode 0, which clip 'tiny/000000/{FRONT}/000016'" in said
    pq.write_table(whole.slice(0, 190), dataset / DATA)
    assert "lack frame 14 of episode 5" in sentence(lambda: read_signals(table, 8, VIEW))
    pq.write_table(whole.slice(0, 0), dataset / DATA)
    assert "hold no rows" in sentence(lambda: read_signals(table, 8, VIEW))
    pq.write_table(whole.drop_columns(["action"]), dataset / DATA)
    assert "lack the column(s) action" in sentence(lambda: read_signals(table, 8, VIEW, names=("action",)))
    (dataset / DATA).write_bytes(b"PAR1")
    assert "cannot be read: " in sentence(lambda: read_signals(table, 8, VIEW))
    (dataset / DATA).unlink()
    assert "cannot be read: " in sentence(lambda: read_signals(table, 8, VIEW))


def test_episodes_may_be_spread_over_several_files_in_any_order(dataset, tiny_table):
    rows = pq.read_table(dataset / EPISODES, partitioning=None)
    pq.write_table(rows.slice(3), dataset / EPISODES)
    pq.write_table(rows.slice(0, 3), dataset / "meta/episodes/chunk-000/file-001.parquet")
    assert index(dataset, 8, 2).hash == tiny_table.hash


def test_a_table_of_clips_read_from_disk_has_signals_too(tiny_table, tmp_path):
    tiny_table.write(tmp_path / "clips.parquet")
    again = read_signals(ClipTable.read(tmp_path / "clips.parquet"), 8, VIEW)
    assert np.array_equal(again.signals["action"], read_signals(tiny_table, 8, VIEW).signals["action"])
