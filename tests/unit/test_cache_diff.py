"""Two caches field by field and record by record, whatever the order of their clips."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Key, Manifest, Record, open_cache
from salt_vla.errors import CacheError
from salt_vla.jobs import cache_diff
from salt_vla.jobs.cache_diff import MISSING, compare_records, diff_caches, differing, flat

Arrays = dict[Key, np.ndarray]


def write(folder: Path, arrays: Arrays, clip_ids: list[str], views: int = 1, **fields: object) -> Path:
    manifest = Manifest("latents", "float16", (3, 4), views, 4, {"teacher": "t", "view": {"frame_stride": 2}})
    with CacheWriter(folder, replace(manifest, **fields), clip_ids) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, [Record(key, arrays.get(key), "lost") for key in shard.keys])
        writer.finish()
    return folder


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    keys = [(f"clip{number}", view) for number in range(10) for view in range(2)]
    return {key: rng.normal(size=(3, 4)).astype(np.float32) for key in keys}


def clips(*numbers: int) -> list[str]:
    return [f"clip{number}" for number in numbers]


def test_a_cache_is_the_same_as_its_copy(tmp_path: Path, arrays: Arrays) -> None:
    a = write(tmp_path / "a", arrays, clips(*range(10)), 2)
    found = diff_caches(a, shutil.copytree(a, tmp_path / "b"))
    assert found.is_same and found.fields == []
    assert found.records is not None and found.records.equal == 20
    assert found.to_json()["same"] is True


def test_every_kind_of_difference_between_records_is_counted(tmp_path: Path, arrays: Arrays) -> None:
    other = arrays | {("clip3", 0): np.zeros((3, 4), np.float32)}
    lost = {key: array for key, array in other.items() if key != ("clip5", 0)}
    a = open_cache(write(tmp_path / "a", arrays, clips(*range(8))))
    b = open_cache(write(tmp_path / "b", lost, clips(9, 3, 5, 2, 1, 7)))
    counts = compare_records(a, b)
    assert (counts.equal, counts.different, counts.only_a, counts.only_b) == (3, 1, 4, 1)
    assert counts.differing == [("clip3", 0)]
    mirrored = compare_records(b, a)
    assert (mirrored.equal, mirrored.different, mirrored.only_a, mirrored.only_b) == (3, 1, 1, 4)


def test_further_views_are_only_in_one(tmp_path: Path, arrays: Arrays) -> None:
    a = open_cache(write(tmp_path / "a", arrays, clips(0, 1, 2)))
    b = open_cache(write(tmp_path / "b", arrays, clips(0, 1, 2), 2))
    counts = compare_records(a, b)
    assert (counts.equal, counts.different, counts.only_a, counts.only_b) == (3, 0, 0, 3)


def test_counts_do_not_depend_on_how_many_clips_are_compared_at_once(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {key: array + (key[0] in ("clip2", "clip8")) for key, array in arrays.items()}
    a = open_cache(write(tmp_path / "a", arrays, clips(*range(10)), 2))
    b = open_cache(write(tmp_path / "b", changed, clips(0, 1, 2, 3, 9, 8, 7), 2))
    whole = compare_records(a, b)
    monkeypatch.setattr(cache_diff, "CHUNK", 3)
    assert compare_records(a, b) == whole
    assert (whole.equal, whole.different, whole.only_a) == (10, 4, 6)
    assert whole.differing == [("clip2", 0), ("clip2", 1), ("clip8", 0), ("clip8", 1)]


def test_only_the_first_differing_records_are_named(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = open_cache(write(tmp_path / "a", arrays, clips(*range(10))))
    b = open_cache(write(tmp_path / "b", {key: -array for key, array in arrays.items()}, clips(*range(10))))
    monkeypatch.setattr(cache_diff, "CHUNK", 3)
    assert [key[0] for key in compare_records(a, b).differing] == clips(*range(8))


def test_fields_are_named_down_to_the_setting(tmp_path: Path, arrays: Arrays) -> None:
    a = write(tmp_path / "a", arrays, clips(0, 1))
    b = write(tmp_path / "b", arrays, clips(0, 1), provenance={"teacher": "t", "view": {"frame_stride": 4}})
    found = diff_caches(a, b)
    (row,) = found.fields
    assert (row.name, row.a, row.b) == ("provenance.view.frame_stride", 2, 4)
    assert found.records is not None and found.records.equal == 2 and not found.is_same


def test_what_cannot_be_compared_is_said(tmp_path: Path, arrays: Arrays) -> None:
    a = write(tmp_path / "a", arrays, clips(0, 1))
    b = write(tmp_path / "b", arrays, clips(0, 1), encoding="int8")
    found = diff_caches(a, b)
    assert found.records is None and "another encoding" in found.why_no_records
    assert [row.name for row in found.fields] == ["encoding"]
    replace(Manifest.read(b), complete=False).write(b)
    assert diff_caches(a, b).why_no_records == "unfinished"
    with pytest.raises(CacheError, match="no cache"):
        diff_caches(a, tmp_path)


def test_a_field_that_one_side_lacks_is_a_difference() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": (1, 2)}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2], "e": {}}
    (row,) = differing({"x": 1, "y": None}, {"x": 1})
    assert (row.name, row.a, row.b) == ("y", None, MISSING)
    assert differing({"index_checksum": "1"}, {"index_checksum": "2"}) == []


def test_a_damaged_index_is_an_error_and_no_difference(
    tmp_path: Path, build_cache: Callable[..., object]
) -> None:
    for name in "ab":
        build_cache(tmp_path / name)
    index = tmp_path / "b" / "index.arrow"
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(bytes(content))
    with pytest.raises(CacheError, match="damaged"):
        diff_caches(tmp_path / "a", tmp_path / "b")
