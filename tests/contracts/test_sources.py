"""Every source in the registry turns a data set of its layout into a clip table of the same kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import SCHEMA, ClipTable
from salt_vla.data.view_lock import ViewReader, clip_span
from salt_vla.errors import UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.registry import SOURCES, resolve

FRAMES, STRIDE = 4, 2
SPAN = clip_span(FRAMES, STRIDE)
GEOMETRY = ClipGeometry(num_frames=FRAMES, image_size=32, tubelet_size=2, patch_size=16)
Index = Callable[..., ClipTable]


def same(dataset: Path) -> Path:
    return dataset


# source → the tiny data set in its layout; the fixture's own is LeRobot's.
LAYOUTS: dict[str, Callable[[Path], Path]] = {"lerobot": same}


def test_every_source_has_a_data_set_here() -> None:
    assert set(LAYOUTS) == set(SOURCES)


@pytest.fixture(scope="module", params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def index(source: str) -> Index:
    return resolve(SOURCES, source)


@pytest.fixture(scope="module")
def dataset(source: str, tiny_dataset: Path) -> Path:
    return LAYOUTS[source](tiny_dataset)


@pytest.fixture(scope="module")
def table(index: Index, dataset: Path) -> ClipTable:
    return index(dataset, FRAMES, STRIDE)


def test_it_gives_a_clip_table(table: ClipTable, dataset: Path) -> None:
    assert isinstance(table, ClipTable) and len(table) > 0
    assert table.rows.schema.equals(SCHEMA)
    assert table.root == dataset.resolve()
    assert not any(column.null_count for column in table.rows.columns)


def test_clip_ids_are_unique_and_never_shift(index: Index, dataset: Path, table: ClipTable) -> None:
    """Clips that a coarser table shares with a finer one have the same ids, whatever their rows are."""
    assert len(set(table.clip_ids)) == len(table)
    finer = index(dataset, FRAMES, STRIDE, 8)
    places = {(clip.file, clip.first_frame): clip.clip_id for clip in finer.clips()}
    assert len(finer) > len(table)
    assert all(places[clip.file, clip.first_frame] == clip.clip_id for clip in table.clips())


def test_the_same_data_set_gives_the_same_table_wherever_it_lies(
    index: Index, dataset: Path, table: ClipTable, tmp_path: Path
) -> None:
    assert index(dataset, FRAMES, STRIDE).hash == table.hash
    moved = shutil.copytree(dataset, tmp_path / dataset.name)
    assert index(moved, FRAMES, STRIDE).hash == table.hash


def test_clips_lie_within_their_episodes(table: ClipTable) -> None:
    for clip in table.clips():
        assert clip.start_in_episode >= 0
        assert clip.start_in_episode + SPAN <= clip.episode_frames
        assert clip.fps > 0 and clip.label and clip.camera and clip.source


def test_no_episode_is_in_two_splits(table: ClipTable) -> None:
    splits: dict[int, set[str]] = {}
    for clip in table.clips():
        splits.setdefault(clip.episode, set()).add(clip.split)
    assert all(len(names) == 1 for names in splits.values())
    assert {name for names in splits.values() for name in names} == {"train", "validation"}


def test_every_clip_can_be_read(table: ClipTable) -> None:
    views = ViewReader(table, ViewConfig(frame_stride=STRIDE), GEOMETRY)
    for clip in table.clips()[:: len(table) // 6]:
        assert table.video(clip).is_file()
        assert views.read(clip.clip_id).shape == (FRAMES, 32, 32, 3)


def test_the_table_survives_its_file(table: ClipTable, tmp_path: Path) -> None:
    table.write(tmp_path / "clips.parquet")
    read = ClipTable.read(tmp_path / "clips.parquet")
    assert read.rows.equals(table.rows) and read.root == table.root and read.hash == table.hash


def test_one_camera_can_be_chosen(index: Index, dataset: Path, table: ClipTable) -> None:
    cameras = sorted(set(table.rows["camera"].to_pylist()))
    one = index(dataset, FRAMES, STRIDE, 16, (cameras[0],))
    assert set(one.rows["camera"].to_pylist()) == {cameras[0]}
    assert one.clip_ids == table.select(camera=cameras[0]).clip_ids
    with pytest.raises(UserError, match="no camera 'nose'"):
        index(dataset, FRAMES, STRIDE, 16, ("nose",))


def test_what_cannot_be_indexed_is_a_sentence(index: Index, dataset: Path, tmp_path: Path) -> None:
    for arguments in ((tmp_path, FRAMES, STRIDE), (tmp_path / "nowhere", FRAMES, STRIDE)):
        with pytest.raises(UserError, match=str(tmp_path)):
            index(*arguments)
    with pytest.raises(UserError, match="no episode is as long as one clip"):
        index(dataset, 1000, 10)


def test_a_chosen_part_keeps_the_tables_order(table: ClipTable) -> None:
    chosen = [table.clip_ids[5], table.clip_ids[2]]
    part = table.only(chosen)
    assert part.clip_ids == [table.clip_ids[2], table.clip_ids[5]]
    assert part.rows.schema.equals(pa.schema(SCHEMA)) and part.root == table.root
    assert len(table.only([])) == 0
