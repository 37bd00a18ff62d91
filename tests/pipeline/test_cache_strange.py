"""Files that are whole and lie in the wrong place, and things that are no files: each says of itself what it
is, and a repair without a teacher neither writes over it nor believes what lies beside it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Manifest, Record, open_cache
from salt_vla.cache.format import INDEX, INDEX_PAGES, MANIFEST, PROBE, QUARANTINE, checksum
from salt_vla.cache.mend import rewrite_shard
from salt_vla.cache.shards import read_footer
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.jobs.cache_repair import repair_cache
from salt_vla.jobs.cache_verify import verify_cache

CLIPS = [f"clip/{clip}" for clip in range(10)]
SMALL = Manifest("latents", "float16", (3, 4), 2, 4, {"teacher": "t", "fingerprint": "t"})  # five shards
LOST = ("clip/5", 1)


def build(folder: Path, teacher: str = "t") -> Path:
    made_of = replace(SMALL, provenance={"teacher": teacher, "fingerprint": teacher})
    with CacheWriter(folder, made_of, CLIPS) as writer:
        if not writer.is_complete():
            writer.write_probe(f"the probe of {teacher}".encode())
        for shard in writer.pending():
            writer.write_shard(shard, (_record(key, teacher) for key in shard.keys))
        writer.finish()
    return folder


def _record(key: tuple[str, int], teacher: str) -> Record:
    clip, view = int(key[0][5:]), key[1]
    seed = np.random.default_rng([clip, view, ord(teacher)])
    return Record(key, None, "cut off") if key == LOST else Record(key, seed.normal(size=SMALL.shape))


@pytest.fixture
def cache(place: Path) -> Path:
    return build(place / "cache")


@pytest.fixture
def other(place: Path) -> Path:
    """The same clips' latents of another teacher."""
    return build(place / "other", "u")


def shard(cache: Path, number: int) -> Path:
    return cache / f"shards/{number:06d}.bin"


def name(cache: Path, places: dict[int, int]) -> None:
    """Rename shards: {number: place}."""
    contents = {place: shard(cache, number).read_bytes() for number, place in places.items()}
    for number in places:
        shard(cache, number).unlink()
    for place, content in contents.items():
        shard(cache, place).write_bytes(content)


@pytest.mark.parametrize(
    "files",
    [[MANIFEST, INDEX, INDEX_PAGES, QUARANTINE], [INDEX, INDEX_PAGES], [MANIFEST], [MANIFEST, "no index"]],
    ids=str,
)
def test_shards_that_agree_are_right_against_the_files_of_another_cache(
    cache: Path, other: Path, tree: Any, files: list[str]
) -> None:
    """As a backup leaves it that was laid over the wrong folder."""
    whole = tree(cache)
    for file in {INDEX, INDEX_PAGES, MANIFEST} if "no index" in files else {MANIFEST}:
        (cache / file).unlink()
    for file in files[:1] if "no index" in files else files:
        shutil.copy(other / file, cache / file)
    bad = verify_cache(cache).bad
    what = (
        "it is another cache's, of which there is not one shard here (provenance.fingerprint: 'u' here, 't'"
    )
    assert any(finding.reason.startswith(what) for finding in bad)
    assert not any(finding.file.startswith("shards") for finding in bad), "no shard is called damaged"
    before = tree(cache / "shards")
    assert verify_cache(cache).unfinished == "", "a build, which that would be a case for, would refuse it"
    report = repair_cache(cache)
    assert report.left == [] and report.is_complete and tree(cache / "shards") == before
    assert tree(cache) == whole


def test_another_caches_probe_is_not_taken_for_this_ones(cache: Path, other: Path, tree: Any) -> None:
    """Only the teacher can make it anew; until then the cache is not finished."""
    for file in (MANIFEST, INDEX, INDEX_PAGES, QUARANTINE, PROBE):
        shutil.copy(other / file, cache / file)
    before = tree(cache)
    report = repair_cache(cache)
    assert {finding.file for finding in report.left} == {MANIFEST, PROBE}
    assert not report.is_complete and tree(cache) == before


@pytest.mark.parametrize("has_index", [True, False], ids=["with its index", "manifest and index lost"])
@pytest.mark.parametrize("places", [{1: 3, 3: 1}, {0: 2, 2: 4, 4: 0}, {0: 1, 1: 0, 2: 3, 3: 2}], ids=str)
def test_exchanged_shards_are_put_back_in_their_places(
    cache: Path, tree: Any, places: dict[int, int], has_index: bool
) -> None:
    whole = tree(cache)
    name(cache, places)
    for file in [] if has_index else [MANIFEST, INDEX, INDEX_PAGES]:
        (cache / file).unlink()
    named = {finding.reason.split(",")[0] for finding in verify_cache(cache).bad if not finding.clip_id}
    if has_index:
        assert named == {f"this is shards/{number:06d}.bin" for number in places}
    report = repair_cache(cache)
    assert sorted(report.moved) == [f"shards/{number:06d}.bin" for number in sorted(places)]
    assert report.left == [] and report.failed == {} and tree(cache) == whole
    assert "put in their places: shards/00000" in report.summary


def test_a_shard_is_moved_to_an_empty_place_and_what_it_leaves_behind_is_named(cache: Path) -> None:
    """A lost one that another took the name of is not there, whatever lies in its place."""
    right = shard(cache, 3).read_bytes()
    shard(cache, 3).rename(shard(cache, 1))
    report = repair_cache(cache)
    assert report.moved == ["shards/000003.bin"] and shard(cache, 3).read_bytes() == right
    assert {finding.file for finding in report.left} == {"shards/000001.bin"}
    assert len(report.failed) == 4 and not shard(cache, 1).exists()


def test_an_exchange_that_was_killed_halfway_is_found_and_ended(cache: Path, tree: Any) -> None:
    """Or done in another way in the meantime, by a build; then the one set aside is superfluous."""
    whole = tree(cache)
    aside = cache / "shards/aside-000003.bin"
    content = shard(cache, 1).read_bytes()
    shard(cache, 1).rename(aside)
    shard(cache, 3).rename(shard(cache, 1))
    assert {finding.file for finding in verify_cache(cache).bad} == {f"shards/{n:06d}.bin" for n in (1, 3)}
    assert repair_cache(cache).left == [] and tree(cache) == whole
    aside.write_bytes(content)
    assert repair_cache(cache).left == [] and tree(cache) == whole
    aside.write_bytes(content)
    os.truncate(shard(cache, 1), 5)
    repair_cache(cache)
    assert aside.read_bytes() == content, "while its place is damaged it is all that there is"


def test_a_whole_shard_of_another_cache_is_never_written_over(cache: Path, other: Path, tree: Any) -> None:
    shutil.copy(shard(other, 2), shard(cache, 2))
    before = tree(cache)
    report = repair_cache(cache)
    assert {finding.file for finding in report.left} == {"shards/000002.bin"}
    assert "move it away" in report.failed["clip/4", 0] and tree(cache) == before


def test_what_a_cache_is_most_of_its_shards_say(cache: Path, other: Path, place: Path, tree: Any) -> None:
    """The first one may be another's; nothing is written before all of them have been looked at."""
    whole = tree(cache)
    for file in (MANIFEST, INDEX, INDEX_PAGES, QUARANTINE):
        (cache / file).unlink()
    own = shard(cache, 0).rename(place / "own.bin")
    shutil.copy(shard(other, 0), shard(cache, 0))
    before = tree(cache)
    report = repair_cache(cache)
    assert [(finding.file, finding.reason.split(";")[0][:38]) for finding in report.left] == [
        (MANIFEST, "the file is missing"),
        ("shards/000000.bin", "this is a whole shard of another cache"),
    ]
    assert tree(cache) == before and "cache build" not in report.summary
    shutil.copy(own, shard(cache, 0))
    assert repair_cache(cache).left == [] and tree(cache) == whole


def quarantine_all(cache: Path, number: int) -> None:
    """A footer, its checksum right, that knows of no record; the bytes stay."""
    content = shard(cache, number).read_bytes()
    footer = read_footer(shard(cache, number))
    empty = replace(footer, checksums=(None,) * 4, reasons=("lost",) * 4)
    records = content[: 4 * SMALL.record.record_bytes]
    shard(cache, number).write_bytes(records + empty.to_bytes())


def test_where_footer_and_index_differ_the_bytes_decide(cache: Path, tree: Any) -> None:
    """Nothing is cleared that a sound index knows as a record."""
    whole = tree(cache)
    quarantine_all(cache, 1)
    bad = verify_cache(cache).bad
    assert {finding.file for finding in bad} == {"shards/000001.bin"} and len(bad) == 4
    assert all("does not say of this record what index.arrow says" in finding.reason for finding in bad)
    assert len(verify_cache(cache, 1).bad) == 4, "also of a sample"
    report = repair_cache(cache)
    assert report.left == [] and report.files == ["shards/000001.bin"] and tree(cache) == whole


def test_a_damaged_record_that_its_footer_does_not_know_is_named_not_cleared(cache: Path) -> None:
    quarantine_all(cache, 1)
    content = bytearray(shard(cache, 1).read_bytes())
    content[5] ^= 1
    shard(cache, 1).write_bytes(content)
    report = repair_cache(cache)
    (left,) = report.left
    assert (left.clip_id, left.view) == ("clip/2", 0) and "checksum does not match" in left.reason
    assert shard(cache, 1).read_bytes()[: SMALL.record.record_bytes] == content[: SMALL.record.record_bytes]


def test_a_record_that_came_out_of_quarantine_is_not_put_back_by_an_older_index(
    cache: Path, tree: Any
) -> None:
    """The other way round: the bytes are what the footer says."""
    footer, path = read_footer(shard(cache, 2)), shard(cache, 2)
    slot = footer.keys.index(LOST)
    array = np.ones(SMALL.shape)
    blob = SMALL.record.encode(array)
    sums, reasons = list(footer.checksums), list(footer.reasons)
    sums[slot], reasons[slot] = checksum(blob), ""
    known = replace(footer, checksums=tuple(sums), reasons=tuple(reasons))
    rewrite_shard(path, known, {slot: blob}, frozenset(), SMALL.record, lambda: None)
    after = path.read_bytes()
    assert [finding.file for finding in verify_cache(cache).bad] == [INDEX]
    assert repair_cache(cache).left == [] and path.read_bytes() == after
    assert np.array_equal(open_cache(cache).read(LOST[0], view=LOST[1]), array)


@pytest.fixture
def impatient() -> Iterator[None]:
    """Who waits for a pipe that nobody writes to waits for ever; here for ten seconds."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("file", [MANIFEST, INDEX, INDEX_PAGES, QUARANTINE, PROBE, "shards/000001.bin"])
def test_a_pipe_in_a_files_place_is_a_finding(cache: Path, impatient: None, file: str) -> None:
    """And left to a person: who made it there is not known."""
    (cache / file).unlink()
    os.mkfifo(cache / file)
    assert file in {finding.file for finding in verify_cache(cache).bad}
    if file in (PROBE, "shards/000001.bin"):
        assert {finding.file for finding in repair_cache(cache).left} == {file}
    else:
        with pytest.raises(ResourceError, match=f"cannot write {cache / file}: it is a device or a pipe"):
            repair_cache(cache)


def test_a_seed_below_zero_is_refused_in_a_sentence(cache: Path) -> None:
    with pytest.raises(ConfigError, match="a seed is 0 or more, not -1"):
        verify_cache(cache, 0.5, seed=-1)


# Repairs copies of a cache, each in a child that dies before its n-th touch of the copy; then once more.
EVERY_MOMENT = """
import os, shutil, signal, sys
from pathlib import Path
from salt_vla.jobs.cache_repair import repair_cache

broken, place, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.listdir"}

def repair_in_child(folder, moment):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and any(str(argument).startswith(str(folder)) for argument in arguments):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    os._exit(len(repair_cache(folder).left))

moment = 1
while True:
    folder = Path(shutil.copytree(broken, place / f"moment{moment}"))
    status = repair_in_child(folder, moment)
    assert repair_in_child(folder, 0) == 0, moment
    if not os.WIFSIGNALED(status):
        break
    moment += step
"""


def test_an_exchange_is_mended_whenever_its_repair_is_killed(
    cache: Path, place: Path, tree: Any, times: Callable[[int, int], int]
) -> None:
    whole = tree(cache)
    name(cache, {1: 3, 3: 4, 4: 1})
    (place / "copies").mkdir()
    step = times(7, 1)
    command = [sys.executable, "-c", EVERY_MOMENT, str(cache), str(place / "copies"), str(step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    folders = sorted((place / "copies").iterdir())
    assert len(folders) > 70 // step
    for folder in folders:
        assert tree(folder) == whole, folder
