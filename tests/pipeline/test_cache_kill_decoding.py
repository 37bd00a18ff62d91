"""The command itself, killed while processes decode for it: they go with it, and the cache is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cache import Manifest

# Runs `cache build` with decoders in forked children (the imports cost more than the build), in shards of
# four records, and sends each a signal after a while, until so many have got one; a cache that was finished
# meanwhile is followed by another one. A decoder is known by a variable of its environment.
BUILDS = """
import json, os, random, signal, sys, time, uuid
from pathlib import Path
import torch
import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter
from salt_vla.cache.shards import read_footer
from salt_vla.cli import main
from salt_vla.errors import CacheError

number, count, workers, place, *command = sys.argv[1:]
torch.set_num_threads(1)
job.RECORDS_PER_SHARD = 4
write = CacheWriter.write_shard
def slow(self, shard, records):
    time.sleep(0.1)
    return write(self, shard, records)
CacheWriter.write_shard = slow

def finished(folder):
    found = {}
    for path in Path(folder, "shards").glob("*.bin"):
        try:
            read_footer(path)
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
        except CacheError:
            pass
    return found

def decoders(mark):
    found = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += mark.encode() in path.read_bytes()
        except OSError:
            pass
    return found

def start(folder, mark, workers):
    child = os.fork()
    if child == 0:
        os.environ["DECODER_OF"] = mark
        for stream, name in ((1, "/dev/null"), (2, folder + ".said")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os._exit(main([*command, "--out", folder, "--workers", workers]))
    return child

rng = random.Random(os.getpid())
sent = round_ = 0
patience = 2.0
while sent < int(count):
    folder = f"{place}/cache{round_}"
    before, mark = finished(folder), str(uuid.uuid4())
    child = start(folder, mark, workers)
    until = time.monotonic() + 60
    while decoders(mark) == 0 and time.monotonic() < until:
        time.sleep(0.01)
    seen = decoders(mark)
    time.sleep(rng.uniform(0, patience))
    os.kill(child, int(number))
    status = os.waitpid(child, 0)[1]
    until = time.monotonic() + 60  # One that was starting notices it when its imports are done.
    while decoders(mark) and time.monotonic() < until:
        time.sleep(0.05)
    after = finished(folder)
    touched = [name for name in before if before[name] != after.get(name)]
    print(json.dumps([status, seen, decoders(mark), len(before), len(after), touched]), flush=True)
    sent += status != 0
    round_ += status == 0
    # As fast as this machine is now: most are to die with some shards made, few to end.
    patience *= 0.7 if status == 0 else 1.3 if len(after) == len(before) else 1.0
folder = f"{place}/cache{round_}"
status = os.waitpid(start(folder, "none", "0"), 0)[1]
sys.exit(Path(folder + ".said").read_text() if status else 0)
"""


@pytest.fixture
def interrupted(
    workshop: Any, place: Path, times: Callable[[int, int], int]
) -> Callable[..., list[list[Any]]]:
    """`interrupted(signal number, count)` builds, and is interrupted so often; what was seen each time."""

    def run(number: int, count: int) -> list[list[Any]]:
        source = ("--teacher", workshop.teacher, "--data", workshop.table)
        command = ["cache", "build", *source, "data.store_views=false"]
        script = [sys.executable, "-c", BUILDS, int(number), count, times(1, 2), place, *command]
        environment = os.environ | {"SALT_VLA_ROOT": str(place), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, script)], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def unbroken(workshop: Any, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> dict[str, bytes]:
    """The same cache, built in one go and without decoders."""
    import salt_vla.jobs.build_cache as job

    folder = tmp_path_factory.mktemp("unbroken") / "cache"
    before, job.RECORDS_PER_SHARD = job.RECORDS_PER_SHARD, 4
    try:
        source = ("--teacher", workshop.teacher, "--data", workshop.table, "--out", folder)
        workshop.salt.ok("cache", "build", *source, "--workers", 0, "data.store_views=false")
    finally:
        job.RECORDS_PER_SHARD = before
    assert Manifest.read(folder).num_shards == 9
    return dict(tree(folder))


def test_the_command_killed_with_its_decoders_at_work_ends_byte_equal(
    interrupted: Any, unbroken: dict[str, bytes], place: Path, tree: Any, times: Callable[[int, int], int]
) -> None:
    kills = times(3, 20)
    rows = interrupted(signal.SIGKILL, kills)
    assert sorted(status for status, *_ in rows) == [0] * (len(rows) - kills) + [9] * kills
    assert any(seen for _, seen, *_ in rows), "no decoder was ever at work"
    assert [left for _, _, left, *_ in rows] == [0] * len(rows), "decoders outlived the command"
    assert not any(touched for *_, touched in rows), "a finished shard was written again"
    folders = [folder for folder in place.glob("cache*") if folder.is_dir()]
    for folder in folders:
        assert tree(folder) == unbroken
    print(f"{kills} `cache build` killed with SIGKILL: no decoder left, {len(folders)} caches byte-equal")


def test_the_command_asked_to_stop_says_so_and_leaves_no_lease_and_no_decoder(
    interrupted: Any, unbroken: dict[str, bytes], place: Path, tree: Any
) -> None:
    *finished, (status, _, left, *_) = interrupted(signal.SIGTERM, 1)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM and left == 0
    folder = place / f"cache{len(finished)}"
    assert "the same command goes on from there" in Path(f"{folder}.said").read_text()
    assert tree(folder) == unbroken
