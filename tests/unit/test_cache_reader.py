"""What is read is what was written; what was damaged is found, with its place; no damage is a crash."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from salt_vla.cache import Encoding, Manifest, open_cache
from salt_vla.cache.format import INDEX, MANIFEST, checksum
from salt_vla.cache.reader import MAX_OPEN_SHARDS
from salt_vla.errors import CacheError

RECORD_BYTES = 2 * 3 * 4
PER_SHARD = 4


@pytest.fixture
def arrays(tmp_path, build_cache):
    return build_cache(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path, arrays) -> Path:
    return tmp_path / "cache"


def test_everything_written_is_read_back(folder, arrays):
    cache = open_cache(str(folder))
    assert cache.clip_ids == [f"clip/{clip}" for clip in range(5)]
    assert cache.num_views == 2 and cache.keys == list(arrays)
    for (clip, view), array in arrays.items():
        latents = cache.read(clip, view=view)
        assert latents.dtype == np.float32 and np.array_equal(latents, array)
        assert (clip, view) in cache
    assert np.array_equal(cache.read("clip/3"), arrays["clip/3", 0])
    assert ("clip/3", 2) not in cache and ("clip/9", 0) not in cache


@pytest.mark.parametrize("ids", [[0], [2, 0, 2], np.array([1]), range(3), []])
def test_token_ids_pick_rows_in_the_order_asked_for(folder, arrays, ids):
    latents = open_cache(folder).read("clip/2", token_ids=ids, view=1)
    assert np.array_equal(latents, arrays["clip/2", 1][list(ids)]) and latents.shape == (len(ids), 4)


def test_many_records_come_raw_in_the_order_asked_for(folder, arrays):
    cache = open_cache(folder)
    keys = [("clip/4", 1), ("clip/0", 0), ("clip/4", 1), ("clip/2", 0)]
    raw = cache.read_many(keys)
    assert raw.data.shape == (4, RECORD_BYTES) and raw.data.dtype == np.uint8
    assert raw.data.flags.writeable
    assert raw.encoding == Encoding("float16", (3, 4))
    assert np.array_equal(raw.decode(), np.stack([arrays[key] for key in keys]))
    nothing = cache.read_many([])
    assert nothing.data.shape == (0, RECORD_BYTES) and nothing.decode().shape == (0, 3, 4)


@pytest.mark.parametrize("key", [("clip/9", 0), ("clip/1", 2), ("", 0)])
def test_a_record_that_is_not_there_is_a_sentence(folder, key):
    cache = open_cache(folder)
    for read in (lambda: cache.read(key[0], view=key[1]), lambda: cache.read_many([key])):
        with pytest.raises(CacheError, match=f"holds no view {key[1]} of clip '{key[0]}'"):
            read()


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_flipped_byte_is_located_wherever_it_is(tmp_path, build_cache, encoding):
    folder = tmp_path / "cache"
    keys = list(build_cache(folder, encoding=encoding))
    record_bytes = Encoding(encoding, (3, 4)).record_bytes
    for shard, start in enumerate(range(0, len(keys), PER_SHARD)):
        name = f"shards/{shard:06d}.bin"
        for at in range((folder / name).stat().st_size):
            flip(folder / name, at)
            clip, view = keys[start + at // record_bytes]
            offset = at // record_bytes * record_bytes
            place = f"{name}, offset {offset} \\(clip '{clip}', view {view}\\): the checksum does not match"
            with pytest.raises(CacheError, match=place):
                open_cache(folder).read(clip, view=view)
            found = [report for report in open_cache(folder).verify() if report is not None]
            reason = found[0].pop("reason")
            assert found == [{"clip_id": clip, "view": view, "file": name, "offset": offset}]
            assert "checksum" in reason
            flip(folder / name, at)
    assert list(open_cache(folder).verify()) == [None] * len(keys)


def test_flipped_byte_does_not_touch_other_records(folder, arrays):
    flip(folder / "shards/000001.bin", RECORD_BYTES + 3)
    cache = open_cache(folder)
    bad = list(arrays)[PER_SHARD + 1]
    for key, array in arrays.items():
        if key != bad:
            assert np.array_equal(cache.read(key[0], view=key[1]), array)
    with pytest.raises(CacheError, match="damaged"):
        cache.read_many(list(arrays))


def test_verify_looks_at_the_disk_again(folder, arrays):
    cache = open_cache(folder)
    cache.read_many(list(arrays))
    flip(folder / "shards/000000.bin", 0)
    assert [report is None for report in cache.verify()] == [False] + [True] * 9


@pytest.mark.parametrize("size", [0, 1, RECORD_BYTES, 2 * RECORD_BYTES + 1])
def test_truncated_shard_is_an_error_for_what_is_lost_and_for_nothing_else(folder, arrays, size):
    os.truncate(folder / "shards/000001.bin", size)
    lost = list(arrays)[PER_SHARD + size // RECORD_BYTES : 2 * PER_SHARD]
    cache = open_cache(folder)
    reports = dict(zip(arrays, cache.verify(), strict=True))
    assert [key for key, report in reports.items() if report is not None] == lost
    with pytest.raises(CacheError, match=r"shards/000001.bin, offset \d+ .*: the shard is truncated"):
        cache.read_many(lost)


def test_missing_shard_is_an_error_that_names_it(folder, arrays):
    (folder / "shards/000002.bin").unlink()
    cache = open_cache(folder)
    assert [report is None for report in cache.verify()] == [True] * 8 + [False] * 2
    with pytest.raises(CacheError, match=r"shards/000002.bin, offset 24 .*: No such file"):
        cache.read("clip/4", view=1)


def test_missing_index_is_a_sentence_with_the_cure(folder):
    (folder / INDEX).unlink()
    with pytest.raises(CacheError, match=r"index .* cannot be read \(No such file.*remove .* build it again"):
        open_cache(folder)


def test_flipped_byte_of_the_index_is_found_at_opening(folder):
    size = (folder / INDEX).stat().st_size
    for at in [0, size - 1, *range(3, size, 13)]:
        flip(folder / INDEX, at)
        with pytest.raises(CacheError, match=r"index .* is damaged: .*; remove .* and build it again"):
            open_cache(folder)
        flip(folder / INDEX, at)
    open_cache(folder)


def test_truncated_index_is_a_sentence(folder):
    size = (folder / INDEX).stat().st_size
    for keep in (size - 1, size // 2, 1, 0):
        os.truncate(folder / INDEX, keep)
        with pytest.raises(CacheError, match="is damaged"):
            open_cache(folder)


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_flipped_byte_of_the_manifest_is_a_sentence_or_a_different_manifest(folder, arrays, bit):
    """It has no checksum of its own; but nothing in it can make a reader crash or return other numbers."""
    whole = Manifest.read(folder)
    for at in range((folder / MANIFEST).stat().st_size):
        flip(folder / MANIFEST, at, bit)
        try:
            cache = open_cache(folder)
            read = cache.read("clip/1", view=1)
        except CacheError as error:
            assert str(folder) in str(error)
        else:
            assert cache.manifest != whole
            assert np.array_equal(read, arrays["clip/1", 1])
        flip(folder / MANIFEST, at, bit)
    assert open_cache(folder).manifest == whole


def test_cache_of_a_newer_program_is_a_sentence(folder):
    replace(Manifest.read(folder), schema_version=2).write(folder)
    with pytest.raises(
        CacheError, match="has schema version 2, newer than this program's 1; update salt-vla"
    ):
        open_cache(folder)


def test_nothing_there_is_a_sentence(tmp_path):
    with pytest.raises(CacheError, match="there is no cache at"):
        open_cache(tmp_path / "nowhere")


def test_index_is_the_documented_table(folder, arrays):
    content = (folder / INDEX).read_bytes()
    table = pa.ipc.open_file(content).read_all()
    assert table.column_names == ["clip_id", "view", "shard", "slot", "checksum"]
    assert Manifest.read(folder).index_checksum == f"{checksum(content):016x}"
    for row, key in zip(table.to_pylist(), arrays, strict=True):
        assert (row["clip_id"], row["view"]) == key
        shard = (folder / "shards" / f"{row['shard']:06d}.bin").read_bytes()
        record = shard[row["slot"] * RECORD_BYTES :][:RECORD_BYTES]
        assert checksum(record) == row["checksum"]
        assert np.array_equal(np.frombuffer(record, "<f2").reshape(3, 4), arrays[key])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("is_warm", [True, False])
def test_workers_read_what_the_parent_reads(folder, arrays, method, is_warm):
    cache = open_cache(folder)
    keys = list(arrays)
    if is_warm:
        cache.read_many(keys)
    with multiprocessing.get_context(method).Pool(2) as pool:
        parts = pool.map(cache.read_many, [keys[::2], keys[1::2], keys, keys[::-1]])
    ours = [cache.read_many(part) for part in (keys[::2], keys[1::2], keys, keys[::-1])]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(parts, ours, strict=True))
    assert np.array_equal(cache.read_many(keys).decode(), np.stack(list(arrays.values())))


def test_more_shards_than_may_be_open_are_read_in_any_order(tmp_path, build_cache):
    """520 shards, under half of the usual limit of open files, closed again when the cache is dropped."""
    folder = tmp_path / "many"
    arrays = build_cache(folder, clips=520, views=1, shape=(1, 2), per_shard=1)
    code = f"""
import os, resource
import numpy as np
from salt_vla.cache import open_cache
resource.setrlimit(resource.RLIMIT_NOFILE, ({2 * MAX_OPEN_SHARDS}, {2 * MAX_OPEN_SHARDS}))
cache = open_cache({str(folder)!r})
before = len(os.listdir("/proc/self/fd"))
keys = [cache.keys[i] for i in np.random.default_rng(0).integers(0, 520, 3000)]
print(float(cache.read_many(keys).decode().sum()), sum(bad is not None for bad in cache.verify()))
del cache
assert len(os.listdir("/proc/self/fd")) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    keys = list(arrays)
    expected = np.stack([arrays[keys[i]] for i in np.random.default_rng(0).integers(0, 520, 3000)]).sum()
    assert done.stdout.split() == [str(float(expected)), "0"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2 * MAX_OPEN_SHARDS


def test_cache_can_be_moved(folder, arrays, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    cache = open_cache(tmp_path / "elsewhere")
    assert np.array_equal(cache.read("clip/0"), arrays["clip/0", 0])
    cache.close()
    assert np.array_equal(cache.read("clip/1"), arrays["clip/1", 0])
