"""Results come in order whatever the workers do, and a worker's death is told of its item alone."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from salt_vla.data.workers import AHEAD, Lost, map_in_workers
from salt_vla.errors import DataError, ResourceError


def test_without_workers_everything_runs_here():
    assert list(map_in_workers(lambda item: (item, os.getpid()), "ab", 0)) == [
        ("a", os.getpid()),
        ("b", os.getpid()),
    ]


def test_results_come_in_the_items_order_from_other_processes():
    items = [(0.2 if number == 0 else 0.0) for number in range(30)]
    results = list(map_in_workers(time.sleep, items, 2))
    assert results == [None] * 30
    numbers = list(map_in_workers(functools.partial(pow, 2), range(40), 3))
    assert numbers == [2**number for number in range(40)]


def test_no_items_is_no_results():
    assert list(map_in_workers(abs, [], 2)) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_workers_item_is_named_and_the_others_go_on(num_workers):
    """`os.kill(pid, 0)` asks whether a process is there; the worker that is asked to kill itself dies."""
    commands = ["True"] * 5 + ["kill -9 $PPID"] + ["exit 3"] * 5 + ["kill -SEGV $PPID"] + ["exit 4"]
    results = list(map_in_workers(os.system, commands, num_workers))
    codes = [result if isinstance(result, Lost) else os.waitstatus_to_exitcode(result) for result in results]
    assert codes[5] == Lost("the process that worked on it died (SIGKILL)")
    assert codes[11] == Lost("the process that worked on it died (SIGSEGV)")
    assert codes[6:11] == [3] * 5 and codes[12] == 4 and codes[:5] == [127] * 5


def test_a_worker_that_leaves_is_told_by_its_exit_code():
    assert list(map_in_workers(os._exit, [7], 1)) == [
        Lost("the process that worked on it died (exit code 7)")
    ]


def test_an_item_that_takes_too_long_is_given_up_and_the_rest_done():
    results = list(map_in_workers(time.sleep, [0, 600, 0, 0], 2, time_limit=4))
    assert results == [None, Lost("it took longer than 4 s"), None, None]


def test_an_exception_is_raised_where_the_results_are_read():
    results = map_in_workers(refuse, [1, 2], 1)
    with pytest.raises(DataError, match=r"^no 1$"):
        next(results)


def refuse(number: int) -> None:
    raise DataError(f"no {number}")


def test_workers_end_with_the_iterator(spawned):
    before = set(psutil.Process().children(recursive=True))
    results = map_in_workers(abs, range(100), 2)
    assert next(results) == 0
    assert set(psutil.Process().children(recursive=True)) - before
    results.close()
    assert not set(spawned(psutil.Process())) - before


def test_workers_stay_close_to_the_oldest_open_item(tmp_path):
    """Results that wait for an older one are held in memory: there must not be many."""
    items = [("slow" if number == 0 else "quick", tmp_path / str(number)) for number in range(200)]
    results = map_in_workers(touch, items, 2)
    assert next(results) < 2 * AHEAD + 1
    assert len(list(results)) == 199


def touch(item: tuple[str, Path]) -> int:
    """How many items have been begun when this one ends."""
    speed, path = item
    path.touch()
    if speed == "slow":
        time.sleep(1.0)
    return len(list(path.parent.iterdir()))


def test_ctrl_c_is_left_to_who_started_the_workers():
    results = map_in_workers(send_interrupt, [1, 2], 1)
    assert list(results) == [1, 2]


def send_interrupt(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


def test_workers_of_a_killed_program_end_and_say_nothing(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        """
import os, signal, sys
from salt_vla.data.workers import map_in_workers

def kill_the_program(number):
    if number == 3:
        os.kill(os.getppid(), signal.SIGKILL)
    return bytes(10_000_000)

if __name__ == "__main__":
    list(map_in_workers(kill_the_program, range(8), 2))
"""
    )
    # The pipes close when the last of the processes has ended.
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")


def test_workers_of_a_program_that_is_killed_while_they_start_do_not_begin(tmp_path):
    """What it had sent them lies in the pipe already, and would hang them for good."""
    script = tmp_path / "program.py"
    script.write_text(
        """
import os, signal, threading, time
from salt_vla.data.workers import map_in_workers

def hang(number):
    time.sleep(1000)

if __name__ == "__main__":
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    list(map_in_workers(hang, range(8), 2))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("items", [[1], [None, 1, 2]])
def test_workers_that_cannot_be_started_stop_the_work_and_cost_no_item(items):
    results = map_in_workers(abs, items, 1, prepare=functools.partial(os._exit, 7))
    with pytest.raises(ResourceError, match=r"3 in a row died \(exit code 7\) before they began; see above"):
        list(results)


def test_a_worker_that_dies_while_it_starts_leaves_its_item_to_the_next(tmp_path):
    results = map_in_workers(abs, [-1, -2], 1, prepare=functools.partial(die_once, tmp_path / "died"))
    assert list(results) == [1, 2]


def die_once(path: Path) -> None:
    if not path.exists():
        path.touch()
        os._exit(7)


def test_starting_is_not_counted_as_work():
    assert list(map_in_workers(abs, [-1], 1, time_limit=0.5, prepare=functools.partial(time.sleep, 1.0))) == [
        1
    ]


class StopsWhileItIsSent:
    """Its first half fits into no pipe, and then nothing follows."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return bytes, (bytes(self.size),)


def answer_and_stop(size: int) -> object:
    return StopsWhileItIsSent(size) if size else b""


@pytest.mark.parametrize("limit", [2.0, None])
def test_a_worker_that_stops_while_it_sends_its_answer_is_not_waited_for(monkeypatch, limit):
    """With a limit until it is over, else until the work is cancelled."""
    cancelled = threading.Event()
    reading = threading.Event()
    recv = Connection.recv

    def slow(self):
        """Takes nothing out of the pipe before the other end has stopped."""
        if reading.is_set():
            time.sleep(0.5)
        reading.set()
        return recv(self)

    monkeypatch.setattr(Connection, "recv", slow)
    if limit is None:
        threading.Timer(3.0, cancelled.set).start()
    results = map_in_workers(answer_and_stop, [10_000_000, 0], 1, limit, cancelled=cancelled)
    assert list(results) == ([Lost("it took longer than 2 s"), b""] if limit else [])
