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

# Runs `cache build` with two decoders in forked children (the imports cost more than the build), in shards of
# four records, and sends each a signal after a while. A decoder is known by a variable of its environment.
BUILDS = """
import json, os, random, signal, sys, time, uuid
from pathlib import Path
import torch
import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter
from salt_vla.cache.shards import read_footer
from salt_vla.cli import main
from salt_vla.errors import CacheError

number, count, folder, *command = sys.argv[1:]
torch.set_num_threads(1)
job.RECORDS_PER_SHARD = 4
write = CacheWriter.write_shard
def slow(self, shard, records):
    time.sleep(0.1)
    return write(self, shard, records)
CacheWriter.write_shard = slow

def finished():
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

def start(mark):
    child = os.fork()
    if child == 0:
        os.environ["DECODER_OF"] = mark
        for stream, name in ((1, "/dev/null"), (2, folder + ".said")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os._exit(main(command))
    return child

rng = random.Random(os.getpid())
for _ in range(int(count)):
    before, mark = finished(), str(uuid.uuid4())
    child = start(mark)
    until = time.monotonic() + 60
    while decoders(mark) == 0 and time.monotonic() < until:
        time.sleep(0.01)
    seen = decoders(mark)
    # From their start to the third shard or so: the first kills hit decoding, all together the whole build.
    time.sleep(rng.uniform(0, 2.0))
    os.kill(child, int(number))
    status = os.waitpid(child, 0)[1]
    until = time.monotonic() + 30
    while decoders(mark) and time.monotonic() < until:
        time.sleep(0.05)
    after = finished()
    touched = [name for name in before if before[name] != after.get(name)]
    print(json.dumps([status, seen, decoders(mark), len(before), len(after), touched]), flush=True)
    if status == 0:
        break
command[command.index("--workers") + 1] = "0"
while os.waitstatus_to_exitcode(os.waitpid(start("none"), 0)[1]) != 0:
    print(Path(folder + ".said").read_text(), file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def interrupted(workshop: Any, place: Path) -> Callable[..., list[list[Any]]]:
    """`interrupted(signal number, count)` builds, and is interrupted so often; what was seen each time."""

    def run(number: int, count: int) -> list[list[Any]]:
        folder = place / "cache"
        source = ("--teacher", workshop.teacher, "--data", workshop.table, "--out", folder)
        command = ["cache", "build", *source, "--workers", 2, "data.store_views=false"]
        script = [sys.executable, "-c", BUILDS, int(number), count, folder, *command]
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
    rows = interrupted(signal.SIGKILL, times(3, 20))
    assert [status for status, *_ in rows].count(9) >= min(len(rows) - 1, 1)
    assert any(seen for _, seen, *_ in rows), "no decoder was ever at work"
    assert [left for _, _, left, *_ in rows] == [0] * len(rows), "decoders outlived the command"
    assert not any(touched for *_, touched in rows), "a finished shard was written again"
    assert tree(place / "cache") == unbroken
    print(f"{len(rows)} `cache build` with decoders killed with SIGKILL: no decoder left, cache byte-equal")


def test_the_command_asked_to_stop_says_so_and_leaves_no_lease_and_no_decoder(
    interrupted: Any, unbroken: dict[str, bytes], place: Path, tree: Any
) -> None:
    ((status, seen, left, *_),) = interrupted(signal.SIGTERM, 1)
    assert os.waitstatus_to_exitcode(status) in (128 + signal.SIGTERM, 0) and seen and not left
    if status:
        assert "the same command goes on from there" in (place / "cache.said").read_text()
    assert tree(place / "cache") == unbroken
