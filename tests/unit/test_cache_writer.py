"""A cache being built: nothing half-written counts, nothing finished is made again, nothing is mixed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Manifest, open_cache
from salt_vla.cache.format import INDEX, JOURNAL, LOCK, MANIFEST, QUARANTINE
from salt_vla.cache.writer import Record
from salt_vla.errors import CacheError

SHAPE = (3, 4)
KEYS = [(f"clip/{clip}", view) for clip in range(5) for view in range(2)]
MANIFEST_5 = Manifest("latents", "float16", SHAPE, 2, 4, {"teacher": "t", "clip_table": "c"})


def array_of(key: tuple[str, int]) -> np.ndarray:
    return np.full(SHAPE, KEYS.index(key), np.float32)


def records_of(keys: tuple[tuple[str, int], ...]) -> list[Record]:
    return [Record(key, array_of(key)) for key in keys]


def write(folder: Path, shards: int | None = None, manifest: Manifest = MANIFEST_5) -> list[int]:
    """Go on building for at most `shards` shards, and finish where none is missing; the numbers written."""
    with CacheWriter(folder, manifest, KEYS) as writer:
        missing = writer.missing_shards()
        written = missing if shards is None else missing[:shards]
        for shard in written:
            writer.write_shard(shard, records_of(shard.keys))
        if len(written) == len(missing):
            writer.finish()
    return [shard.number for shard in written]


def test_finished_cache_is_these_files_and_no_others(tmp_path, tree):
    assert write(tmp_path / "cache") == [0, 1, 2]
    shards = [f"shards/{number:06d}.bin" for number in range(3)]
    assert sorted(tree(tmp_path / "cache")) == sorted([INDEX, MANIFEST, QUARANTINE, *shards])
    manifest = Manifest.read(tmp_path / "cache")
    assert manifest.complete and manifest.num_records == 10 and manifest.num_quarantined == 0
    assert json.loads((tmp_path / "cache" / QUARANTINE).read_text()) == []
    assert (tmp_path / "cache" / "shards/000002.bin").stat().st_size == 2 * 2 * 12
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_building_again_does_nothing_and_resuming_skips_what_is_done(tmp_path, tree):
    write(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    assert write(tmp_path / "whole") == []
    assert write(tmp_path / "parts", shards=1) == [0]
    assert write(tmp_path / "parts", shards=1) == [1]
    assert write(tmp_path / "parts", shards=1) == [2]
    assert write(tmp_path / "parts") == []
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole") == whole


def test_unfinished_cache_cannot_be_read(tmp_path):
    write(tmp_path / "cache", shards=2)
    with pytest.raises(CacheError, match="is unfinished; run its `cache build` again"):
        open_cache(tmp_path / "cache")


def test_cache_with_a_shard_missing_cannot_be_finished(tmp_path):
    with CacheWriter(tmp_path / "cache", MANIFEST_5, KEYS) as writer:
        first, *_ = writer.missing_shards()
        writer.write_shard(first, records_of(first.keys))
        with pytest.raises(CacheError, match=r"lacks 2 shard\(s\), the first number 1"):
            writer.finish()
    assert not Manifest.read(tmp_path / "cache").complete


def test_shard_that_vanished_or_shrank_is_made_again(tmp_path, tree):
    write(tmp_path / "whole")
    for damage in (Path.unlink, lambda file: os.truncate(file, 5)):
        folder = tmp_path / "cache"
        write(folder, shards=2)
        damage(folder / "shards/000000.bin")
        assert write(folder) == [0, 2]
        assert tree(folder) == tree(tmp_path / "whole")
        shutil.rmtree(folder)


def test_journal_line_torn_at_any_byte_is_healed(tmp_path, tree):
    write(tmp_path / "whole")
    write(tmp_path / "begun", shards=2)
    journal = (tmp_path / "begun" / JOURNAL).read_bytes()
    last_line = len(journal.splitlines()[-1])
    for cut in [1, 2, *range(3, last_line + 1, 11), last_line + 1]:
        folder = tmp_path / f"torn{cut}"
        shutil.copytree(tmp_path / "begun", folder)
        os.truncate(folder / JOURNAL, len(journal) - cut)
        assert write(folder) == ([2] if cut == 1 else [1, 2])
        assert tree(folder) == tree(tmp_path / "whole")


def test_journal_with_rubbish_in_it_loses_only_the_rubbish(tmp_path, tree):
    write(tmp_path / "whole")
    write(tmp_path / "cache", shards=2)
    with (tmp_path / "cache" / JOURNAL).open("ab") as journal:
        journal.write(b"\0\0\xff\xfe\0")
    assert write(tmp_path / "cache") == [2]
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_leftovers_of_a_killed_builder_are_swept_up(tmp_path, tree):
    write(tmp_path / "whole")
    folder = tmp_path / "cache"
    write(folder, shards=1)
    for name in (".manifest.json.abc.part", ".index.arrow.x.part", "shards/.000001.bin.q1.part"):
        (folder / name).write_bytes(b"half")
    write(folder)
    assert tree(folder) == tree(tmp_path / "whole")
    (folder / JOURNAL).write_text("left by a builder killed after its last word")
    (folder / LOCK).touch()
    write(folder)
    assert tree(folder) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(MANIFEST_5, provenance={"teacher": "u", "clip_table": "c"}), "provenance.teacher: 't' here"),
        (replace(MANIFEST_5, provenance={"teacher": "t"}), "provenance.clip_table: 'c' here, None wanted"),
        (replace(MANIFEST_5, encoding="int8"), "encoding: 'float16' here, 'int8' wanted"),
        (replace(MANIFEST_5, shape=(4, 4)), r"shape: \[3, 4\] here, \[4, 4\] wanted"),
        (replace(MANIFEST_5, num_views=1), "num_views: 2 here, 1 wanted"),
        (replace(MANIFEST_5, records_per_shard=8), "records_per_shard: 4 here, 8 wanted"),
        (replace(MANIFEST_5, kind="views"), "kind: 'latents' here, 'views' wanted"),
        (replace(MANIFEST_5, token_order="row"), "token_order: 'time,row,column' here"),
    ],
)
@pytest.mark.parametrize("shards", [1, None])
def test_cache_made_from_something_else_is_refused_by_the_field_and_left_alone(
    tmp_path, tree, other, named, shards
):
    write(tmp_path, shards=shards)
    before = tree(tmp_path)
    with pytest.raises(CacheError, match=named), CacheWriter(tmp_path, other, KEYS):
        pytest.fail("the folder was taken over")
    assert tree(tmp_path) == before


def test_folder_with_other_things_is_refused_and_left_alone(tmp_path, tree):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds other files \(thesis.txt\) and no cache"):
        write(tmp_path)
    assert list(tree(tmp_path)) == ["thesis.txt"]


def test_shards_of_other_keys_do_not_count_as_done(tmp_path):
    write(tmp_path, shards=2)
    with CacheWriter(tmp_path, MANIFEST_5, KEYS[1:]) as writer:
        assert [shard.number for shard in writer.missing_shards()] == [0, 1, 2]
    with CacheWriter(tmp_path, MANIFEST_5, KEYS[:4]) as writer:
        assert writer.missing_shards() == []


@pytest.mark.parametrize("change", [lambda r: r[1:], lambda r: [*r, r[0]], lambda r: [*r[1:], r[1]]])
def test_records_must_be_those_of_the_shards_keys(tmp_path, change):
    with CacheWriter(tmp_path, MANIFEST_5, KEYS) as writer:
        first, *_ = writer.missing_shards()
        with pytest.raises(ValueError, match="records of shard 0 are not those of its keys"):
            writer.write_shard(first, change(records_of(first.keys)))
        assert writer.missing_shards()[0] == first


def test_quarantined_records_have_reasons_and_move_no_other_id(tmp_path, build_cache):
    bad = (("clip/1", 0), ("clip/1", 1), ("clip/3", 1))
    expected = build_cache(tmp_path / "cache", bad=bad)
    cache = open_cache(tmp_path / "cache")
    assert cache.clip_ids == ["clip/0", "clip/2", "clip/3", "clip/4"]
    assert cache.manifest.num_records == 7 and cache.manifest.num_quarantined == 3
    for key, array in expected.items():
        assert np.array_equal(cache.read(key[0], view=key[1]), array)
    listed = json.loads((tmp_path / "cache" / QUARANTINE).read_text())
    assert listed == [{"clip_id": clip, "view": view, "reason": "unreadable"} for clip, view in bad]
    for clip, view in bad:
        assert (clip, view) not in cache
        with pytest.raises(CacheError, match=f"holds no view {view} of clip '{clip}'"):
            cache.read(clip, view=view)


def test_cache_may_be_all_quarantine(tmp_path, build_cache):
    build_cache(tmp_path / "cache", bad=tuple(KEYS))
    cache = open_cache(tmp_path / "cache")
    assert cache.clip_ids == [] and cache.manifest.num_quarantined == 10
    assert list(cache.verify()) == []


def test_array_that_cannot_be_encoded_is_quarantined(tmp_path):
    with CacheWriter(tmp_path, MANIFEST_5, KEYS) as writer:
        for shard in writer.missing_shards():
            records = records_of(shard.keys)
            if shard.number == 1:
                records[2] = Record(records[2].key, np.full(SHAPE, np.nan))
            writer.write_shard(shard, records)
        assert writer.finish().num_quarantined == 1
    (entry,) = json.loads((tmp_path / QUARANTINE).read_text())
    assert (entry["clip_id"], entry["view"]) == KEYS[6]
    assert entry["reason"].startswith("latents hold NaN")


def test_shard_of_which_nothing_can_be_encoded_stops_the_build(tmp_path):
    """One bad clip is an accident; all of them are a broken teacher, and no night shall be lost to it."""
    with (
        CacheWriter(tmp_path, MANIFEST_5, KEYS) as writer,
        pytest.raises(CacheError, match=r"nothing of shard 0 can be encoded; clip 'clip/0', view 0: latents"),
    ):
        first, *_ = writer.missing_shards()
        writer.write_shard(first, [Record(key, np.full(SHAPE, np.inf)) for key in first.keys])
    assert not (tmp_path / JOURNAL).exists() and not list((tmp_path / "shards").iterdir())


HOLDER = """
import sys
from pathlib import Path
from salt_vla.cache import CacheWriter, Manifest
manifest = Manifest("latents", "float16", (3, 4), 2, 4, {"teacher": "t", "clip_table": "c"})
keys = [(f"clip/{clip}", view) for clip in range(5) for view in range(2)]
with CacheWriter(Path(sys.argv[1]), manifest, keys):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_builder_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"
        second = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert second.returncode == 1 and "another process is building" in second.stderr.splitlines()[-1]
        with pytest.raises(CacheError, match=r"another process is building .*; wait for it or choose"):
            write(tmp_path)
        holder.kill()
        holder.wait()
    assert write(tmp_path) == [0, 1, 2]


def test_finished_cache_needs_no_lock(tmp_path):
    """Runs that start together on one finished cache must not take each other for builders."""
    write(tmp_path)
    with (
        CacheWriter(tmp_path, MANIFEST_5, KEYS) as first,
        CacheWriter(tmp_path, MANIFEST_5, KEYS) as second,
    ):
        assert first.missing_shards() == second.missing_shards() == []
        assert first.finish() == second.finish() == Manifest.read(tmp_path)
        assert not (tmp_path / LOCK).exists()


def test_cache_finished_by_the_holder_of_the_lock_is_no_reason_to_wait(tmp_path):
    write(tmp_path)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert write(tmp_path) == []
