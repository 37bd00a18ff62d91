"""Keeps a run's tracker going without the run: starts the process that sends, starts it again when it falls
over, and ends it when the run has been over for a while. What was not sent then waits for `runs sync`.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Literal

from salt_vla.errors import ConfigError, RunError
from salt_vla.identity import ProcessId, identity
from salt_vla.interrupts import StopFlag, stop_on_signals
from salt_vla.operations.processes import salt_vla
from salt_vla.operations.trackers.base import require_trackers
from salt_vla.operations.trackers.journal import Mirror
from salt_vla.rundir import ROOT, RunDirectory, launched, root, writing_to

PATIENCE = 120.0  # Seconds after the run's end.
SECONDS_BETWEEN_LOOKS = 1.0
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # Seconds before the sender is started again: doubled each time.
SECONDS_TO_END = 5.0
WHERE = "between two rows"
Outcome = Literal["sent", "given up", "busy"]


@contextmanager
def following(run: RunDirectory, trackers: Sequence[str]) -> Iterator[None]:
    """Around the work of a run's process: a keeper for each tracker, apart from it, which learns at the
    block's end, or at the process', that nothing more will come.

    Raises `ConfigError` for what is no tracker or is not installed. Whatever goes wrong later is in the
    tracker's log alone."""
    require_trackers(trackers)
    if not trackers or launched().rank:
        yield
        return
    ends, goes_on = os.pipe()
    try:
        for tracker in dict.fromkeys(trackers):
            _start_keeper(Mirror(run, tracker), ends)
        os.close(ends)
        yield
    finally:
        os.close(goes_on)


def _start_keeper(mirror: Mirror, ends: int) -> None:
    run, beside = mirror.run, json.dumps(asdict(identity()))
    with writing_to(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        log = mirror.log_file.open("ab")
    with log:
        process = subprocess.Popen(
            salt_vla("runs", "sync", run.name, "--tracker", mirror.tracker, "--follow", "--beside", beside),
            stdin=ends,
            stdout=log,
            stderr=log,
            env=os.environ | {ROOT: str(root())},
            start_new_session=True,  # Ctrl-C and the end of the terminal are the run's business.
        )
    process.returncode = 0  # Nobody here waits for it: it outlives this process.


def is_open(pipe: int) -> bool:
    """Whether somebody still holds the other end of a pipe into which nobody writes."""
    readable, _, _ = select.select([pipe], [], [], 0)
    return not readable


@dataclass(frozen=True)
class Work:
    """Whose end is waited for: that of the process that started a keeper, which also holds a pipe open as
    long as more may come, else of whatever works on the run; nobody's where `followed` is false."""

    run: RunDirectory
    beside: ProcessId | None = None
    followed: bool = True

    def is_going(self) -> bool:
        if not self.followed:
            return False
        if self.beside is not None:  # Loader processes may have inherited the pipe, and outlive it.
            return is_open(sys.stdin.fileno()) and self.beside.is_alive()
        try:
            return self.run.status().state == "running"
        except RunError:
            return False


def work_of(run: RunDirectory, follow: bool, beside: str) -> Work:
    """`beside`: a run's own process, as it describes itself to the keeper that it starts. Raises
    `ConfigError` for what is none."""
    try:
        return Work(run, ProcessId(**json.loads(beside)) if beside else None, follow)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--beside is for the processes of runs alone ({error}); leave it out") from error


def keep(run: RunDirectory, tracker: str, work: Work, patience: float = PATIENCE) -> Outcome:
    """Let everything be sent, also what comes while the run works; `patience` counts from its end. Raises
    `Stopped` after a signal, when the sender has ended, and `RunError` for a damaged note of what it sent."""
    mirror = Mirror(run, tracker)
    mirror.place()  # What is damaged is said at once; no sender could mend it.
    with stop_on_signals() as stop, _alone(mirror, work, patience, stop) as lock:
        if lock is None:
            return "busy"
        is_sent = _keep_sending(mirror, work, patience, lock.fileno(), stop)
    if is_sent:
        return "sent"
    command = f"salt-vla runs sync {run.name} --tracker {tracker}"
    _say(mirror, f"given up: {mirror.left()} rows are not known to be there; `{command}` sends them")
    return "given up"


@contextmanager
def _alone(mirror: Mirror, work: Work, patience: float, stop: StopFlag) -> Iterator[IO[str] | None]:
    """The tracker's lock, which the sender holds too; None where another keeper has it and keeps it. A
    resumed run's waits for its forerunner, which may still be closing the tracker when the run has ended."""
    with writing_to(mirror.lock_file):
        file = mirror.lock_file.open("w")
    with file:
        ends = float("inf")
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not work.is_going():
                ends = min(ends, time.monotonic() + patience)
            if work.beside is None or time.monotonic() >= ends:
                yield None
                return
            stop.check(WHERE)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield file


def _keep_sending(mirror: Mirror, work: Work, patience: float, lock: int, stop: StopFlag) -> bool:
    wait, ends = FIRST_WAIT, float("inf")
    while True:
        with _sender(mirror, lock) as sender:
            ends = _wait(sender, work, patience, ends, stop)
        if sender.returncode == 0:
            return True
        if time.monotonic() >= ends:
            return False
        again, was_going = time.monotonic() + wait, work.is_going()
        _say(mirror, f"the sender ended with {sender.returncode}; started again in {wait:.0f} s at most")
        # When the run ends while nobody sends, one more attempt is made at once.
        while time.monotonic() < min(again, ends) and work.is_going() == was_going:
            stop.check(WHERE)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        wait = min(2 * wait, LONGEST_WAIT)


@contextmanager
def _sender(mirror: Mirror, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sends, its input open as long as more may come; gone, with all that its tracker has
    started, when the block is left."""
    with mirror.log_file.open("ab") as log:
        sender = subprocess.Popen(
            salt_vla("runs", "send", mirror.run.name, mirror.tracker),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )
    with sender:
        try:
            yield sender
        finally:
            _end_all_of(sender)


def _wait(sender: subprocess.Popen[bytes], work: Work, patience: float, ends: float, stop: StopFlag) -> float:
    """Until the sender has ended or it is time to end it; when that is."""
    assert sender.stdin is not None
    while sender.poll() is None and time.monotonic() < ends:
        stop.check(WHERE)
        if not work.is_going():
            ends = min(ends, time.monotonic() + patience)
            sender.stdin.close()
        _sleep_beside(sender)
    return ends


def _sleep_beside(sender: subprocess.Popen[bytes]) -> None:
    """Until the next look, or until the sender ends: without the wake-ups of `Popen.wait`."""
    if not hasattr(os, "pidfd_open"):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return
    ended = os.pidfd_open(sender.pid)  # It is there still: nobody but this process reaps it.
    try:
        select.select([ended], [], [], SECONDS_BETWEEN_LOOKS)
    finally:
        os.close(ended)


def _end_all_of(sender: subprocess.Popen[bytes]) -> None:
    """The sender with all that its tracker has started: they are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(sender.pid, number)
        with suppress(subprocess.TimeoutExpired):
            sender.wait(SECONDS_TO_END)


def _say(mirror: Mirror, what: str) -> None:
    with mirror.log_file.open("a") as log:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), what, file=log)
