"""LeRobot's version 2.1, a file for each episode, reads as version 3 does; and what both versions refuse."""

from __future__ import annotations

import json
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
from salt_vla.data.sources.lerobot_signals import read_signals
from salt_vla.errors import DataError
from salt_vla.jobs.data_index import index_data

FRONT, SIDE = "observation.images.front", "observation.images.side"
VIEW = ViewConfig(frame_stride=2)
DATA = {"lerobot": "data/chunk-000/file-000.parquet", "lerobot-v2.1": "data/chunk-000/episode_000003.parquet"}


def index(root: Path, view: ViewConfig = VIEW, num_frames: int = 8, **options: Any) -> ClipTable:
    cutting = Cutting(view, num_frames)
    return index_data(root, cutting, "lerobot", SourceOptions(dataset="tiny", **options))[0]


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_rows(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def replaced(rows: pa.Table, name: str, values: object) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, values)


@pytest.fixture
def v21(write_layout: Callable[..., Path], tmp_path: Path) -> Path:
    return write_layout("lerobot-v2.1", tmp_path / "tiny")


@pytest.fixture(params=["lerobot", "lerobot-v2.1"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dataset(version: str, write_layout: Callable[..., Path], tmp_path: Path) -> Path:
    return write_layout(version, tmp_path / "data")


def sentence(action: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_both_versions_give_the_same_clips_from_other_files(v21: Path, tiny_table: ClipTable) -> None:
    table = index(v21)
    assert table.clip_ids == tiny_table.clip_ids
    for ours, theirs in zip(table.clips(), tiny_table.clips(), strict=True):
        assert (ours.label, ours.split, ours.episode, ours.camera) == (
            (theirs.label, theirs.split, theirs.episode, theirs.camera)
        )
        assert ours.start_in_episode == theirs.start_in_episode
        assert ours.episode_first_frame == 0 and ours.episode_frames == theirs.episode_frames
    clip = table.clip(f"tiny/000005/{SIDE}/000000")
    assert clip.file == f"videos/chunk-001/{SIDE}/episode_000005.mp4"  # chunks_size is 4.


def test_each_film_is_the_episodes_own(v21: Path, read_code: Any) -> None:
    table = index(v21)
    for clip in table.clips():
        (image,) = read_frames(table.video(clip), [clip.first_frame], clip.fps)
        assert read_code(image) == (clip.episode, int(clip.camera == SIDE), clip.start_in_episode)


def test_both_versions_give_the_same_signals(v21: Path, tiny_table: ClipTable) -> None:
    ours, theirs = read_signals(index(v21), 8, VIEW), read_signals(tiny_table, 8, VIEW)
    assert set(ours.signals) == set(theirs.signals)
    for name, values in theirs.signals.items():
        assert np.array_equal(ours.signals[name], values)


def test_a_part_of_the_episodes_needs_their_files_alone(v21: Path) -> None:
    table = index(v21)
    (v21 / "data/chunk-001/episode_000004.parquet").unlink()
    (v21 / "data/chunk-000/episode_000000.parquet").write_bytes(b"damaged")
    episode = table.filtered(table.rows.filter(pa.array([clip.episode == 2 for clip in table.clips()])))
    assert (read_signals(episode, 8, VIEW).episodes == 2).all()
    assert "cannot be read" in sentence(lambda: read_signals(table, 8, VIEW))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "episodes.jsonl is missing"),
        ("{", "episodes.jsonl, line 1, is not valid JSON"),
        ('{"length": 3}', "episodes.jsonl, line 1, lacks the field 'episode_index'"),
        ('{"episode_index": "0"}', "'0' is no episode's number"),
        ('{"episode_index": 0, "length": 3}', "episode 0 lacks the field 'tasks'"),
        ('{"episode_index": 0, "tasks": ["x"], "length": "long"}', "length is 'long', not a number"),
        ('{"episode_index": 0, "tasks": ["x"], "length": NaN}', "length is nan, not a number"),
        ('{"episode_index": 0, "tasks": ["x"], "length": -3}', "length is -3, not a number"),
        ('{"episode_index": 0, "tasks": ["x"], "length": 1e300}', "length is 1e+300, not a number"),
        (f'{{"episode_index": {10**30}}}', f"{10**30} is no episode's number"),
        ('{"episode_index": true}', "True is no episode's number"),
    ],
)
def test_episodes_that_cannot_be_read_are_sentences(v21: Path, content: str | None, said: str) -> None:
    path = v21 / "meta" / "episodes.jsonl"
    path.unlink() if content is None else path.write_text(content)
    assert said in sentence(lambda: index(v21))


@pytest.mark.parametrize("size", [0, None, "big", -1])
def test_a_chunks_size_that_is_none_is_a_sentence(v21: Path, size: object) -> None:
    edit_info(v21, chunks_size=size)
    assert f"chunks_size is {size!r}, not a positive number" in sentence(lambda: index(v21))


@pytest.mark.parametrize("fps", [float("inf"), float("nan"), 0, -30, "30", True, None])
def test_a_rate_that_is_none_is_a_sentence(dataset: Path, fps: object) -> None:
    edit_info(dataset, fps=fps)
    assert "not a positive number" in sentence(lambda: index(dataset))


def test_overlapping_splits_are_a_sentence(dataset: Path) -> None:
    edit_info(dataset, splits={"train": "0:4", "validation": "3:6"})
    said = sentence(lambda: index(dataset))
    assert "episode 3 is in the splits train and validation; `splits` must not overlap" in said


@pytest.mark.parametrize(
    "width", ["{video_key:>99999999999}", "{video_key!r}", "{episode_index:1000000000d}"]
)
def test_a_template_cannot_fill_the_memory_or_call_anything(dataset: Path, width: str) -> None:
    edit_info(dataset, video_path=f"videos/{width}.mp4")
    assert "it must be a template of" in sentence(lambda: index(dataset))


def test_a_camera_whose_name_leaves_the_folder_gives_no_clip(v21: Path) -> None:
    info = json.loads((v21 / "meta" / "info.json").read_text())
    features = info["features"] | {"../../../../etc": info["features"][FRONT]}
    edit_info(v21, features=features)
    table, problems = index_data(v21, Cutting(VIEW, 8), "lerobot", max_bad_share=1)
    assert {clip.camera for clip in table.clips()} == {FRONT, SIDE}
    assert {problem.reason for problem in problems} == {"leaves the data set's folder"} and len(problems) == 6


def test_cameras_of_single_images_are_a_sentence(dataset: Path) -> None:
    info = json.loads((dataset / "meta" / "info.json").read_text())
    images = {**info["features"][SIDE], "dtype": "image"}
    edit_info(dataset, features=info["features"] | {SIDE: images})
    assert {clip.camera for clip in index(dataset).clips()} == {FRONT}
    said = sentence(lambda: index(dataset, cameras=(SIDE,)))
    assert f"{SIDE} are kept as single images, which are not read here; convert them to video" in said
    edit_info(dataset, features=info["features"] | {SIDE: images, FRONT: images})
    assert "no feature has dtype 'video'; " in sentence(lambda: index(dataset))


def test_rows_that_drift_from_their_frames_name_the_episode(dataset: Path, version: str) -> None:
    """A recorder that runs 1 % slow: half a second in, actions would belong to other pictures."""

    def slow(rows: pa.Table) -> pa.Table:
        late = rows["timestamp"].to_numpy() * np.where(rows["episode_index"].to_numpy() == 3, 1.01, 1)
        return replaced(rows, "timestamp", pa.array(late.astype(np.float32)))

    table = index(dataset)
    edit_rows(dataset / DATA[version], slow)
    said = sentence(lambda: read_signals(table, 8, VIEW))
    assert "episode 3 drifts: its frame 36 is filmed at 1.2000 s, but its row was taken at 1.2120 s" in said
    others = table.filtered(table.rows.filter(pa.array([clip.episode != 3 for clip in table.clips()])))
    assert 3 not in read_signals(others, 8, VIEW).episodes


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("timestamp", float("nan"), "episode 3 drifts"),
        ("timestamp", None, "column timestamp has empty cells"),
        ("timestamp", "noon", "cannot be read"),
        ("action", None, "column action has empty cells"),
        ("action", [1.0, 2.0, 3.0], "action is ragged: its rows have 3 or 4 numbers, or empty ones"),
        ("action", [1.0, 2.0, 3.0, None], "action is ragged: its rows have 4 numbers, or empty ones"),
    ],
)
def test_cells_that_cannot_be_read_are_sentences(v21: Path, name: str, value: object, said: str) -> None:
    def damage(rows: pa.Table) -> pa.Table:
        cells = rows[name].to_pylist()
        cells = [value, *map(str, cells[1:])] if isinstance(value, str) else [value, *cells[1:]]
        return replaced(rows, name, pa.array(cells))

    table = index(v21)
    edit_rows(v21 / DATA["lerobot-v2.1"], damage)
    episode = table.filtered(table.rows.filter(pa.array([clip.episode == 3 for clip in table.clips()])))
    assert said in sentence(lambda: read_signals(episode, 8, VIEW))


def test_signals_of_a_held_frame_are_those_of_the_last(v21: Path) -> None:
    view = ViewConfig(frame_stride=6, short="hold")
    table = index(v21, view)
    signals = read_signals(table, 8, view).signals["action"]
    for row, clip in enumerate(table.clips()):
        frames = np.minimum(clip.start_in_episode + np.arange(43), clip.episode_frames - 1)
        assert np.array_equal(signals[row, :, 3], frames)


def test_signals_at_another_rate_cover_the_clips_file_frames(v21: Path) -> None:
    """15 a second of 30: 8 frames span 15 file frames."""
    view = ViewConfig(sampling="fps", target_fps=15.0)
    signals = read_signals(index(v21, view), 8, view)
    assert signals.signals["action"].shape == (24, 15, 4)
