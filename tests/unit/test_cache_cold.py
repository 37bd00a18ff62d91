"""Records that no page cache holds, and places where one cannot even ask: read the same, and checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CorruptRecord, open_cache

SHAPE = (64, 48)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk; and one in memory, where files are never "not there yet"."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def forget(folder: Path) -> None:
    """Let the page cache drop the shards, as far as their file system has one."""
    for path in (folder / "shards").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_cold_records_are_read_as_warm_ones(place, build_cache, check):
    arrays = build_cache(place / "cache", clips=12, views=2, shape=SHAPE, per_shard=8)
    forget(place / "cache")
    cache = open_cache(place / "cache", check=check)
    keys = list(arrays)[::-1]
    for _ in range(2):
        assert np.array_equal(cache.read_many(keys).decode(), np.stack([arrays[key] for key in keys]))


def test_cold_damage_is_found_wherever_it_stands_in_a_batch(place, build_cache):
    keys = list(build_cache(place / "cache", clips=6, views=1, shape=SHAPE, per_shard=3))
    for slot, key in enumerate(keys):
        shard, at = place / f"cache/shards/{slot // 3:06d}.bin", slot % 3 * 2 * 64 * 48
        whole = shard.read_bytes()
        shard.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
        forget(place / "cache")
        with pytest.raises(CorruptRecord, match="the checksum does not match") as raised:
            open_cache(place / "cache").read_many(keys)
        assert (raised.value.clip_id, raised.value.view, raised.value.offset) == (*key, at)
        shard.write_bytes(whole)


def test_a_shard_that_is_gone_is_named_by_the_record_that_is_read_not_by_the_one_before(place, build_cache):
    keys = list(build_cache(place / "cache", clips=2, views=1, shape=SHAPE, per_shard=1))
    (place / "cache/shards/000001.bin").unlink()
    cache = open_cache(place / "cache")
    with pytest.raises(CorruptRecord, match="No such file") as raised:
        cache.read_many(keys)
    assert raised.value.clip_id == keys[1][0]
    assert len(cache.read_many(keys[:1]).data) == 1
