"""What is read is what was written; what was damaged is found, with its place; no damage is a crash."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from salt_vla.cache import CacheWriter, CorruptRecord, Encoding, Manifest, Record, open_cache
from salt_vla.cache.format import INDEX, INDEX_PAGES, checksum
from salt_vla.cache.mend import reindex, rewrite_shard
from salt_vla.cache.reader import MAX_OPEN_SHARDS
from salt_vla.cache.shards import read_footer
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
    assert cache.num_views == 2 and list(cache.keys()) == list(arrays)
    for (clip, view), array in arrays.items():
        latents = cache.read(clip, view=view)
        assert latents.dtype == np.float32 and np.array_equal(latents, array)
        assert (clip, view) in cache
    assert np.array_equal(cache.read("clip/3"), arrays["clip/3", 0])
    for strange in (("clip/3", 2), ("clip/3", -1), ("clip/9", 0), ("", 0), ("\ud800", 0)):
        assert strange not in cache


@pytest.mark.parametrize(("views", "per_shard"), [(1, 1), (3, 4), (3, 64), (2, 3), (5, 2)])
def test_clips_may_lie_across_shards(tmp_path, build_cache, views, per_shard):
    arrays = build_cache(tmp_path / "cache", clips=7, views=views, per_shard=per_shard)
    cache = open_cache(tmp_path / "cache")
    raw = cache.read_many(list(arrays))
    assert np.array_equal(raw.decode(), np.stack(list(arrays.values())))
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == -(-7 * views // per_shard)


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


def test_a_buffer_of_ones_own_is_filled_and_handed_back(folder, arrays):
    cache = open_cache(folder)
    keys = list(arrays)
    buffer = np.full((len(keys) + 2, RECORD_BYTES), 255, np.uint8)
    raw = cache.read_many(keys, out=buffer[1:-1])
    assert raw.data.base is buffer and np.array_equal(raw.data, cache.read_many(keys).data)
    assert (buffer[[0, -1]] == 255).all()


def test_a_buffer_that_does_not_fit_is_refused(folder, arrays):
    cache = open_cache(folder)
    keys = list(arrays)[:2]
    for buffer in (
        np.empty((3, RECORD_BYTES), np.uint8),
        np.empty((2, RECORD_BYTES), np.int8),
        np.empty((2, 2 * RECORD_BYTES), np.uint8)[:, ::2],
    ):
        with pytest.raises(ValueError, match=r"`out` must be C-contiguous uint8 of shape \(2, 24\)"):
            cache.read_many(keys, out=buffer)


@pytest.mark.parametrize("key", [("clip/9", 0), ("clip/1", 2), ("clip/1", -1), ("", 0)])
def test_a_record_that_is_not_there_is_a_sentence(folder, key):
    cache = open_cache(folder)
    for read in (lambda: cache.read(key[0], view=key[1]), lambda: cache.read_many([key])):
        with pytest.raises(CacheError, match=f"holds no view {key[1]} of clip '{key[0]}'"):
            read()


def test_which_clips_have_all_views(tmp_path, build_cache):
    build_cache(tmp_path / "cache", bad=(("clip/1", 1), ("clip/3", 0), ("clip/4", 0), ("clip/4", 1)))
    cache = open_cache(tmp_path / "cache")
    everything = [f"clip/{clip}" for clip in range(5)]
    assert cache.clip_ids == everything[:4]
    assert cache.with_views(everything, 2).tolist() == [True, False, True, False, False]
    assert cache.with_views(everything, 1).tolist() == [True, True, True, False, False]
    assert not cache.with_views(everything, 3).any()
    asked = ["clip/2", "clip/9", "clip/3", "clip/2"]
    for form in (asked, pa.array(asked), pa.chunked_array([asked[:1], asked[1:]])):
        assert cache.with_views(form, 2).tolist() == [True, False, False, True]
    assert cache.with_views(cache.clip_ids, 2).tolist() == [True, False, True, False]
    assert cache.with_views([], 2).tolist() == []


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_flipped_byte_is_located_wherever_it_is(tmp_path, build_cache, encoding):
    folder = tmp_path / "cache"
    keys = list(build_cache(folder, encoding=encoding))
    record_bytes = Encoding(encoding, (3, 4)).record_bytes
    for at in range(len(keys) * record_bytes):
        clip, view = keys[at // record_bytes]
        shard, slot = divmod(at // record_bytes, PER_SHARD)
        name, offset = f"shards/{shard:06d}.bin", slot * record_bytes
        flip(folder / name, offset + at % record_bytes)
        with pytest.raises(CorruptRecord, match="the checksum does not match") as error:
            open_cache(folder).read(clip, view=view)
        found = error.value
        assert (found.clip_id, found.view, found.file, found.offset) == (clip, view, name, offset)
        assert f"{name}, offset {offset} (clip '{clip}', view {view}): the checksum" in str(found)
        flip(folder / name, offset + at % record_bytes)
    open_cache(folder).read_many(keys)


def test_flipped_byte_does_not_touch_other_records(folder, arrays):
    flip(folder / "shards/000001.bin", RECORD_BYTES + 3)
    cache = open_cache(folder)
    bad = list(arrays)[PER_SHARD + 1]
    for key, array in arrays.items():
        if key != bad:
            assert np.array_equal(cache.read(key[0], view=key[1]), array)
    with pytest.raises(CorruptRecord, match="damaged"):
        cache.read_many(list(arrays))


def test_a_checksum_is_compared_first_or_always_or_never(folder, arrays):
    caches = {check: open_cache(folder, check=check) for check in ("first", "always", "never")}
    assert all(np.array_equal(cache.read("clip/0"), arrays["clip/0", 0]) for cache in caches.values())
    flip(folder / "shards/000000.bin", 0)
    flip(folder / "shards/000000.bin", RECORD_BYTES)
    for check, cache in caches.items():
        for view in range(2):
            is_believed = check == "never" or (check == "first" and view == 0)
            if is_believed:
                assert not np.array_equal(cache.read("clip/0", view=view), arrays["clip/0", view])
            else:
                with pytest.raises(CorruptRecord):
                    cache.read("clip/0", view=view)
    with pytest.raises(ValueError, match="check is one of first, always, never, not 'sometimes'"):
        open_cache(folder, check="sometimes")


def test_a_damaged_record_is_never_taken_for_checked(folder):
    flip(folder / "shards/000000.bin", 0)
    cache = open_cache(folder)
    for _ in range(3):
        with pytest.raises(CorruptRecord):
            cache.read("clip/0")


@pytest.mark.parametrize("size", [0, 1, RECORD_BYTES, 2 * RECORD_BYTES + 1])
def test_truncated_shard_is_an_error_for_what_is_lost_and_for_nothing_else(folder, arrays, size):
    cache = open_cache(folder)
    cache.read("clip/2")  # Its file is open already, and a mapped one would now be SIGBUS.
    os.truncate(folder / "shards/000001.bin", size)
    lost = list(arrays)[PER_SHARD + size // RECORD_BYTES : 2 * PER_SHARD]
    for key, array in arrays.items():
        if key not in lost:
            assert np.array_equal(cache.read(key[0], view=key[1]), array)
            continue
        with pytest.raises(CorruptRecord, match=r"shards/000001.bin, offset \d+ .*: the shard is truncated"):
            cache.read_many([key])


def test_missing_shard_is_an_error_that_names_it(folder):
    (folder / "shards/000002.bin").unlink()
    cache = open_cache(folder)
    with pytest.raises(CorruptRecord, match=r"shards/000002.bin, offset 24 .*: No such file"):
        cache.read("clip/4", view=1)


def test_lack_of_descriptors_is_no_damage(folder):
    """A run may skip what is damaged; it must not skip its way through a cache that is whole."""
    code = f"""
import os, resource
from salt_vla.cache import CorruptRecord, open_cache
from salt_vla.errors import CacheError
cache = open_cache({str(folder)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    while os.dup(0):
        pass
except OSError:
    pass
try:
    cache.read("clip/0")
except CacheError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("CacheError ") and "000000.bin cannot be read: Too many open" in done.stdout


def test_a_reader_gives_up_its_own_shards_where_descriptors_are_few(many):
    """A Mac's usual limit is 256, and a run reads several caches."""
    folder, arrays = many
    code = f"""
import os, resource
from salt_vla.cache import open_cache
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
cache = open_cache({str(folder)!r})
print(cache.read_many(list(cache.keys())).decode().sum())
os.close(os.open("/", os.O_RDONLY))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(np.stack(list(arrays.values())).sum())]


def test_a_system_without_linuxs_calls_reads_the_same(folder, arrays, monkeypatch):
    for name in ("RWF_NOWAIT", "posix_fadvise", "POSIX_FADV_WILLNEED"):
        monkeypatch.delattr(os, name)
    assert np.array_equal(
        open_cache(folder).read_many(list(arrays)).decode(), np.stack(list(arrays.values()))
    )


def test_a_pipe_in_a_shards_place_is_not_waited_for(folder):
    (folder / "shards/000000.bin").unlink()
    os.mkfifo(folder / "shards/000000.bin")
    with pytest.raises(CorruptRecord, match="it is a pipe or a device"):
        open_cache(folder).read("clip/0")


@pytest.mark.parametrize("name", [INDEX, INDEX_PAGES])
def test_missing_index_is_a_sentence_with_the_cure(folder, name):
    (folder / name).unlink()
    with pytest.raises(
        CacheError, match=r"index at .* cannot be read \(.*No such file.*`salt-vla cache repair`"
    ):
        open_cache(folder)


def test_cache_of_a_newer_program_is_a_sentence(folder):
    replace(Manifest.read(folder), schema_version=3).write(folder)
    with pytest.raises(
        CacheError, match="has schema version 3, newer than this program's 2; update salt-vla"
    ):
        open_cache(folder)


def test_unfinished_cache_is_a_sentence(folder):
    Manifest.read(folder).without_results().write(folder)
    with pytest.raises(CacheError, match="is unfinished; run its `cache build` again"):
        open_cache(folder)


def test_nothing_there_is_a_sentence(tmp_path):
    with pytest.raises(CacheError, match="there is no cache at"):
        open_cache(tmp_path / "nowhere")


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


def test_a_worker_that_would_open_another_cache_refuses(folder, tmp_path, build_cache):
    """One was built in its place between the parent's opening and the worker's."""
    cache = open_cache(folder)
    reopen, arguments = cache.__reduce__()
    assert reopen(*arguments).manifest == cache.manifest
    shutil.rmtree(folder)
    build_cache(folder, clips=4)
    with pytest.raises(CacheError, match="was changed while it was in use; start the command again"):
        reopen(*arguments)


@pytest.fixture(scope="module")
def many(tmp_path_factory, build_cache):
    """A cache of more shards than may be open, under a fifth of the usual limit of open files; its arrays."""
    folder = tmp_path_factory.mktemp("shards") / "many"
    return folder, build_cache(folder, clips=MAX_OPEN_SHARDS + 50, views=1, shape=(1, 2), per_shard=1)


def test_threads_read_right_while_shards_are_closed_and_opened(many):
    """A descriptor's number is used again at once; nobody may read another shard by it."""
    folder, arrays = many
    cache = open_cache(folder, check="never")
    keys = list(arrays)
    wrong: list[object] = []

    def read(seed: int) -> None:
        for at in np.random.default_rng(seed).integers(0, len(keys), 1500):
            try:
                if not np.array_equal(cache.read(*keys[at][:1]), arrays[keys[at]]):
                    wrong.append(keys[at])
            except CacheError as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # So that they change places between any two steps.
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_more_shards_than_may_be_open_are_read_in_any_order(many):
    """And are closed again when the cache is dropped."""
    folder, arrays = many
    limit = MAX_OPEN_SHARDS + 20
    code = f"""
import os, resource
import numpy as np
from salt_vla.cache import open_cache
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
before = len(os.listdir("/proc/self/fd"))
cache = open_cache({str(folder)!r})
keys = list(cache.keys())
keys = [keys[i] for i in np.random.default_rng(0).integers(0, len(keys), 3000)]
print(float(cache.read_many(keys).decode().sum()))
del cache
assert len(os.listdir("/proc/self/fd")) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    keys = list(arrays)
    expected = np.stack(
        [arrays[keys[i]] for i in np.random.default_rng(0).integers(0, len(keys), 3000)]
    ).sum()
    assert done.stdout.split() == [str(float(expected))]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > limit


def build_other(folder: Path, clips: int, **settings: int) -> None:
    """As `build_cache` does, of another teacher, whose every record is ones."""
    manifest = Manifest(
        "latents", "float16", (1, 2), 1, settings["per_shard"], {"teacher": "other", "clip_table": "c"}
    )
    with CacheWriter(folder, manifest, [f"clip/{clip}" for clip in range(clips)]) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, [Record(key, np.ones((1, 2), np.float32)) for key in shard.keys])
        writer.finish()


def test_an_open_reader_never_gives_another_caches_records(tmp_path, build_cache):
    """Though it has compared every record once, and opens shards anew by their numbers."""
    folder, clips = tmp_path / "cache", MAX_OPEN_SHARDS + 2
    arrays = build_cache(folder, clips=clips, views=1, shape=(1, 2), per_shard=1)
    cache = open_cache(folder)
    cache.read_many(list(arrays))
    shutil.rmtree(folder)
    build_other(folder, clips, per_shard=1)
    for key, array in arrays.items():
        try:
            assert np.array_equal(cache.read(key[0]), array)
        except CacheError as error:
            assert "was changed while it was in use; start the command again" in str(error)
            assert not isinstance(error, CorruptRecord), "a run would skip its way through"
            cache.close()  # What is open still is the old file's.


def test_what_was_checked_in_an_old_file_is_checked_again_in_a_new_one(folder, arrays):
    cache = open_cache(folder)
    cache.read_many(list(arrays))
    path = folder / "shards/000001.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    (folder / "new").write_bytes(content)
    (folder / "new").replace(path)
    cache.close()
    with pytest.raises(CorruptRecord, match="the checksum does not match"):
        cache.read_many(list(arrays))


@pytest.mark.parametrize("is_changed", [False, True])
def test_an_open_reader_reads_what_a_repair_has_written(folder, arrays, is_changed):
    """To the byte as it was, or in other last digits, of which the index on disk then knows."""
    path = folder / "shards/000001.bin"
    flip(path, 0)
    cache = open_cache(folder)
    key = list(arrays)[PER_SHARD]
    with pytest.raises(CorruptRecord):
        cache.read(key[0], view=key[1])
    footer = read_footer(path)
    fresh = arrays[key] * np.float32(1.001 if is_changed else 1)
    blob = cache.encoding.encode(fresh)
    said = replace(footer, checksums=(checksum(blob), *footer.checksums[1:]))
    rewrite_shard(path, said, {0: blob}, frozenset(), cache.encoding, lambda: None)
    reindex(folder, cache.manifest, cache.index.all_ids(), lambda _: None)
    assert np.array_equal(cache.read(key[0], view=key[1]), cache.encoding.decode(blob))
    for other in list(arrays)[PER_SHARD + 1 :]:
        assert np.array_equal(cache.read(other[0], view=other[1]), arrays[other])


def test_an_open_reader_of_a_cache_that_has_lost_records_says_so(folder, arrays, build_cache):
    cache = open_cache(folder)
    shutil.rmtree(folder)
    build_cache(folder, bad=(("clip/4", 1),))
    assert np.array_equal(cache.read("clip/0"), arrays["clip/0", 0])
    with pytest.raises(CacheError, match="was changed while it was in use"):
        cache.read("clip/4", view=1)


def test_cache_can_be_moved(folder, arrays, tmp_path):
    shutil.move(folder, tmp_path / "else where ä")
    cache = open_cache(tmp_path / "else where ä")
    assert np.array_equal(cache.read("clip/0"), arrays["clip/0", 0])
    cache.close()
    assert np.array_equal(cache.read("clip/1"), arrays["clip/1", 0])
