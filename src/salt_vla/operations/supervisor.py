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

from salt_vla.errors import RunError, UserError
from salt_vla.operations.asked import asked_of
from salt_vla.operations.endings import Judgement, complete_status, ending_of
from salt_vla.operations.evidence import OomCount, oom_count
from salt_vla.operations.heartbeat import Heartbeat
from salt_vla.operations.launch import (
    SUPERVISED,
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
    reap_orphans,
    salt_vla,
    scope_of_this,
    start_held,
)
from salt_vla.rundir import RunDirectory, void, writing_to

MARK = ".began"
SECONDS_FOR_LEFTOVERS = 3.0  # After a command was lost its helpers notice by themselves, most of them.
SECONDS_A_NAP = 0.25
LONGEST_BACKOFF = 3600.0


def supervise(folder: Path, at_work: Callable[[], None] = lambda: None) -> int:
    """Carry out what `launch.json` asks for; the exit code of the last attempt. `at_work` is called when
    supervision.json says so. Raises `RunError` where another supervisor does it already."""
    with _alone(folder):
        return Supervisor(folder, wanted_in(folder)).carry_out(at_work)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with writing_to(folder):
        lock = (folder / ".supervisor").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Given back by the death of the process.
        except BlockingIOError:
            raise RunError(f"{folder} has a supervisor already; `salt-vla runs show` says which") from None
        yield


class Supervisor:
    """Of one launch, from its beginning or from where another one was lost."""

    def __init__(self, folder: Path, wanted: Launch) -> None:
        self.folder, self.wanted = folder, wanted
        self.mark = folder / MARK
        self.heartbeat = Heartbeat(folder)
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
        environment = os.environ | self.wanted.environment | {SUPERVISED: str(self.folder)}
        # Its own log is the run's; what another process of the same name would say is not mixed into it.
        with writing_to(self.folder), (self.folder / "log.txt").open("ab") as log:
            held = start_held(
                self._command(),
                (log.fileno(), log.fileno()),
                environment,
                Path(self.wanted.directory or "."),
                self.mark,
            )
        self.now = replace(self.now, attempts=(*self.now.attempts, Attempt(held.process)))
        self._note("started", "running", pid=held.process.pid)
        self.child = held.process
        if self._is_unwanted():
            held.process.send(signal.SIGTERM)
        held.begin()
        return self._watch(held.process, is_ours=True)

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
            while not has_ended(self.heartbeat.seconds):
                self.heartbeat.beat(process)
                reap_orphans(but=process)
        self.child = None
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) if is_ours else None
        return self._judge(process, code)

    def _judge(self, process: ProcessId, code: int | None) -> Judgement:
        attempt = Attempt(process, code, ended=time.time())
        judged = ending_of(self.folder, self.now, attempt, self.oom_before)
        if judged.is_failure:
            left = {*self.heartbeat.known, *descendants(identity())}
            left = {each for each in left if each.pid != self.heartbeat.gpu.process}
            end_all(list(left), SECONDS_FOR_LEFTOVERS)
        reap_orphans()
        if self.wanted.is_run:
            self.is_untold = complete_status(self.folder, attempt, judged)
        attempt = replace(attempt, code=judged.code, reason=judged.reason)
        self.now = replace(self.now, attempts=(*self.now.attempts[:-1], attempt))
        self._note("ended", self.now.state, pid=process.pid, **asdict(judged))
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
        if self.is_untold:
            self._after_run()

    def _after_run(self) -> None:
        from salt_vla.operations.session import after_run  # Only when its own process could not do it.

        try:
            after_run(RunDirectory(self.folder))
        except (OSError, UserError) as error:
            record_event(self.folder, "report failed", reason=str(error))

    def _is_unwanted(self) -> bool:
        return bool(self.signal_number) or asked_of(self.folder, self.now.token) is not None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if self.child is not None:
            void(self.child.send(signal.Signals(number)))

    def _note(self, event: str, state: State, **details: object) -> None:
        self.now = replace(self.now, state=state)
        record(self.folder, self.now)
        record_event(self.folder, event, **details)
