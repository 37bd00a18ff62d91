"""The process that stays beside a launched command: starts it, waits for it, starts it again where that was
asked for, and writes down how each attempt ended. Lost, another one takes its place; the command goes on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TypeVar

from salt_vla.errors import ResourceError, RunError, UserError
from salt_vla.operations.asked import asked_of
from salt_vla.operations.endings import Judgement, complete_status, ending_of
from salt_vla.operations.evidence import OomCount, oom_count
from salt_vla.operations.heartbeat import SECONDS, Heartbeat
from salt_vla.operations.launch import (
    Attempt,
    Launch,
    State,
    Supervision,
    record,
    record_event,
    supervision,
    wanted_in,
)
from salt_vla.operations.processes import (
    ProcessId,
    adopt_orphans,
    began,
    descendants,
    end_all,
    end_of,
    identity,
    of_folder,
    reap_orphans,
    salt_vla,
    scope_of_this,
    start_held,
)
from salt_vla.rundir import SUPERVISED, RunDirectory, void, writing_to

T = TypeVar("T")
MARK = ".began"
SECONDS_FOR_LEFTOVERS = 3.0  # After a command was lost its helpers notice by themselves, most of them.
SECONDS_A_LOOK, LOOKS = 0.05, 200
SECONDS_A_NAP = 0.25
SECONDS_FOR_SPACE = 5.0
SECONDS_TO_LEAVE = 10.0
LONGEST_BACKOFF = 3600.0


def supervise(folder: Path, at_work: Callable[[], None] = lambda: None) -> int:
    """Carry out what `launch.json` asks for; the exit code of the last attempt. `at_work` is called when
    supervision.json says so. Raises `RunError` where another supervisor does it already."""
    with _alone(folder):
        supervisor = Supervisor(folder, wanted_in(folder))
        code = supervisor.carry_out(at_work)
    if supervisor.is_untold:  # What follows a run's end, which its own process could not do.
        _after_run(folder)
    return code


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """As the folder's supervisor, after one that has written its last word already."""
    with writing_to(folder):
        lock = (folder / ".supervisor").open("w")
    until = time.monotonic() + SECONDS_TO_LEAVE
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Given back by the death of the process.
                break
            except BlockingIOError:
                before = supervision(folder)
                if before is None or before.is_at_work or time.monotonic() > until:
                    raise RunError(f"{folder} has a supervisor already; stop the run first") from None
                time.sleep(SECONDS_A_NAP)
        yield


def _after_run(folder: Path) -> None:
    from salt_vla.operations.session import after_run  # Not before: the supervisor stays light.

    try:
        after_run(RunDirectory(folder))
    except (OSError, UserError) as error:
        record_event(folder, "report failed", reason=str(error))


class Supervisor:
    """Of one launch, from its beginning or from where another one was lost."""

    def __init__(self, folder: Path, wanted: Launch) -> None:
        self.folder, self.wanted = folder, wanted
        self.mark = folder / MARK
        self.heartbeat = Heartbeat(folder)
        self.is_at_work = False
        self.signal_number = 0  # which has asked this process to end
        self.child: ProcessId | None = None
        self.oom_before: OomCount | None = None
        self.is_untold = False  # The last attempt ended without a word: what follows a run's end is due.
        before = supervision(folder)
        if before is not None and before.token == wanted.token:
            self.now = before
        else:
            self.now = Supervision(wanted.token, "starting", identity(), restarts_left=wanted.restarts)
        if not self.now.is_over:
            self.now = replace(self.now, supervisor=identity(), keeper=scope_of_this())

    def carry_out(self, at_work: Callable[[], None]) -> int:
        is_over = self.now.is_over
        if not is_over:
            self._note("supervised", self.now.state, keeper=self.now.keeper)
        at_work()
        self.is_at_work = True
        if not is_over:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._pass_on)
            adopt_orphans()
            self._until_over()
        code = self.now.attempts[-1].code if self.now.attempts else None
        return 1 if code is None else code if code >= 0 else 128 - code

    def _until_over(self) -> None:
        judged = self._look_at_the_last() if self.now.attempts else None
        while judged is None or (judged.is_failure and self.now.restarts_left):
            if not self._is_unwanted() and (judged is not None or self.now.state == "waiting"):
                self._wait(already=judged is None)
            if self._is_unwanted():
                return self._end_between_attempts()
            judged = self._attempt()
        self._end(judged.reason)

    def _attempt(self) -> Judgement:
        environment = os.environ | self.wanted.environment | {SUPERVISED: str(self.folder.resolve())}
        place = Path(self.wanted.directory or ".")
        with self._insist(self._log) as log:
            ends = (log.fileno(), log.fileno())
            held = self._insist(lambda: start_held(self._command(), ends, environment, place, self.mark))
        self.now = replace(self.now, attempts=(*self.now.attempts, Attempt(held.process)))
        self._note("started", "running", pid=held.process.pid)
        self.child = held.process
        if self._is_unwanted():
            held.process.send(signal.SIGTERM)
        held.begin()
        return self._watch(held.process, is_ours=True)

    def _log(self) -> BinaryIO:
        with writing_to(self.folder / "log.txt"):
            return (self.folder / "log.txt").open("ab")

    def _command(self) -> list[str]:
        if self.wanted.processes == 1:
            return salt_vla(*self.wanted.command)
        several = ["--standalone", "--nproc-per-node", str(self.wanted.processes), "-m", "salt_vla"]
        return [sys.executable, "-P", "-m", "torch.distributed.run", *several, *self.wanted.command]

    def _look_at_the_last(self) -> Judgement | None:
        """Of the attempt that the supervisor before this one has left: None where it is not to be judged."""
        last = self.now.attempts[-1]
        if self.now.state == "waiting":
            return None
        if last.ended:
            return ending_of(self.folder, self.now, last)
        with end_of(last.process) as has_ended:
            for _ in range(LOOKS):  # It learns at this moment that it may begin, or never will.
                if began(last.process, self.mark) or has_ended(SECONDS_A_LOOK):
                    break
        if last.process.is_alive():
            self._note("taken over", "running", pid=last.process.pid)
            self.child = last.process
            return self._watch(last.process, is_ours=False)
        if not began(last.process, self.mark):
            self.now = replace(self.now, attempts=self.now.attempts[:-1])
            return None
        return self._judge(last.process, None)

    def _watch(self, process: ProcessId, is_ours: bool) -> Judgement:
        self.heartbeat.beat(process)
        self.oom_before = oom_count(process.pid)
        with end_of(process) as has_ended:
            while not has_ended(SECONDS):
                self.heartbeat.beat(process)
        self.child = None
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) if is_ours else None
        return self._judge(process, code)

    def _judge(self, process: ProcessId, code: int | None) -> Judgement:
        attempt = Attempt(process, code, ended=time.time())
        judged = ending_of(self.folder, self.now, attempt, self.oom_before)
        if code != 0:
            left = {*self.heartbeat.known, *descendants(identity())}
            end_all(of_folder(left, self.folder), SECONDS_FOR_LEFTOVERS)
        reap_orphans()
        if self.wanted.is_run:
            self.is_untold = self._insist(lambda: complete_status(self.folder, attempt, judged))
        attempt = replace(attempt, code=judged.code, reason=judged.reason)
        self.now = replace(self.now, attempts=(*self.now.attempts[:-1], attempt))
        self._note("ended", self.now.state, pid=process.pid, **asdict(judged), process_code=code)
        return judged

    def _wait(self, already: bool) -> None:
        """The time between an attempt and the next, longer each time."""
        if not already:
            self.now = replace(self.now, restarts_left=self.now.restarts_left - 1)
        number = self.wanted.restarts - self.now.restarts_left  # This is the first, second, … restart.
        seconds = min(self.wanted.backoff_seconds * 2 ** (number - 1), LONGEST_BACKOFF)
        self._note("waiting", "waiting", seconds=seconds)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._is_unwanted():
            time.sleep(min(SECONDS_A_NAP, left))

    def _end_between_attempts(self) -> None:
        asked = asked_of(self.folder, self.now.token)
        by = asked.words if asked else f"by {signal.Signals(self.signal_number).name} to its supervisor"
        self._end(f"not started again: ended {by}")

    def _end(self, reason: str) -> None:
        self.now = replace(self.now, exit_reason=reason)
        self._note("over", "ended", reason=reason)

    def _is_unwanted(self) -> bool:
        return bool(self.signal_number) or asked_of(self.folder, self.now.token) is not None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if self.child is not None:
            void(self.child.send(signal.Signals(number)))

    def _note(self, event: str, state: State, **details: object) -> None:
        self.now = replace(self.now, state=state)
        self._insist(lambda: record(self.folder, self.now))
        self._insist(lambda: record_event(self.folder, event, **details))

    def _insist(self, work: Callable[[], T]) -> T:
        """Again and again while the disk is full: what is not written down is not done."""
        while True:
            try:
                return work()
            except ResourceError:
                if not self.is_at_work or self.signal_number or not self.folder.is_dir():
                    raise
            time.sleep(SECONDS_FOR_SPACE)
