"""Stopping, killing and starting again by name, whatever started the run or job: processes are known by their
identity, never by their command line, and it is written down who asked before anything is done.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from salt_vla.errors import RunError
from salt_vla.identity import ProcessId
from salt_vla.operations.asked import Asked, ask, asked_of
from salt_vla.operations.launch import LAUNCH, Supervision, launch, supervision, take_over, wanted_in
from salt_vla.operations.processes import descendants, end_all
from salt_vla.rundir import RunDirectory, Status, require_name, root

SECONDS_A_LOOK = 0.1
SECONDS_TO_DIE = 30.0


@dataclass(frozen=True)
class Working:
    """What is to be ended: the process that works (None between two attempts) and, where a supervisor lives
    that would start it again, the launch's token."""

    name: str
    folder: Path
    process: ProcessId | None
    now: Supervision | None

    @property
    def token(self) -> str:
        return self.now.token if self.now is not None and not self.now.is_over else ""

    @property
    def supervisor(self) -> ProcessId | None:
        return self.now.supervisor if self.now is not None and self.now.is_at_work else None

    @property
    def is_over(self) -> bool:
        return self.process is None and self.supervisor is None

    def asked(self) -> Asked | None:
        return asked_of(self.folder, self.token, self.process)


def find(name: str) -> Path:
    """The folder of the run or job; of two of that name the one at work. Raises `RunError` for none."""
    require_name(name, "run")
    places = [root() / "runs" / name, root() / "jobs" / name]
    there = [place for place in places if RunDirectory(place).exists() or (place / LAUNCH).is_file()]
    if not there:
        raise RunError(f"there is no run or job {name!r} below {root()}; `salt-vla runs ls` lists the runs")
    return next((place for place in there if not working_in(place).is_over), there[0])


def working_in(folder: Path) -> Working:
    """What works there now."""
    now = supervision(folder)
    process = now.living() if now is not None else None
    with suppress(RunError):  # A damaged status hides no process that a supervisor knows.
        status = RunDirectory(folder).status()
        # Of several processes that of the run, not the one that started them all.
        process = status.process if status.state == "running" else process
    return Working(folder.name, folder, process, now)


def stop(name: str, wait_seconds: float, say: Callable[[str], None]) -> str:
    """Ask for an end after the step at hand and its checkpoint, and wait for it; how it ended, as a sentence.
    Asked again it waits again: nothing is cut short. Raises `RunError` where nothing works or it takes
    longer."""
    working = _require_working(name)
    if working.asked() is None:
        ask(working.folder, "stop", working.token, working.process)
        _send(working, working.process or working.supervisor, signal.SIGTERM)
    elif working.process is not None:
        say(f"{name} has been asked to stop already")
    until = time.monotonic() + wait_seconds
    last = -1
    while not working_in(working.folder).is_over:
        if time.monotonic() > until:
            raise RunError(
                f"{name!r} is still at work after {wait_seconds:g} s{_at_step(working.folder)}; wait longer "
                f"with --wait, or end it without a checkpoint: `salt-vla runs kill {name}`"
            )
        step = _status(working.folder).step
        if step != last:
            say(f"{name}: waiting for the end of its step{_at_step(working.folder)}")
            last = step
        time.sleep(SECONDS_A_LOOK)
    return _how_it_ended(working)


def kill(name: str) -> str:
    """SIGKILL to the run and all below it; how it ended. Its last checkpoint is what is left. Raises
    `RunError` where nothing works."""
    working = _require_working(name)
    ask(working.folder, "kill", working.token, working.process)
    leader = working.now.living() if working.now is not None else None
    doomed = [each for each in (leader, working.process) if each is not None]
    for process in doomed:
        _send(working, process, signal.SIGSTOP)  # What is stopped starts no more processes.
    below = [each for process in doomed for each in descendants(process)]
    end_all([*doomed, *below])
    if working.process is None and working.supervisor is not None:
        _send(working, working.supervisor, signal.SIGTERM)
    until = time.monotonic() + SECONDS_TO_DIE
    while not working_in(working.folder).is_over:
        if time.monotonic() > until:
            raise RunError(
                f"{name!r} has been killed, and the system has not let go of it yet; look again later"
            )
        time.sleep(SECONDS_A_LOOK)
    if working.token and working.supervisor is None:
        take_over(working.folder)  # Which finds out that it is over, and writes that down.
    status = _status(working.folder)
    if not working.token and status.state == "killed" and working.asked() is not None:
        by = working.asked()
        assert by is not None
        reason = f"killed {by.words}"
        RunDirectory(working.folder).set_status(replace(status, exit_reason=reason, ended=time.time()))
    return _how_it_ended(working)


def restart(name: str) -> Supervision:
    """Start once more what was launched under that name, from where it stands. Raises `RunError` where it
    works, or was never launched."""
    folder = find(name)
    wanted, working = wanted_in(folder), working_in(folder)
    if working.supervisor is None and working.process is not None and working.token:
        return take_over(folder)
    if not working.is_over:
        raise RunError(f"{name!r} is at work; stop it first with `salt-vla runs stop {name}`")
    return launch(replace(wanted, token=uuid4().hex))


def _require_working(name: str) -> Working:
    working = working_in(find(name))
    if working.is_over:
        raise RunError(f"{name!r} is not at work: {_how_it_ended(working)}")
    return working


def _send(working: Working, process: ProcessId | None, number: signal.Signals) -> None:
    try:
        if process is not None:
            process.send(number)
    except PermissionError:
        raise RunError(
            f"{working.name!r} belongs to another user; ask that one, or root, to end it"
        ) from None


def _status(folder: Path) -> Status:
    with suppress(RunError):
        return RunDirectory(folder).status()
    return Status("damaged")


def _at_step(folder: Path) -> str:
    status = _status(folder)
    return f", at step {status.step} of {status.total_steps}" if status.total_steps else ""


def _how_it_ended(working: Working) -> str:
    """From the run's own word, or else its supervisor's."""
    status, now = _status(working.folder), supervision(working.folder)
    if status.exit_reason:
        return status.exit_reason
    return now.exit_reason if now is not None and now.exit_reason else status.state
