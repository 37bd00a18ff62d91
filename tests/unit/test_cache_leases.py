"""Leases: one holder a name, whoever is killed, stopped, slow, or lives by another clock."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import salt_vla.cache.leases as module
from salt_vla.cache.leases import Lease, Leases, remove_leases
from salt_vla.errors import ResourceError

FORK = multiprocessing.get_context("fork")
FOREVER = 10_000.0
NAMES = [f"{number:06d}" for number in range(200)]


class Other:
    """Another process with leases in the same folder; it does what it is told and answers."""

    def __init__(self, folder: Path, seconds: float = FOREVER) -> None:
        self._ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_obey, args=(folder, seconds, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self._ours.recv() == "ready"

    def __call__(self, command: str, name: str = "a") -> Any:
        self._ours.send((command, name))
        assert self._ours.poll(60)
        return self._ours.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def _obey(folder: Path, seconds: float, orders: Connection) -> None:
    leases = Leases(folder, seconds)
    held: dict[str, Lease] = {}
    orders.send("ready")
    while True:
        command, name = orders.recv()
        if command == "take":
            lease = leases.take(name)
            held |= {name: lease} if lease else {}
            orders.send(lease is not None)
        elif command == "is_held":
            orders.send(held[name].is_held())
        elif command == "release":
            orders.send(held[name].release())
        elif command == "close":
            orders.send(leases.close())


@pytest.fixture
def others() -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def start(folder: Path, seconds: float = FOREVER) -> Other:
        started.append(Other(folder, seconds))
        return started[-1]

    yield start
    for other in started:
        other.process.kill()
        other.process.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a cache, ж" / ".leases"


@pytest.fixture
def mine(folder: Path) -> Iterator[Leases]:
    with Leases(folder, FOREVER) as leases:
        yield leases


def waited_for(leases: Leases, name: str = "a") -> Lease:
    """The lease, asked for until it is given."""
    while (lease := leases.take(name)) is None:
        time.sleep(0.02)
    return lease


def process_file(folder: Path, name: str = "a") -> Path:
    """What the holder says of itself, found without the module: the last link's target."""
    return max(folder.glob(f"{name}.*"), key=lambda link: int(link.suffix[1:])).resolve()


def test_a_name_has_one_holder_until_it_is_given_back(folder: Path, mine: Leases, others: Any) -> None:
    other = others(folder)
    lease = mine.take("a")
    assert lease is not None and lease.name == "a" and lease.is_held()
    assert not other("take") and mine.take("a") is None
    assert other("take", "b") and mine.take("b") is None
    lease.release()
    assert not lease.is_held() and other("take") and other("is_held")
    lease.release()
    assert other("is_held"), "only the holder's word counts"


def test_the_holder_is_named(folder: Path, mine: Leases, others: Any) -> None:
    other = others(folder)
    assert mine.holder("a") == ""
    assert other("take")
    assert mine.holder("a") == f"{os.uname().nodename}, process {other.process.pid}"
    other("release")
    assert mine.holder("a") == ""
    assert mine.take("a") and mine.holder("a").endswith(f", process {os.getpid()}")


def test_closing_frees_everything_at_once(folder: Path, mine: Leases, others: Any) -> None:
    other = others(folder)
    assert other("take", "a") and other("take", "b")
    assert other("is_held")
    other("close")
    assert not other("is_held")
    assert mine.holder("a") == "" and mine.take("a") and mine.take("b")
    assert not other("is_held")


def test_an_error_frees_them_too(folder: Path, mine: Leases) -> None:
    with pytest.raises(KeyError), Leases(folder) as leases:
        assert leases.take("a")
        raise KeyError
    assert mine.take("a")
    with pytest.raises(RuntimeError, match="before they are closed"):
        leases.take("b")


@pytest.mark.parametrize("is_reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_holder_of_this_machine_is_succeeded_at_once(
    folder: Path, mine: Leases, others: Any, is_reaped: bool
) -> None:
    other = others(folder)
    assert other("take") and mine.take("a") is None
    other.signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)
    if is_reaped:
        other.process.join()
    assert mine.holder("a") == ""
    lease = mine.take("a")
    assert lease is not None and lease.is_held()


def test_another_process_of_the_same_number_is_not_the_holder(
    folder: Path, mine: Leases, others: Any
) -> None:
    assert others(folder)("take")
    path = process_file(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    assert mine.take("a")


def test_a_process_of_another_machine_is_not_looked_for_here(folder: Path, mine: Leases, others: Any) -> None:
    """Its number says nothing; only its silence does."""
    other = others(folder)
    assert other("take")
    path = process_file(folder)
    said = json.loads(path.read_text()) | {"machine": "elsewhere"}
    path.write_text(json.dumps(said))
    other.signal(signal.SIGKILL)
    other.process.join()
    assert mine.take("a") is None
    path.write_text(json.dumps(said | {"seconds": 0.3}))
    assert waited_for(mine).is_held()


def test_a_stopped_holder_is_succeeded_and_knows_it_when_it_wakes(
    folder: Path, mine: Leases, others: Any
) -> None:
    """By what the holder promised: those who wait may have been told another number."""
    other = others(folder, seconds=0.5)
    assert other("take", "a") and other("take", "b")
    other.signal(signal.SIGSTOP)
    lease = waited_for(mine)
    other.signal(signal.SIGCONT)
    assert not other("is_held", "a") and other("is_held", "b")
    other("release", "a")
    other("close")
    assert lease.is_held() and mine.take("b")


def test_a_holder_that_shows_signs_of_life_is_never_succeeded(
    folder: Path, mine: Leases, others: Any
) -> None:
    other = others(folder, seconds=2.0)
    assert other("take")
    while json.loads(process_file(folder).read_text())["beat"] < f"{6:020d}":
        assert mine.take("a") is None
        time.sleep(0.05)
    assert other("is_held")


def test_a_holders_file_in_pieces_counts_as_a_sign_of_life_once(folder: Path, others: Any) -> None:
    """As a crash of its machine may leave it."""
    other = others(folder)
    assert other("take")
    process_file(folder).write_text('{"beat": "000')
    with Leases(folder, seconds=0.3) as mine:
        assert mine.take("a") is None and mine.holder("a") == "an unknown process"
        assert waited_for(mine).is_held()


def _race(folder: Path, seed: int, start: Any, results: Any) -> None:
    names = random.Random(seed).sample(NAMES, len(NAMES))
    leases = Leases(folder, FOREVER)
    start.wait()
    won = {name: leases.take(name) for name in names}
    results.put([name for name, lease in won.items() if lease and lease.is_held()])
    signal.pause()


@pytest.mark.parametrize("has_dead_holders", [False, True], ids=["free", "left by the dead"])
def test_of_eight_processes_one_wins_each_of_200_names(
    folder: Path, others: Any, has_dead_holders: bool
) -> None:
    if has_dead_holders:
        other = others(folder)
        assert all(other("take", name) for name in NAMES)
        other.signal(signal.SIGKILL)
    start, results = FORK.Barrier(8), FORK.Queue()
    racers = [FORK.Process(target=_race, args=(folder, seed, start, results)) for seed in range(8)]
    for racer in racers:
        racer.start()
    won = [name for _ in racers for name in results.get(timeout=60)]
    for racer in racers:
        racer.kill()
        racer.join()
    assert sorted(won) == NAMES


def test_of_eight_threads_one_wins_each_of_200_names(mine: Leases) -> None:
    won: list[Lease] = []
    threads = [
        threading.Thread(target=lambda: won.extend(filter(None, map(mine.take, NAMES)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.name for lease in won) == NAMES


@pytest.mark.parametrize("later", [0, 1, 2])
def test_a_slow_racer_takes_nothing_from_those_who_came_after(
    folder: Path, mine: Leases, others: Any, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    """It has seen a dead holder, and acts when others have come, gone and come again."""
    dead = others(folder)
    assert dead("take")
    dead.signal(signal.SIGKILL)
    dead.process.join()
    slow = Leases(folder, FOREVER)
    looked, act = threading.Event(), threading.Event()

    def look(owner: str) -> bool:
        is_over = Leases._is_over(slow, owner)
        looked.set()
        assert act.wait(60)
        return is_over

    monkeypatch.setattr(slow, "_is_over", look)
    answers: list[Lease | None] = []
    racer = threading.Thread(target=lambda: answers.append(slow.take("a")))
    racer.start()
    assert looked.wait(60)
    lease = mine.take("a")
    assert lease is not None
    for _ in range(later):
        lease.release()
        lease = mine.take("a")
        assert lease is not None
    act.set()
    racer.join()
    assert answers == [None] and lease.is_held()
    slow.close()


def test_a_lost_answer_of_a_file_server_loses_no_lease(
    folder: Path, mine: Leases, others: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again, and then says that the link is there already."""
    link = Path.symlink_to

    def link_twice(path: Path, target: str) -> None:
        link(path, target)
        link(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", link_twice)
        lease = mine.take("a")
    assert lease is not None and lease.is_held() and not others(folder)("take")


def test_a_forked_child_holds_nothing_and_gives_nothing_back(folder: Path, mine: Leases) -> None:
    lease = mine.take("a")
    assert lease is not None

    def child() -> None:
        assert not lease.is_held()
        lease.release()
        mine.close()
        with pytest.raises(RuntimeError, match="by the process that opened them"):
            mine.take("b")
        with Leases(folder) as own:
            assert own.take("a") is None and own.take("b")

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert lease.is_held() and mine.take("b")


WRONG_CLOCK = """
import sys, time
from pathlib import Path
offset = float(sys.argv[2])
if abs(time.time() - float(sys.argv[3])) < 1e6:  # No faketime on this machine.
    real = time.time
    time.time, time.time_ns = lambda: real() + offset, lambda: int((real() + offset) * 1e9)
assert abs(time.time() - float(sys.argv[3]) - offset) < 1e5
from salt_vla.cache.leases import Leases
leases = Leases(Path(sys.argv[1]), 1.0)
assert leases.take("a")
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("days", [-3000, 3000])
def test_a_clock_that_is_years_off_changes_nothing(folder: Path, mine: Leases, days: int) -> None:
    """Under libfaketime where it is installed (Debian's `faketime`), else with Python's own clock turned."""
    command = [sys.executable, "-c", WRONG_CLOCK, str(folder), str(days * 86400.0), str(time.time())]
    if shutil.which("faketime"):
        command = ["faketime", "-m", "--exclude-monotonic", "-f", f"{days:+d}d", *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        path = process_file(folder)
        said = json.loads(path.read_text())
        for beat, when in ((1, 0.0), (2, 4e9)):
            os.utime(path, (when, when))  # As a file server with a clock of its own might write it down.
            while json.loads(path.read_text())["beat"] < f"{beat:020d}":
                assert mine.take("a") is None
                time.sleep(0.02)
        os.kill(said["pid"], signal.SIGSTOP)
        os.utime(path, (4e9, 4e9))
        assert waited_for(mine).is_held()
        os.kill(said["pid"], signal.SIGKILL)


def test_no_line_asks_for_the_time_of_day() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    asked = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "time.monotonic" in asked
    assert not {name for name in asked if name.startswith("time.")} - {"time.monotonic"}
    assert not {name for name in asked if "datetime" in name or "mtime" in name or "create_time" in name}


def test_a_full_disk_refuses_new_comers_and_loses_no_lease(folder: Path, others: Any) -> None:
    def on_a_full_disk() -> None:
        leases = Leases(folder, seconds=0.4)
        lease = leases.take("a")
        assert lease is not None
        path = process_file(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        before = json.loads(path.read_text())["beat"]
        while json.loads(path.read_text())["beat"] <= before:
            time.sleep(0.02)
        assert lease.is_held() and leases.take("b")
        names = sorted(folder.iterdir())
        with pytest.raises(ResourceError, match=r"cannot write .*/\.leases/.*make space"):
            Leases(folder)
        assert sorted(folder.iterdir()) == names

    process = FORK.Process(target=on_a_full_disk)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "locked"

    def without_rights() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(ResourceError, match=r"cannot write .*: permission denied; choose another"):
            Leases(folder / ".leases")

    folder.mkdir(mode=0o555)
    process = FORK.Process(target=without_rights)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_what_was_removed_is_lost_and_taken_anew(folder: Path, mine: Leases, others: Any) -> None:
    lease = mine.take("a")
    assert lease is not None
    remove_leases(folder)
    assert not folder.exists() and not lease.is_held()
    lease.release()
    again = mine.take("a")
    assert again is not None and again.is_held() and not lease.is_held()
    assert not others(folder)("take")


def test_several_clear_away_at_once(folder: Path, others: Any) -> None:
    other = others(folder)
    assert all(other("take", name) for name in NAMES)
    failed: list[ResourceError] = []

    def clear() -> None:
        try:
            remove_leases(folder)
        except ResourceError as error:
            failed.append(error)

    threads = [threading.Thread(target=clear) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not folder.exists()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_of_no_length_is_refused(folder: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        Leases(folder, seconds)
    assert not folder.exists()


def test_who_joins_while_others_clear_away_gets_in(folder: Path, tmp_path: Path) -> None:
    """Those see no whole file of a process that still begins, and remove the folder."""
    is_over = threading.Event()

    def clear() -> None:
        while not is_over.is_set():
            if not module.living(folder):
                remove_leases(folder)

    clearing = threading.Thread(target=clear)
    clearing.start()
    try:
        for _ in range(100):
            with Leases(folder, FOREVER) as leases:
                assert module.living(folder) or leases.take("a")
    finally:
        is_over.set()
        clearing.join()
