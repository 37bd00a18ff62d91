"""Several `cache build` on one folder: they share the work, do nothing twice, and outlive each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import salt_vla.jobs.build_cache as job

SHARDS = 36  # one view each, of 18 clips
SECONDS = 2.0  # of a lease

# `cache build` in small shards under short leases. Tells `pipe` which shards it has made, and which it has
# lost to others; at the shard `hold` it says so and waits, with its lease and some more in hand.
BUILD = """
import os
os.environ["SALT_VLA_ROOT"] = root
import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter
from salt_vla.cli import main

job.RECORDS_PER_SHARD = 1
begin, write = CacheWriter.__init__, CacheWriter.write_shard

def with_short_leases(self, folder, manifest, clip_ids, stripe=(0, 1), lease_seconds=0.0):
    begin(self, folder, manifest, clip_ids, stripe, seconds)

def telling(self, shard, records):
    if self.manifest.kind == "views":
        return write(self, shard, records)
    if shard.number == hold:
        pipe.send(("holds", hold))
        pipe.recv()
    is_ours = write(self, shard, records)
    pipe.send(("made" if is_ours else "lost", shard.number))
    return is_ours

CacheWriter.__init__, CacheWriter.write_shard = with_short_leases, telling
pipe.send(("ends", main(arguments)))
"""
# Processes of their own, forked by one that has only imported: the imports take longer than the builds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["salt_vla.jobs.build_cache", "salt_vla.teachers.pixel", "salt_vla.cli.train"]
)


class Writer:
    """A process that builds."""

    def __init__(self, **settings: object) -> None:
        self._pipe, theirs = FORKSERVER.Pipe()
        self.process = FORKSERVER.Process(target=exec, args=(BUILD, settings | {"pipe": theirs}), daemon=True)
        self.process.start()
        theirs.close()
        self.told: list[tuple[str, int]] = []

    @property
    def made(self) -> list[int]:
        return [number for word, number in self.told if word == "made"]

    @property
    def lost(self) -> list[int]:
        return [number for word, number in self.told if word == "lost"]

    def until(self, word: str) -> int:
        """Until it `holds` the shard where it stops, has `lost` one, or `ends` with its exit code."""
        while not self.told or self.told[-1][0] != word:
            assert self._pipe.poll(120)
            self.told.append(self._pipe.recv())
        return self.told[-1][1]

    def go_on(self) -> None:
        self._pipe.send("go on")

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def writer(workshop: Any, tmp_path: Path, place: Path) -> Iterator[Callable[..., Writer]]:
    """`writer(*arguments, hold=number, seconds=…)`: one more builder of the same cache."""
    source = ("--teacher", workshop.teacher, "--data", workshop.table, "--split", "train")
    started: list[Writer] = []

    def start(*more: object, hold: int = -1, seconds: float = 60.0) -> Writer:
        arguments = [str(word) for word in ("cache", "build", *source, "--out", place, *more)]
        settings = {"root": str(tmp_path), "hold": hold, "seconds": seconds, "arguments": arguments}
        started.append(Writer(**settings))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.join()


@pytest.fixture(scope="module")
def alone(workshop: Any, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> dict[str, bytes]:
    """What one undisturbed writer makes."""
    out = tmp_path_factory.mktemp("alone") / "cache"
    source = ("--teacher", workshop.teacher, "--data", workshop.table, "--split", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "RECORDS_PER_SHARD", 1)
        workshop.salt.ok("cache", "build", *source, "--out", out)
    made: dict[str, bytes] = tree(out)
    assert sum(name.startswith("shards/") for name in made) == SHARDS
    return made


def shards_at(place: Path) -> dict[int, tuple[int, int]]:
    """The finished ones, with what changes when a file is written again."""
    found = {int(path.stem): path.stat() for path in (place / "shards").glob("*.bin")}
    return {number: (stat.st_ino, stat.st_mtime_ns) for number, stat in found.items()}


def test_the_same_command_twice_shares_the_work(
    writer: Callable[..., Writer], place: Path, tree: Any, alone: dict[str, bytes]
) -> None:
    first = writer(hold=2)
    first.until("holds")
    second = writer(hold=20)
    second.until("holds")
    for each in (first, second):
        each.go_on()
    assert [first.until("ends"), second.until("ends")] == [0, 0]
    assert sorted(first.made + second.made) == list(range(SHARDS))
    assert first.lost == second.lost == []
    assert tree(place) == alone


def test_what_the_dead_and_the_stopped_held_is_made_by_the_third(
    writer: Callable[..., Writer], place: Path, tree: Any, alone: dict[str, bytes]
) -> None:
    """Each begins with its own third. Nothing that was finished is written again."""
    dead, stopped = (writer("--shard", f"{i}/3", hold=i + 6, seconds=SECONDS) for i in (0, 1))
    dead.until("holds")
    stopped.until("holds")
    dead.signal(signal.SIGKILL)
    stopped.signal(signal.SIGSTOP)
    before = shards_at(place)
    assert set(before) == {0, 3, 1, 4}
    third = writer("--shard", "2/3", seconds=SECONDS)
    assert third.until("ends") == 0
    assert third.made[:12] == list(range(2, SHARDS, 3))
    assert sorted(third.made) == sorted(set(range(SHARDS)) - set(before))
    assert tree(place) == alone
    stopped.signal(signal.SIGCONT)
    stopped.go_on()
    assert stopped.until("ends") == 0
    assert stopped.made == [1, 4] and stopped.lost[0] == 7
    assert tree(place) == alone
    assert before.items() <= shards_at(place).items()


def test_who_was_too_slow_helps_on_and_waits_for_its_successor(
    writer: Callable[..., Writer], place: Path, tree: Any, alone: dict[str, bytes]
) -> None:
    slow = writer(hold=5, seconds=SECONDS)
    slow.until("holds")
    slow.signal(signal.SIGSTOP)
    successor = writer(hold=5, seconds=SECONDS)
    successor.until("holds")
    slow.signal(signal.SIGCONT)
    slow.go_on()
    assert slow.until("lost") == 5
    successor.go_on()
    assert [slow.until("ends"), successor.until("ends")] == [0, 0]
    assert sorted(slow.made + successor.made) == list(range(SHARDS))
    assert 5 in successor.made and tree(place) == alone
