"""Real processes that are killed, run out of disk or lack permission while they build a cache.

Whatever happens, the same command goes on, makes nothing again that was finished, and ends with the very
bytes of a build that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from salt_vla.cache import open_cache
from salt_vla.cache.format import JOURNAL

SHARDS = 4
KILLS = 12

# Builds 16 records in 4 shards at sys.argv[1]; writes down each shard it makes at sys.argv[2].
BUILDER = """
import os, resource, signal, sys, time
from pathlib import Path
import numpy as np
from salt_vla.cache import CacheWriter, Manifest
from salt_vla.cache.writer import Record
from salt_vla.errors import UserError

KEYS = [(f"clip/{clip}", view) for clip in range(8) for view in range(2)]
MANIFEST = Manifest("latents", "int8", (6, 10), 2, 4, {"teacher": "t", "clip_table": "c"})

def record(key, pause):
    time.sleep(pause)
    if key == ("clip/5", 1):
        return Record(key, None, "the file ends early")
    return Record(key, np.random.default_rng(KEYS.index(key)).normal(size=(6, 10)))

def build(folder, made, pause=0.0, before_shard=lambda number: None):
    with CacheWriter(Path(folder), MANIFEST, KEYS) as writer:
        for shard in writer.missing_shards():
            before_shard(shard.number)
            with open(made, "a") as file:
                file.write(f"{shard.number} ")
            writer.write_shard(shard, (record(key, pause) for key in shard.keys))
        writer.finish()
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILDER + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def finished_shards(folder: Path) -> set[int]:
    """What the journal acknowledges, read without the package's own reader."""
    if not (folder / JOURNAL).exists():
        is_complete = (folder / "index.arrow").exists()
        return set(range(SHARDS)) if is_complete else set()
    lines = (folder / JOURNAL).read_text().split("\n")[:-1]
    return {json.loads(line)["shard"] for line in lines if line.endswith("}")}


def made_shards(log: Path) -> list[int]:
    return [int(number) for number in log.read_text().split()] if log.exists() else []


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a builder waits for the disk at every shard, against power cuts
    that no test makes. Every user may enter it, unlike pytest's own."""
    memory = Path("/dev/shm")
    has_memory = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="salt-vla-", dir=memory if has_memory else None))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tree) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    done = run("build(*sys.argv[1:])", folder / "cache", folder / "made")
    assert done.returncode == 0, done.stderr
    assert made_shards(folder / "made") == list(range(SHARDS))
    return tree(folder / "cache")


def test_cache_killed_at_any_moment_ends_byte_equal(place, tree, unbroken):
    """kill -9 from outside after random times, a dozen times over, each time on what the last one left."""
    rng = random.Random()
    script = "print('ready', flush=True); build(*sys.argv[1:], pause=0.004)"
    kills = round_ = 0
    while kills < KILLS:
        folder, log = place / f"cache{round_}", place / f"made{round_}"
        finished, made = finished_shards(folder), made_shards(log)
        command = [sys.executable, "-c", BUILDER + script, str(folder), str(log)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
            assert builder.stdout is not None and builder.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.06))
            builder.kill()
        assert not finished & set(made_shards(log)[len(made) :])
        kills += builder.returncode == -9
        if builder.returncode == 0:
            assert tree(folder) == unbroken
            round_ += 1
    folder, log = place / f"cache{round_}", place / f"made{round_}"
    finished, made = finished_shards(folder), made_shards(log)
    assert run("build(*sys.argv[1:])", folder, log).returncode == 0
    assert set(made_shards(log)[len(made) :]) == set(range(SHARDS)) - finished
    assert tree(folder) == unbroken
    assert list(open_cache(folder).verify()) == [None] * 15


# Dies before the n-th time that it opens, renames, locks, makes or removes something in the cache's folder,
# so also between a shard's rename and its line in the journal, and between the manifest's last word and the
# end. Then dies some more times, then finishes. Prints for each n the shards that the journal held at first.
EVERY_MOMENT = """
import json
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"}

def touches(event, arguments):
    if event == "fcntl.flock":
        return True
    return event in EVENTS and any(isinstance(a, str) and a.startswith(FOLDER) for a in arguments)

def die_at(moment):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if touches(event, arguments):
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
    journal = Path(FOLDER, "journal.jsonl")
    lines = journal.read_text().split("\\n")[:-1] if journal.exists() else []
    shards = [json.loads(line)["shard"] for line in lines]
    for again in range(int(sys.argv[3])):
        build_in_child(FOLDER + ".again", 5 + (7 * moment + 11 * again) % 17)
    build_in_child(FOLDER + ".last", 0)
    print(json.dumps([moment, shards]), flush=True)
    moment += int(sys.argv[4])
"""


@pytest.mark.parametrize(("first", "further_kills", "step"), [(1, 0, 1), (3, 2, 5)], ids=["once", "thrice"])
def test_cache_killed_between_any_two_touches_of_the_disk_ends_byte_equal(
    place, tree, unbroken, first, further_kills, step
):
    done = run(EVERY_MOMENT, place, first, further_kills, step)
    assert done.returncode == 0, done.stderr
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) * step > 45
    seen = set()
    for moment, finished in moments:
        folder = place / f"moment{moment}"
        assert tree(folder) == unbroken, f"killed at moment {moment}"
        started = made_shards(Path(f"{folder}.first"))
        made_again = made_shards(Path(f"{folder}.again")) + made_shards(Path(f"{folder}.last"))
        assert not set(made_again) & set(finished)
        if not further_kills and set(made_again):
            assert made_again == [number for number in range(SHARDS) if number not in finished]
        assert set(started) | set(made_again) == set(range(SHARDS))
        seen.add((len(finished), len(started)))
    if step == 1:
        halfway = {(done_shards, done_shards + 1) for done_shards in range(SHARDS)}
        assert halfway <= seen


DISK_FULL = """
def fill(number):
    if number == 2:
        limit = int(sys.argv[3]) or os.stat(sys.argv[1] + "/journal.jsonl").st_size + 40
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    build(*sys.argv[1:3], before_shard=fill)
except UserError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("limit", "file"), [(100, "shards/000002.bin"), (0, JOURNAL)], ids=["shard", "journal"]
)
def test_full_disk_is_a_sentence_and_the_build_goes_on_later(place, tree, unbroken, limit, file):
    """In a shard nothing half-written stays; a line that was cut off in the journal is healed."""
    folder, log = place / "cache", place / "made"
    done = run(DISK_FULL, folder, log, limit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ResourceError cannot write {folder}/{file}: ")
    assert done.stdout.endswith("; make space or choose another folder\n") and done.stdout.count("\n") == 1
    shards = {f"shards/{number:06d}.bin" for number in range(2 if limit else 3)}
    assert set(tree(folder)) == {".lock", "manifest.json", JOURNAL} | shards
    assert run("build(*sys.argv[1:])", folder, log).returncode == 0
    assert made_shards(log) == [0, 1, 2, 2, 3]
    assert tree(folder) == unbroken


UNPRIVILEGED = """
if os.geteuid() == 0:
    os.setuid(65534)
try:
    build(*sys.argv[1:])
except UserError as error:
    print(type(error).__name__, error)
"""


def test_unwritable_folder_is_a_sentence_and_stays_as_it_is(place, tree):
    locked = place / "locked"
    locked.mkdir()
    for folder in (locked, locked / "new"):
        locked.chmod(0o555)
        done = run(UNPRIVILEGED, folder, place / "made")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"ResourceError cannot write {folder}")
        assert done.stdout.endswith(": permission denied; choose another folder\n")
    assert tree(place) == {}


def test_finished_cache_in_a_folder_that_cannot_be_written_is_left_at_that(place, tree):
    folder, log = place / "cache", place / "made"
    assert run("build(*sys.argv[1:])", folder, log).returncode == 0
    before = tree(folder)
    for path in (folder / "shards", folder):
        path.chmod(0o555)
    done = run(UNPRIVILEGED, folder, log)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert tree(folder) == before


def test_file_where_the_folder_should_be_is_a_sentence(place):
    (place / "cache").write_text("a file")
    for folder in (place / "cache", place / "cache" / "below"):
        done = run(UNPRIVILEGED.replace("os.setuid", "void = "), folder, place / "made")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"ResourceError cannot write {place / 'cache'}")
    assert (place / "cache").read_text() == "a file"
