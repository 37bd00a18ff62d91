"""Real processes that are killed, run out of disk or lack permission while they build a cache.

Whatever happens, the same command goes on, makes nothing again that was finished, and ends with the very
bytes of a build that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.cache.format import INDEX, MANIFEST, PROBE, QUARANTINE
from salt_vla.jobs.cache_verify import verify_cache

SHARDS = 4

# Builds 16 records in 4 shards at sys.argv[1]; appends each shard that it publishes to sys.argv[2].
BUILDER = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import numpy as np
from salt_vla.cache import CacheWriter, Manifest, Record
from salt_vla.cache.format import CacheError, shard_name
from salt_vla.cache.shards import read_footer
from salt_vla.errors import UserError

CLIPS = [f"clip/{clip}" for clip in range(8)]
KEYS = [(clip, view) for clip in CLIPS for view in range(2)]
MANIFEST = Manifest("latents", "int8", (6, 10), 2, 4, {"teacher": "t", "clip_table": "c"})

def record(key, pause):
    time.sleep(pause)
    if key == ("clip/5", 1):
        return Record(key, None, "the file ends early")
    return Record(key, np.random.default_rng(KEYS.index(key)).normal(size=(6, 10)))

def build(folder, made, pause=0.0, before_shard=lambda number: None, before_end=lambda: None):
    with CacheWriter(Path(folder), MANIFEST, CLIPS) as writer:
        if not writer.is_complete():
            writer.write_probe(b"a probe")
            writer.note({"cosine": 0.9995})
        for shard in writer.pending():
            before_shard(shard.number)
            assert writer.write_shard(shard, (record(key, pause) for key in shard.keys))
            with open(made, "a") as file:
                file.write(f"{shard.number} ")
        before_end()
        writer.finish()

def finished(folder):
    'Shards that are on disk and whole, and what would change if one were written again.'
    found = {}
    for number in range(4):
        path = Path(folder) / shard_name(number)
        try:
            read_footer(path)
            found[number] = (path.stat().st_ino, path.stat().st_mtime_ns)
        except (CacheError, FileNotFoundError):
            pass
    return found
"""


def run(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILDER + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def made_shards(log: Path) -> list[int]:
    return [int(number) for number in log.read_text().split()] if log.exists() else []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tree: Callable[[Path], dict[str, bytes]]):
    folder = tmp_path_factory.mktemp("unbroken")
    done = run("build(*sys.argv[1:])", folder / "cache", folder / "made")
    assert done.returncode == 0, done.stderr
    assert made_shards(folder / "made") == list(range(SHARDS))
    return tree(folder / "cache")


# Kills a builder after a random while, again and again, each time on what the last one has left; begins a
# new cache when one is finished. Prints (killed, shards finished before and after, those of them touched).
AT_RANDOM = """
rng = random.Random(int(sys.argv[3]))
kills, round_, patience = 0, 0, 0.05
while True:
    folder, log = f"{sys.argv[1]}/cache{round_}", f"{sys.argv[1]}/made{round_}"
    before = finished(folder)
    is_last = kills >= int(sys.argv[2])
    child = os.fork()
    if child == 0:
        os.close(1)
        build(folder, log, pause=0.0 if is_last else 0.003)
        os._exit(0)
    if not is_last:
        time.sleep(rng.uniform(0, patience))
        os.kill(child, signal.SIGKILL)
    killed = os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    after = finished(folder)
    touched = [number for number in before if before[number] != after.get(number)]
    print(json.dumps([killed, len(before), len(after), touched]), flush=True)
    kills += killed
    # As fast as this machine is now: some finish nothing, some a shard or two, few a whole cache.
    patience *= 0.7 if not killed else 1.3 if len(after) == len(before) else 1.0
    if not killed:
        round_ += 1
        if is_last:
            break
"""


def test_killed_at_random_moments_it_ends_byte_equal_and_nothing_is_made_twice(
    place: Path, tree, unbroken, times
) -> None:
    """kill -9 from outside, 20 times (200 in the long form)."""
    kills = times(20, 200)
    done = run(AT_RANDOM, place, kills, os.getpid())
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(killed for killed, *_ in rounds) == kills
    assert not any(touched for *_, touched in rounds), "a finished shard was written again"
    assert len({after for killed, _, after, _ in rounds if killed}) > 2, "all died at the same place"
    finished = list(place.glob("cache*"))
    for folder in finished:
        assert tree(folder) == unbroken
        log = made_shards(place / folder.name.replace("cache", "made"))
        # A builder may be killed between a shard and its line in the log, never the other way round.
        assert len(log) == len(set(log)), "a shard was made twice"
    print(f"{kills} builders killed with SIGKILL, {len(finished)} caches byte-equal to an unbroken one")


# Dies before the n-th time that it opens, renames, links, makes or removes something in the cache's folder,
# so also between a shard's rename and the lease's end, and between index and manifest. Then dies some more
# times, then finishes. Prints for each n which shards were finished, and which of them were touched later.
EVERY_MOMENT = """
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "os.listdir"}

def die_at(moment):
    count = 0
    def hook(event, arguments):
        nonlocal count
        paths = [str(argument) for argument in arguments if isinstance(argument, (str, Path))]
        if event in EVENTS and any(path.startswith(FOLDER) for path in paths):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def build_in_child(made, moment):
    child = os.fork()
    if child == 0:
        die_at(moment)
        build(FOLDER, made)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])

moment = int(sys.argv[2])
while True:
    FOLDER = f"{sys.argv[1]}/moment{moment}"
    killed = build_in_child(FOLDER + ".first", moment)
    if not killed:
        break
    before = finished(FOLDER)
    for again in range(int(sys.argv[3])):
        build_in_child(FOLDER + ".again", 5 + (7 * moment + 11 * again) % 31)
    build_in_child(FOLDER + ".last", 0)
    after = finished(FOLDER)
    touched = [number for number in before if before[number] != after[number]]
    print(json.dumps([moment, list(before), touched]), flush=True)
    moment += int(sys.argv[4])
"""


@pytest.mark.parametrize(("further_kills", "is_dense"), [(0, True), (2, False)], ids=["once", "thrice"])
def test_killed_between_any_two_touches_of_the_disk_it_ends_byte_equal(
    place: Path, tree, unbroken, times, further_kills: int, is_dense: bool
) -> None:
    step = times(2, 1) if is_dense else times(9, 1)
    done = run(EVERY_MOMENT, place, 1, further_kills, step)
    assert done.returncode == 0, done.stderr
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) * step > 80
    for moment, finished, touched in moments:
        folder = place / f"moment{moment}"
        assert tree(folder) == unbroken, f"killed at moment {moment}"
        assert touched == [], f"killed at moment {moment}, finished shards were written again"
        made = made_shards(Path(f"{folder}.again")) + made_shards(Path(f"{folder}.last"))
        assert not set(made) & set(finished) and len(made) == len(set(made))
    assert {len(finished) for _, finished, _ in moments} == set(range(SHARDS + 1))
    print(f"killed at {len(moments)} moments, {further_kills} more times each: byte-equal every time")


TERMINATED = """
from salt_vla.interrupts import stop_on_signals
with stop_on_signals() as stop:
    def check(number):
        if number == 2:
            os.kill(os.getpid(), int(sys.argv[3]))
        stop.check("while building")
    build(*sys.argv[1:3], before_shard=check)
"""


@pytest.mark.parametrize("number", [15, 1, 2], ids=["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_that_ask_to_stop_leave_whole_shards_and_no_lease(place, tree, unbroken, number) -> None:
    folder, log = place / "cache", place / "made"
    done = run(TERMINATED, folder, log, number)
    assert "Stopped: stopped by SIG" in done.stderr and done.returncode == 1
    assert made_shards(log) == [0, 1]
    assert not [name for name in tree(folder) if name.endswith(".part")]
    assert run("build(*sys.argv[1:])", folder, log, timeout=20).returncode == 0
    assert made_shards(log) == [0, 1, 2, 3]
    assert tree(folder) == unbroken


UNPRIVILEGED = """
if os.geteuid() == 0:
    os.setuid(65534)
try:
    build(*sys.argv[1:])
except UserError as error:
    print(type(error).__name__, error)
"""


def test_unwritable_folder_is_a_sentence_and_stays_as_it_is(place: Path, tree) -> None:
    locked = place / "locked"
    locked.mkdir()
    for folder in (locked, locked / "new"):
        locked.chmod(0o555)
        done = run(UNPRIVILEGED, folder, place / "made")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"ResourceError cannot write {folder}")
        assert done.stdout.endswith(": permission denied; choose another folder\n")
    assert tree(place) == {}


def test_finished_cache_in_a_folder_that_cannot_be_written_is_left_at_that(place: Path, tree) -> None:
    folder, log = place / "cache", place / "made"
    assert run("build(*sys.argv[1:])", folder, log).returncode == 0
    before = tree(folder)
    for path in (folder / "shards", folder):
        path.chmod(0o555)
    done = run(UNPRIVILEGED, folder, log)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert tree(folder) == before


def test_file_where_the_folder_should_be_is_a_sentence(place: Path) -> None:
    (place / "cache").write_text("a file")
    for folder in (place / "cache", place / "cache" / "below"):
        done = run(UNPRIVILEGED.replace("os.setuid", "void = "), folder, place / "made")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"ResourceError cannot write {place / 'cache'}")
    assert (place / "cache").read_text() == "a file"


@pytest.mark.parametrize("name", ["with spaces", "кэш 缓存 é", "quote'\"$(x)", "-dash", "new\nline"])
def test_any_name_that_a_folder_may_have_will_do(place: Path, tree, unbroken, name: str) -> None:
    folder = place / name
    done = run("build(*sys.argv[1:])", folder, place / "made")
    assert done.returncode == 0, done.stderr
    assert tree(folder) == unbroken
    assert verify_cache(folder).bad == ()
    (folder / INDEX).unlink()
    assert [finding.file for finding in verify_cache(folder).bad] == [INDEX]


def clock(years: int) -> dict[str, str]:
    """The environment of a process whose wall clock is years off."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.skip("libfaketime is not installed")
    return os.environ | {"LD_PRELOAD": str(libraries[0]), "FAKETIME": f"{years:+}y"}


def test_a_clock_that_jumps_between_two_builders_changes_nothing(place: Path, tree, unbroken) -> None:
    """Ten years on in the first, back again in the second, twenty years back in the third."""
    folder, log = place / "cache", place / "made"
    now = time.time()
    builds = "assert abs(time.time() - {} - {}) < 1e7\nbuild(*sys.argv[1:], before_shard=lambda n: {})"
    dies = "n == {} and os.kill(os.getpid(), 9)"
    first, second, third = (
        builds.format(now, years * 3.156e7, what)
        for years, what in ((10, dies.format(1)), (0, dies.format(2)), (-20, "None"))
    )
    assert run(first, folder, log, env=clock(10)).returncode == -9
    assert run(second, folder, log, timeout=20).returncode == -9
    done = run(third, folder, log, env=clock(-20), timeout=20)
    assert done.returncode == 0, done.stderr
    assert made_shards(log) == [0, 1, 2, 3]
    assert tree(folder) == unbroken


def test_these_are_all_the_files_of_a_cache(unbroken) -> None:
    shards = {f"shards/{number:06d}.bin" for number in range(SHARDS)}
    assert set(unbroken) == {MANIFEST, INDEX, "index.pages", QUARANTINE, PROBE} | shards
