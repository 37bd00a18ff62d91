"""Finding clips for a command: which are learned from, which held out, and what becomes of bad ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import (
    HELD_OUT_EVERY,
    open_table,
    open_views,
    split_table,
)
from salt_vla.jobs.data_index import EMBEDDED, MAX_BAD_SHARE, place_of
from salt_vla.jobs.unread_views import refuse_too_many_bad
from salt_vla.view_store import StoredViews

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16)
DATA = DataConfig(view=ViewConfig(frame_stride=2, num_views=2, crop_scale=(0.8, 1.0)), store_views=True)


@pytest.fixture(autouse=True)
def in_a_root_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


def episodes(table: ClipTable) -> set[int]:
    return set(table.rows["episode"].to_pylist())


def renamed_splits(table: ClipTable, name: str) -> ClipTable:
    at = table.rows.column_names.index("split")
    return table.filtered(table.rows.set_column(at, "split", pa.array([name] * len(table))))


def test_a_data_sets_own_splits_are_used(tiny_table: ClipTable) -> None:
    splits = split_table(tiny_table)
    assert (episodes(splits.train), episodes(splits.validation)) == ({0, 1, 2, 3}, {4, 5})
    assert splits.note == "the data set's validation split"


@pytest.mark.parametrize("name", ["train", "all"])
def test_without_held_out_episodes_every_tenth_is_held_out(tiny_table: ClipTable, name: str) -> None:
    splits = split_table(renamed_splits(tiny_table, name))
    assert episodes(splits.validation) == {0}
    assert episodes(splits.train) == {1, 2, 3, 4, 5}
    assert len(splits.train) + len(splits.validation) == len(tiny_table)
    assert splits.note == f"every {HELD_OUT_EVERY}th episode of the training split"


def test_held_out_clips_that_may_not_be_used_are_not_trained_on_either(tiny_table: ClipTable) -> None:
    splits = split_table(tiny_table, may_use_validation=False)
    assert episodes(splits.train) == {1, 2, 3} and episodes(splits.validation) == {0}


def test_one_episode_cannot_be_split(tiny_table: ClipTable) -> None:
    alone = tiny_table.filtered(tiny_table.rows.slice(0, 2))
    with pytest.raises(DataError, match="has one training episode; two are needed"):
        split_table(alone)


def test_a_table_is_found_by_file_folder_or_name(
    tiny_dataset: Path, tiny_table: ClipTable, tmp_path: Path
) -> None:
    tiny_table.write(tmp_path / "clips.parquet")
    for spec in (tmp_path / "clips.parquet", tiny_dataset):
        assert open_table(str(spec), DATA.view, GEOMETRY).hash == tiny_table.hash
    assert open_table("metaworld-mini", DATA.view, GEOMETRY).root == place_of(EMBEDDED)
    with pytest.raises(DataError, match="no data: give --data a clip table"):
        open_table("", DATA.view, GEOMETRY)
    with pytest.raises(DataError, match="there is no clip table at nowhere"):
        open_table("nowhere", DATA.view, GEOMETRY)


def test_the_embedded_data_set_has_both_splits_and_two_cameras() -> None:
    table = open_table("metaworld-mini", ViewConfig(frame_stride=2), GEOMETRY)
    splits = split_table(table)
    assert splits.note == "the data set's validation split"
    assert not episodes(splits.train) & episodes(splits.validation)
    assert len(set(table.rows["camera"].to_pylist())) == 2
    assert len(set(table.rows["label"].to_pylist())) >= 10


def test_stored_views_are_the_decoded_ones(tiny_table: ClipTable) -> None:
    views, readable = open_views(tiny_table, DATA, GEOMETRY)
    assert isinstance(views, StoredViews) and readable == tiny_table.clip_ids
    decoded = ViewReader(tiny_table, DATA.view, GEOMETRY)
    keys = [(clip, view) for clip in (readable[0], readable[-1]) for view in (0, 1)]
    np.testing.assert_array_equal(views.read_many(keys), decoded.read_many(keys))


def test_views_are_stored_once_under_the_name_of_their_content(
    tiny_table: ClipTable, in_a_root_of_its_own: Path
) -> None:
    first, _ = open_views(tiny_table, DATA, GEOMETRY)
    store = first.cache.folder
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again, _ = open_views(tiny_table, DATA, GEOMETRY)
    assert again.cache.folder == store
    assert times == {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    others = [
        open_views(tiny_table, DATA, GEOMETRY, num_views=1),
        open_views(tiny_table.select(split="train"), DATA, GEOMETRY),
        open_views(tiny_table, replace(DATA, view=replace(DATA.view, max_shift=1)), GEOMETRY),
    ]
    folders = {store} | {views.cache.folder for views, _ in others}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {in_a_root_of_its_own / "caches"}


def test_without_a_store_nothing_is_written(tiny_table: ClipTable, in_a_root_of_its_own: Path) -> None:
    views, readable = open_views(tiny_table, replace(DATA, store_views=False), GEOMETRY)
    assert isinstance(views, ViewReader) and readable == tiny_table.clip_ids
    assert list(in_a_root_of_its_own.iterdir()) == []


def test_a_clip_without_its_file_is_left_out_by_name(tiny_table: ClipTable) -> None:
    """Of 200 copies of the table's clips under other names one has lost its file."""
    rows = pa.concat_tables([tiny_table.rows] * 9)
    lost = 5
    ids = [f"{clip}#{row}" for row, clip in enumerate(rows["clip_id"].to_pylist())]
    files = ["videos/lost.mp4" if row == lost else file for row, file in enumerate(rows["file"].to_pylist())]
    for name, column in (("clip_id", ids), ("file", files)):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(column))
    table = tiny_table.filtered(rows)
    views, readable = open_views(table, DATA, GEOMETRY, num_views=1)
    assert set(table.clip_ids) - set(readable) == {ids[lost]}
    with pytest.raises(CacheError, match="holds no view 0 of clip"):
        views.read_many([(ids[lost], 0)])


def test_more_bad_views_than_chance_explains_are_refused(tmp_path: Path) -> None:
    limit = int(100 * MAX_BAD_SHARE)
    refuse_too_many_bad(limit, 100, tmp_path)
    with pytest.raises(DataError, match=f"{limit + 1} of 100 clip views .*{tmp_path}/quarantine.json"):
        refuse_too_many_bad(limit + 1, 100, tmp_path)
