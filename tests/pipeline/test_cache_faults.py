"""Disks that fill up, bytes that flip, files that vanish: a sentence that names what is wrong, never a wrong
number, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, CorruptRecord, Manifest, Record, open_cache
from salt_vla.cache.format import INDEX, INDEX_PAGES, MANIFEST, PROBE, QUARANTINE
from salt_vla.cache.verify import Finding
from salt_vla.errors import CacheError, ResourceError
from salt_vla.jobs.cache_repair import repair_cache
from salt_vla.jobs.cache_verify import verify_cache

CLIPS = [f"clip/{clip}" for clip in range(9)]
KEYS = [(clip, view) for clip in CLIPS for view in range(2)]
LOST = ("clip/5", 1)
PER_SHARD = 4
SMALL = Manifest("latents", "int8", (6, 10), 2, PER_SHARD, {"teacher": "t"})
WIDE = Manifest("latents", "float16", (512, 1024), 2, PER_SHARD, {"teacher": "t"})  # 1 MiB a record
Before = Callable[[int], None]


def build(
    folder: Path, manifest: Manifest = SMALL, before_shard: Before = id, before_end: Callable[[], None] = dict
) -> list[int]:
    """Build, or go on building; the shards that were made."""
    made = []
    with CacheWriter(folder, manifest, CLIPS) as writer:
        if not writer.is_complete():
            writer.write_probe(b"a probe")
        for shard in writer.pending():
            before_shard(shard.number)
            writer.write_shard(shard, (_record(key, manifest) for key in shard.keys))
            made.append(shard.number)
        before_end()
        writer.finish()
    return made


def _record(key: tuple[str, int], manifest: Manifest) -> Record:
    if key == LOST:
        return Record(key, None, "the file ends early")
    return Record(key, np.random.default_rng(KEYS.index(key)).normal(size=manifest.shape))


@pytest.fixture
def cache(place: Path) -> Path:
    build(place / "cache")
    return place / "cache"


# Disks that fill up


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a disk; the tests with a limit on file sizes still run")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, pages: int) -> Path:
    """Leave so many free pages on a disk, with a file in their way."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail - pages
    with ballast.open("wb") as file:
        if free:
            os.posix_fallocate(file.fileno(), 0, free * os.statvfs(disk).f_frsize)
    assert os.statvfs(disk).f_bavail == pages
    return ballast


def refusal(act: Callable[[], object]) -> str:
    """The sentence of a disk that is full."""
    with pytest.raises(ResourceError) as caught:
        act()
    said = str(caught.value)
    assert said.endswith("; make space or choose another folder") and "\n" not in said
    return said


def is_whole(folder: Path, tree: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Nothing but files of the whole cache, or a manifest and lease that say it is unfinished."""
    now = {name: content for name, content in tree.items() if not name.startswith(".leases/")}
    return all(content == whole[name] or name == MANIFEST for name, content in now.items())


def test_a_disk_that_fills_up_with_records_is_a_sentence(tmp_path: Path, disk: Path, tree: Any) -> None:
    """64 MB, of which 10 are left: the third shard of 4 MB no longer fits."""
    build(tmp_path / "whole", WIDE)
    ballast = fill(disk, 10 * 256)
    made: list[int] = []
    said = refusal(lambda: build(disk / "cache", WIDE, made.append))
    assert said.startswith(f"cannot write {disk}/cache/shards/000002.bin: No space left on device")
    assert made == [0, 1, 2]
    whole = tree(tmp_path / "whole")
    assert is_whole(disk / "cache", tree(disk / "cache"), whole)
    assert len(list((disk / "cache" / "shards").iterdir())) == 2
    ballast.unlink()
    assert build(disk / "cache", WIDE) == [2, 3, 4]
    assert tree(disk / "cache") == whole


def test_a_disk_that_fills_up_at_the_end_names_the_file_and_the_build_goes_on(
    cache: Path, disk: Path, tree: Any
) -> None:
    """From no page on: quarantine, index, its checksums and the manifest are each the first not to fit."""
    whole, named = tree(cache), set()
    for pages in range(16):
        folder = disk / f"cache{pages}"
        try:
            build(folder, before_end=lambda pages=pages: fill(disk, pages))
        except ResourceError as error:
            file = str(error).removeprefix(f"cannot write {folder}/").partition(":")[0]
            named.add(file)
            assert "No space left on device; make space" in str(error)
            assert is_whole(folder, tree(folder), whole)
            with pytest.raises(CacheError, match="is unfinished"):
                open_cache(folder)
            (disk / "ballast").unlink()
            assert build(folder) == []
        else:
            (disk / "ballast").unlink()
        assert tree(folder) == whole
    assert named == {QUARANTINE, INDEX, INDEX_PAGES, MANIFEST}


def test_a_disk_that_is_full_from_the_start_is_a_sentence(disk: Path) -> None:
    ballast = fill(disk, 0)
    assert f"cannot write {disk}/cache" in refusal(lambda: build(disk / "cache"))
    ballast.unlink()
    assert build(disk / "cache") == [0, 1, 2, 3, 4]


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may become larger, which a full disk looks like to a process that may mount none."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("size", "file", "again"),
    [(300, MANIFEST, 5), (900, "shards/000000.bin", 5), (1200, INDEX, 0)],
    ids=["manifest", "shard", "index"],
)
def test_files_that_may_not_grow_are_a_sentence_and_the_build_goes_on(
    cache: Path, tmp_path: Path, tree: Any, size: int, file: str, again: int
) -> None:
    whole, folder = tree(cache), tmp_path / "other"
    with files_up_to(size):
        said = refusal(lambda: build(folder))
    assert said.startswith(f"cannot write {folder}/{file}: File too large")
    assert is_whole(folder, tree(folder), whole) or not tree(folder)
    assert len(build(folder)) == again
    assert tree(folder) == whole


def test_a_repair_that_finds_no_space_leaves_the_cache_as_it_is(cache: Path, tree: Any) -> None:
    flip(cache / "shards/000001.bin", -30)
    before = tree(cache)
    with files_up_to(600):
        said = refusal(lambda: repair_cache(cache))
    assert said.startswith(f"cannot write {cache}/shards/000001.bin: File too large")
    after = {name: content for name, content in tree(cache).items() if not name.startswith(".leases/")}
    assert after == before
    assert repair_cache(cache).left == []


def without_privileges(act: Callable[[], object]) -> str:
    """What `act` gives, or how it refuses, in a process that may write nothing here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            said = str(act())
        except ResourceError as error:
            said = str(error)
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return answer.read()


def test_a_cache_that_may_not_be_written_is_verified_and_a_repair_says_so(cache: Path, tree: Any) -> None:
    for path in (cache / "shards", cache):
        path.chmod(0o555)
    assert without_privileges(lambda: verify_cache(cache).bad) == "()"
    assert without_privileges(lambda: repair_cache(cache).left) == "[]"
    for name, offset in (("shards/000001.bin", -30), (QUARANTINE, 2)):
        flip(cache / name, offset)
        before = tree(cache)
        said = without_privileges(lambda: repair_cache(cache))
        assert said.startswith(f"cannot write {cache}") and said.endswith("choose another folder")
        assert "permission denied" in said and tree(cache) == before
        flip(cache / name, offset)


# Bytes that flip


def flip(path: Path, at: int, difference: int = 1) -> None:
    """Change one byte in place; twice is as it was."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        old = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ difference]))


def place_of(file: str, at: int) -> tuple[str, int, str, int | None]:
    """(clip, view, file, offset) that a damaged byte is to be named by; None: of the file as a whole."""
    if not file.startswith("shards/"):
        return "", -1, file, None
    size = SMALL.record.record_bytes
    first = PER_SHARD * int(Path(file).stem)
    keys = KEYS[first : first + PER_SHARD]
    slot = at // size
    return (*keys[slot], file, slot * size) if slot < len(keys) else ("", -1, file, len(keys) * size)


def test_every_flipped_byte_is_found_and_named_and_no_reading_gives_another_value(
    cache: Path, tree: Any, times: Callable[[int, int], int]
) -> None:
    """1,000 single bytes of all files (20,000 in the long form), by any bits of theirs."""
    rng = random.Random(6)
    whole = open_cache(cache)
    right = {key: whole.read(key[0], view=key[1]) for key in whole.keys()}  # noqa: SIM118
    files = {name: len(content) for name, content in tree(cache).items()}
    count, refused = times(1000, 20_000), 0
    for number in range(count):
        # Each file in turn, so that small ones get their share too.
        name = sorted(files)[number % len(files)]
        at, difference = rng.randrange(files[name]), rng.randrange(1, 256)
        flip(cache / name, at, difference)
        found = {(bad.clip_id, bad.view, bad.file, bad.offset) for bad in verify_cache(cache).bad}
        clip_id, view, file, offset = place_of(name, at)
        if offset is None:
            assert {place[:3] for place in found} == {(clip_id, view, file)}, (name, at, difference)
        else:
            assert found == {(clip_id, view, file, offset)}, (name, at, difference)
        refused += not _read_all(cache, right)
        flip(cache / name, at, difference)
    assert verify_cache(cache).bad == ()
    assert count / 4 < refused < count
    print(
        f"{count} flipped bytes in {len(files)} files: all found and named; {refused} caches refused to open"
    )


def _read_all(cache: Path, right: dict[tuple[str, int], np.ndarray]) -> bool:
    """Read everything: right values or an error, nothing else. Whether the cache could be opened."""
    try:
        opened = open_cache(cache)
    except CacheError as error:
        assert str(cache) in str(error)
        return False
    for (clip_id, view), array in right.items():
        try:
            assert np.array_equal(opened.read(clip_id, view=view), array)
        except CacheError as error:
            assert str(cache) in str(error)
    return True


@pytest.fixture
def many(place: Path) -> Path:
    """3,000 clips in 4 shards, whose ids alone take more than two pages of the index."""
    clips = [f"a clip whose name is not short at all, number {number:06d}" for number in range(3000)]
    manifest = Manifest("latents", "float16", (1, 2), 1, 750, {"teacher": "t"})
    with CacheWriter(place / "many", manifest, clips) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, np.ones((1, 2))) for key in shard.keys))
        writer.finish()
    return place / "many"


def test_damage_in_an_index_of_many_pages_is_named_by_its_page(many: Path) -> None:
    for at in (0, 65_535, 65_536, 140_000):
        flip(many / INDEX, at)
        (bad,) = verify_cache(many).bad
        assert (bad.file, bad.offset) == (INDEX, at // 65_536 * 65_536)
        flip(many / INDEX, at)
    assert verify_cache(many).bad == ()


def test_an_index_damaged_in_one_page_still_tells_what_a_lost_footer_said(many: Path, tree: Any) -> None:
    """Of the other pages' clips; of those on the page itself nobody knows."""
    whole = tree(many)
    flip(many / INDEX, 100_000)
    flip(many / "shards/000003.bin", -3)
    bad = verify_cache(many).bad
    assert [b.file for b in bad] == [INDEX, "shards/000003.bin"]
    assert "number 002250' to " in bad[1].reason
    assert repair_cache(many).left == []
    assert tree(many) == whole
    flip(many / INDEX, 100_000)
    flip(many / "shards/000001.bin", -3)
    assert [b.file for b in repair_cache(many).left] == [INDEX, "shards/000001.bin"]
    assert (many / "shards/000001.bin").read_bytes() != whole["shards/000001.bin"]


# Files that shrink, vanish or come from elsewhere


def test_a_truncated_shard_is_an_error_wherever_it_ends(cache: Path) -> None:
    """Also in a cache that is open already: no reading is a bus error."""
    shard = cache / "shards/000001.bin"
    content, size = shard.read_bytes(), SMALL.record.record_bytes
    opened = open_cache(cache, check="always")
    for end in [0, 1, size - 1, size, 2 * size + 5, 4 * size, len(content) - 1]:
        os.truncate(shard, end)
        there = end // size
        for slot, key in enumerate(KEYS[4:8]):
            if slot < there:
                opened.read(key[0], view=key[1])
            else:
                with pytest.raises(CorruptRecord, match=rf"{key[0]}.* truncated"):
                    opened.read(key[0], view=key[1])
        bad = verify_cache(cache).bad
        assert [(b.clip_id, b.view) for b in bad] == [("", -1), *KEYS[4 + there : 8]]
        assert {b.file for b in bad} == {"shards/000001.bin"}
        assert "'clip/2' to 'clip/3'" in bad[0].reason
        shard.write_bytes(content)
    shard.unlink()
    bad = verify_cache(cache).bad
    assert [(b.clip_id, b.view) for b in bad] == [("", -1), *KEYS[4:8]]
    assert {b.reason for b in bad[1:]} == {"the shard is missing"}
    assert [b.file for b in verify_cache(cache, 1).bad][:1] == ["shards/000001.bin"], "also of a sample"


def test_a_lost_shard_of_nothing_but_quarantine_is_missed_and_needs_no_teacher(
    place: Path, tree: Any
) -> None:
    with CacheWriter(place / "cache", SMALL, CLIPS) as writer:
        for shard in writer.pending():
            records = (
                Record(key, None, "lost") if shard.number == 1 else _record(key, SMALL) for key in shard.keys
            )
            writer.write_shard(shard, records)
        writer.finish()
    whole = tree(place / "cache")
    (place / "cache/shards/000001.bin").unlink()
    (bad,) = verify_cache(place / "cache").bad
    assert (bad.file, bad.clip_id) == ("shards/000001.bin", "") and "is missing" in bad.reason
    assert repair_cache(place / "cache").left == []
    assert tree(place / "cache") == whole


@pytest.mark.parametrize("name", [MANIFEST, INDEX, INDEX_PAGES, QUARANTINE])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.9])
def test_a_file_that_was_deleted_or_half_written_is_named_and_written_again(
    cache: Path, tree: Any, name: str, share: float | None
) -> None:
    """By a repair, without a teacher, and by a build; both in the same bytes."""
    whole = tree(cache)
    for mend in (lambda: repair_cache(cache), lambda: build(cache)):
        if share is None:
            (cache / name).unlink()
        else:
            os.truncate(cache / name, int(share * len(whole[name])))
        assert {bad.file for bad in verify_cache(cache).bad} == {name}
        if name != QUARANTINE:  # Which nothing but `verify` looks at.
            with pytest.raises(CacheError, match=str(cache)):
                open_cache(cache)
        mend()
        assert tree(cache) == whole


def test_manifest_and_index_both_lost_leave_shards_that_know_what_they_are(cache: Path, tree: Any) -> None:
    whole = tree(cache)
    for name in (MANIFEST, INDEX, INDEX_PAGES, QUARANTINE):
        (cache / name).unlink()
    report = verify_cache(cache)
    assert report.records == 17 and not report.is_complete
    assert [bad.file for bad in report.bad] == [MANIFEST]
    assert repair_cache(cache).left == []
    assert tree(cache) == whole


@pytest.mark.parametrize(("version", "word"), [(3, "newer"), (1, "older")])
def test_a_cache_of_another_version_is_refused_not_called_damaged(
    cache: Path, tree: Any, version: int, word: str
) -> None:
    said = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).write_text(json.dumps(said | {"schema_version": version, "checksum": "?"}))
    before = tree(cache)
    for act in (open_cache, verify_cache, repair_cache, build):
        with pytest.raises(CacheError, match=rf"schema version {version}, {word} than"):
            act(cache)
    assert tree(cache) == before


def test_where_there_is_no_cache_nothing_is_verified(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(CacheError, match=f"there is no cache at {folder}"):
            verify_cache(folder)


def test_shards_of_another_cache_or_another_place_are_told_apart(cache: Path, tmp_path: Path) -> None:
    other = Manifest("latents", "int8", (6, 10), 2, PER_SHARD, {"teacher": "u"})
    build(tmp_path / "other", other)
    first, second = cache / "shards/000000.bin", cache / "shards/000001.bin"
    said = {tmp_path / "other/shards/000000.bin": "another cache (provenance.teacher: 'u' here, 't' wanted)"}
    for stranger, what in (said | {second: "this is shards/000001.bin, in another place"}).items():
        content = first.read_bytes()
        shutil.copy(stranger, first)
        bad = verify_cache(cache).bad
        assert bad[0] == Finding("", -1, "shards/000000.bin", 4 * SMALL.record.record_bytes, bad[0].reason)
        assert what in bad[0].reason
        first.write_bytes(content)
    assert verify_cache(cache).bad == ()


def test_an_index_that_is_sound_but_of_an_earlier_build_is_found_and_mended(
    cache: Path, tmp_path: Path, tree: Any
) -> None:
    """As a repair leaves it that was killed between a shard and the index."""
    stale = {name: (cache / name).read_bytes() for name in (MANIFEST, INDEX, INDEX_PAGES)}
    (cache / "shards/000000.bin").unlink()
    with CacheWriter(cache, SMALL, CLIPS) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, np.ones((6, 10))) for key in shard.keys))
        writer.finish()
    whole = tree(cache)
    for name, content in stale.items():
        (cache / name).write_bytes(content)
    bad = verify_cache(cache).bad
    assert [(b.clip_id, b.view, b.file) for b in bad] == [(*key, INDEX) for key in KEYS[:4]]
    assert [b.file for b in verify_cache(cache, 1).bad] == [INDEX] * 4, "also of a sample"
    with pytest.raises(CorruptRecord):
        open_cache(cache).read("clip/0")
    assert repair_cache(cache).left == []
    assert tree(cache) == whole


def test_bytes_in_the_slot_of_a_quarantined_record_are_found_and_cleared(cache: Path, tree: Any) -> None:
    whole, size = tree(cache), SMALL.record.record_bytes
    flip(cache / "shards/000002.bin", 3 * size + 7)
    (bad,) = verify_cache(cache).bad
    assert (bad.clip_id, bad.view, bad.offset) == (*LOST, 3 * size)
    assert "is to be empty" in bad.reason
    assert repair_cache(cache).left == []
    assert tree(cache) == whole


# Verifying in parts, and what is unfinished


def test_a_sample_looks_at_so_many_records_and_at_everything_else(cache: Path) -> None:
    seen = {}
    for seed in range(8):
        for sample, most in ((5, 5), (0.25, 5), (400, 18)):
            report = verify_cache(cache, sample, seed)
            assert most - 1 <= report.records <= most and report.bad == ()
    for slot in range(4):
        flip(cache / "shards/000001.bin", slot * SMALL.record.record_bytes)
    for seed in range(20):
        seen[seed] = tuple((bad.clip_id, bad.view) for bad in verify_cache(cache, 6, seed).bad)
        assert seen[seed] == tuple((bad.clip_id, bad.view) for bad in verify_cache(cache, 6, seed).bad)
    assert len(set(seen.values())) > 3 and all(len(found) <= 4 for found in seen.values())
    flip(cache / "shards/000003.bin", -3)
    flip(cache / INDEX, 9)
    assert {"shards/000003.bin", INDEX} <= {bad.file for bad in verify_cache(cache, 1).bad}


@pytest.mark.parametrize("sample", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_a_sample_that_is_neither_share_nor_number_is_refused(cache: Path, sample: float) -> None:
    with pytest.raises(Exception, match="a sample is a share"):
        verify_cache(cache, sample)


def test_of_an_unfinished_cache_what_is_there_is_verified_and_that_is_said(tmp_path: Path) -> None:
    def stop(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", before_shard=stop)
    report = verify_cache(tmp_path / "cache")
    assert (report.records, report.bad, report.is_complete) == (11, (), False)
    assert report.unfinished.startswith("the cache is unfinished: 3 of 5 shards are there")
    flip(tmp_path / "cache/shards/000001.bin", 100)
    flip(tmp_path / "cache/shards/000002.bin", -5)
    bad = verify_cache(tmp_path / "cache").bad
    assert [(b.clip_id, b.file) for b in bad] == [
        ("clip/2", "shards/000001.bin"),
        ("", "shards/000002.bin"),
    ]
    assert build(tmp_path / "cache") == [2, 3, 4]
    assert [b.clip_id for b in verify_cache(tmp_path / "cache").bad] == ["clip/2"]


def test_verifying_keeps_one_record_in_memory(place: Path) -> None:
    """A shard of 128 MiB within 80 MiB of address space more than the program itself takes."""
    wide = Manifest("latents", "float16", (1024, 4096), 2, 16, {"teacher": "t"})  # 8 MiB a record
    with CacheWriter(place / "cache", wide, [f"clip/{n}" for n in range(8)]) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, np.zeros(wide.shape, np.float16)) for key in shard.keys))
        writer.finish()
    code = """
import resource, sys
from pathlib import Path
from salt_vla.jobs.cache_verify import verify_cache
import pyarrow, numpy
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20,) * 2)
report = verify_cache(Path(sys.argv[1]))
assert report.bad == () and report.records == 16 and report.num_bytes == 2**27
"""
    command = [sys.executable, "-c", code, str(place / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_of_a_caches_small_files_are_among_those_that_were_damaged_here(cache: Path, tree: Any) -> None:
    small = {name for name in tree(cache) if not name.startswith("shards/")}
    assert small == {MANIFEST, INDEX, INDEX_PAGES, QUARANTINE, PROBE}
