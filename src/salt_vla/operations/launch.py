"""Starting a command so that it outlives whoever asked for it: what is asked for, where it is written down,
and the supervisor that carries it out. The same token starts nothing twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from salt_vla.errors import RunError
from salt_vla.operations.processes import ProcessId, start_detached
from salt_vla.rundir import flush_folder, read_json, require_name, root, write_text, writing_to

LAUNCH, SUPERVISION, EVENTS = "launch.json", "supervision.json", "events.jsonl"
SUPERVISOR_LOG = "supervisor.log"
SECONDS_TO_START = 30.0
State = Literal["starting", "running", "waiting", "ended"]


@dataclass(frozen=True)
class Launch:
    """What is asked for: `command` are salt-vla's arguments, `token` names this one start of it, whoever asks
    for it however often. `restarts`: how often it may be started again after a failure, the first time after
    `backoff_seconds`, then after twice as many, and so on. `environment`: variables added to the own."""

    name: str
    command: tuple[str, ...]
    token: str
    restarts: int = 0
    backoff_seconds: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name(self.name, "run")

    @property
    def folder(self) -> Path:
        """A run's own directory, or `jobs/NAME` for a command that has none."""
        return root() / ("runs" if self.command[0] == "train" else "jobs") / self.name


@dataclass(frozen=True)
class Attempt:
    """One process of a launched command. `code` as the system says it: negative for a signal; None while it
    works, and where nobody was there to see it end."""

    process: ProcessId
    code: int | None = None
    reason: str = ""
    ended: float = 0.0


@dataclass(frozen=True)
class Supervision:
    """What `supervision.json` holds: how a launch goes."""

    token: str
    state: State
    supervisor: ProcessId
    attempts: tuple[Attempt, ...] = ()
    restarts_left: int = 0
    exit_reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.state == "ended"

    @property
    def ended_well(self) -> bool:
        return self.is_over and bool(self.attempts) and self.attempts[-1].code == 0


def launch(wanted: Launch) -> Supervision:
    """Start `wanted` under a supervisor of its own and return when that is at work. A token that has been
    started before starts nothing: what became of it is returned. Raises `RunError` while another launch of
    the name is at work."""
    folder = wanted.folder
    with _one_at_a_time(folder):
        before = supervision(folder)
        if before is not None and before.token == wanted.token:
            return before
        if before is not None and not before.is_over and before.supervisor.is_alive():
            raise RunError(
                f"{wanted.name!r} is under way (supervisor {before.supervisor.pid}); "
                f"stop it first with `salt-vla runs stop {wanted.name}`"
            )
        write_text(folder / LAUNCH, json.dumps(asdict(wanted), indent=2))
        command = [sys.executable, "-m", "salt_vla", "runs", "supervise", str(folder)]
        environment = os.environ | {"SALT_VLA_ROOT": str(root())}
        process = start_detached(command, folder / SUPERVISOR_LOG, environment)
        return _wait_until_at_work(folder, wanted, process)


def _wait_until_at_work(folder: Path, wanted: Launch, process: ProcessId) -> Supervision:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        now = supervision(folder)
        if now is not None and now.token == wanted.token:
            return now
        if not process.is_alive():
            break
        time.sleep(0.02)
    raise RunError(f"the supervisor of {wanted.name!r} did not start; {folder / SUPERVISOR_LOG} says why")


def wanted_in(folder: Path) -> Launch:
    """What `launch.json` asks for."""
    held = read_json(folder / LAUNCH, dict, "start it again with --detach")
    try:
        return Launch(**held | {"command": tuple(held["command"])})
    except (TypeError, KeyError) as error:
        raise RunError(f"{folder / LAUNCH} is damaged ({error}); start it again with --detach") from error


def supervision(folder: Path) -> Supervision | None:
    """What `supervision.json` says; None where nothing was ever launched there. A supervisor that is gone
    leaves its last word: `state` is not `ended` then, and `supervisor.is_alive()` false."""
    file = folder / SUPERVISION
    if not file.is_file():
        return None
    held = read_json(file, dict, "remove it, and start the run again")
    try:
        attempts = tuple(
            Attempt(**attempt | {"process": ProcessId(**attempt["process"])}) for attempt in held["attempts"]
        )
        return Supervision(**held | {"supervisor": ProcessId(**held["supervisor"]), "attempts": attempts})
    except (TypeError, KeyError) as error:
        raise RunError(f"{file} is damaged ({error}); remove it, and start the run again") from error


def record(folder: Path, now: Supervision) -> None:
    write_text(folder / SUPERVISION, json.dumps(asdict(now), indent=2))


def changed(now: Supervision, process: ProcessId, **changes: object) -> Supervision:
    """With the attempt of that process changed."""
    attempts = (replace(a, **changes) if a.process == process else a for a in now.attempts)  # type: ignore[arg-type]
    return replace(now, attempts=tuple(attempts))


def record_event(folder: Path, what: str, **details: object) -> None:
    """One line of what happened and when, on disk when this returns."""
    line = json.dumps({"time": round(time.time(), 3), "event": what} | details)
    with writing_to(folder / EVENTS), (folder / EVENTS).open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
        lock = (folder / ".launch").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        yield


def fresh_name(noun: str) -> str:
    """A name for a command that has none of its own: what it is and when it was asked for."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{noun}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
