"""Starting a command so that it outlives whoever asked for it: what is asked for, where it is written down,
and the supervisor that carries it out. The same token starts nothing twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from salt_vla.errors import ConfigError, RunError
from salt_vla.operations.processes import ProcessId, salt_vla, start_apart
from salt_vla.redaction import NAMED_SO, redacted
from salt_vla.rundir import (
    ROOT,
    flush_folder,
    is_count,
    is_time,
    read_json,
    require_name,
    root,
    write_text,
    writing_to,
)

LAUNCH, SUPERVISION, EVENTS = "launch.json", "supervision.json", "events.jsonl"
SUPERVISOR_LOG = "supervisor.log"
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_BE_SEEN = 10.0
State = Literal["starting", "running", "waiting", "ended"]


@dataclass(frozen=True)
class Launch:
    """What is asked for: `command` are salt-vla's arguments, `token` names this one start of it, whoever asks
    for it however often. `restarts`: how often it may be started again after a failure, the first time after
    `backoff_seconds`, then after twice as many, and so on. `environment`: variables added to the own.
    `directory`: where it works; by default where it is launched. `processes`: so many, by torchrun."""

    name: str
    command: tuple[str, ...]
    token: str
    restarts: int = 0
    backoff_seconds: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = ""
    processes: int = 1

    def __post_init__(self) -> None:
        require_name(self.name, "run")
        if not self.command:
            raise RunError(f"{self.name!r} has no command to start; give one of `salt-vla --help`")
        if self.restarts < 0:
            raise ConfigError(f"--restarts must be at least 0, not {self.restarts}")
        if self.processes < 1:
            raise ConfigError(f"--processes must be at least 1, not {self.processes}")
        secrets = [name for name in self.environment if NAMED_SO.search(name)]
        if secrets:
            raise RunError(
                f"{', '.join(secrets)} would be written into {LAUNCH}; set it in the environment of the "
                "command that launches"
            )

    @property
    def is_run(self) -> bool:
        return self.command[0] == "train" or self.command[:2] == ("teacher", "train")

    @property
    def folder(self) -> Path:
        """A run's own directory, or `jobs/NAME` for a command that has none."""
        return root() / ("runs" if self.is_run else "jobs") / self.name


@dataclass(frozen=True)
class Attempt:
    """One process of a launched command. `code` as the system says it: negative for a signal; None while it
    works, and where nobody was there to see it end. `ended`: seconds since the epoch."""

    process: ProcessId
    code: int | None = None
    reason: str = ""
    ended: float = 0.0


@dataclass(frozen=True)
class Supervision:
    """What `supervision.json` holds: how a launch goes. `keeper`: the scope of the user's service manager
    that it lives in; empty for a session of its own alone."""

    token: str
    state: State
    supervisor: ProcessId
    attempts: tuple[Attempt, ...] = ()
    restarts_left: int = 0
    exit_reason: str = ""
    keeper: str = ""

    @property
    def is_over(self) -> bool:
        return self.state == "ended"

    @property
    def is_at_work(self) -> bool:
        """Whether somebody carries it out; false for one whose supervisor was lost before its end."""
        return not self.is_over and self.supervisor.is_alive()

    @property
    def ended_well(self) -> bool:
        return self.is_over and bool(self.attempts) and self.attempts[-1].code == 0

    def living(self) -> ProcessId | None:
        """The process of the last attempt, while it works."""
        last = self.attempts[-1].process if self.attempts else None
        return last if last is not None and last.is_alive() else None


def launch(wanted: Launch) -> Supervision:
    """Start `wanted` under a supervisor of its own and return when that is at work. A token that has been
    started before starts nothing: what became of it is returned, and where its supervisor was lost another
    one takes over. Raises `RunError` while another launch of the name is at work."""
    folder = wanted.folder
    wanted = wanted if wanted.directory else replace(wanted, directory=str(Path.cwd()))
    with _one_at_a_time(folder):
        before = supervision(folder)
        if before is None or before.token != wanted.token:
            require_free(wanted.name, before)
            write_text(folder / LAUNCH, json.dumps(asdict(wanted), indent=2))
        elif before.is_over or before.is_at_work:
            return before
        return _start_supervisor(folder, wanted)


def take_over(folder: Path) -> Supervision:
    """Another supervisor for a launch that has lost its own: it goes on where that one was. Raises `RunError`
    where nothing was launched."""
    return launch(wanted_in(folder))


def require_free(name: str, before: Supervision | None) -> None:
    """A `RunError` while a launch is at work, under its supervisor or without."""
    if before is not None and (before.is_at_work or before.living()):
        who = before.living() or before.supervisor
        raise RunError(
            f"{name!r} is under way (process {who.pid}); stop it first with `salt-vla runs stop {name}`"
        )


def _start_supervisor(folder: Path, wanted: Launch) -> Supervision:
    """Returns when supervision.json speaks of this launch and its supervisor lives, or has ended already."""
    command = salt_vla("runs", "supervise", str(folder), "--apart")
    environment = os.environ | {ROOT: str(root())}
    unit = f"salt-vla-{wanted.name}-{wanted.token[:12]}-{time.time_ns():x}.scope"
    failed: RunError | None = None
    try:
        start_apart(command, folder / SUPERVISOR_LOG, environment, unit)
    except RunError as error:
        failed = error
    # A supervisor whose launcher was killed may be about to say so; another one has been refused then.
    until = time.monotonic() + (SECONDS_TO_BE_SEEN if failed else 0)
    while True:
        now = supervision(folder)
        if now is not None and now.token == wanted.token and (now.is_over or now.supervisor.is_alive()):
            return now
        if time.monotonic() >= until:
            raise failed or RunError(f"the supervisor ended at once; {folder / SUPERVISOR_LOG} says why")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def wanted_in(folder: Path) -> Launch:
    """What `launch.json` asks for. Raises `RunError` where there is none."""
    cure = "start it again with --detach"
    if not (folder / LAUNCH).is_file():
        raise RunError(f"{folder} was not started with --detach or by the queue: it has no {LAUNCH}; {cure}")
    held = read_json(folder / LAUNCH, dict, cure)
    try:
        wanted = Launch(**held | {"command": tuple(held["command"])})
        if not all(type(word) is str for word in wanted.command):
            raise TypeError("a command of words that are none")
    except (TypeError, KeyError) as error:
        raise RunError(f"{folder / LAUNCH} is damaged ({error}); {cure}") from error
    if wanted.name != folder.name:
        raise RunError(f"{folder / LAUNCH} is that of {wanted.name!r}, of which this is a copy; {cure}")
    return wanted


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
        found = Supervision(**held | {"supervisor": ProcessId(**held["supervisor"]), "attempts": attempts})
        _require_kinds(found)
        return found
    except (TypeError, KeyError) as error:
        raise RunError(f"{file} is damaged ({error}); remove it, and start the run again") from error


def _require_kinds(now: Supervision) -> None:
    """Raises `TypeError`: what reads them asks the system for these processes, and joins these words."""
    for process in (now.supervisor, *(each.process for each in now.attempts)):
        if not (is_count(process.pid) and is_count(process.ticks) and is_time(process.started)):
            raise TypeError(f"no process: {process}")
    words = (now.token, now.state, now.exit_reason, now.keeper, *(each.reason for each in now.attempts))
    if not all(type(word) is str for word in words) or not is_count(now.restarts_left):
        raise TypeError("words that are none")
    if not all(is_time(each.ended) and type(each.code) in (int, type(None)) for each in now.attempts):
        raise TypeError("an attempt without its end")


def record(folder: Path, now: Supervision) -> None:
    write_text(folder / SUPERVISION, json.dumps(asdict(now), indent=2))


def record_event(folder: Path, what: str, **details: Any) -> None:
    """One line of what happened and when, on disk when this returns."""
    line = json.dumps({"time": round(time.time(), 3), "event": what} | redacted(details))
    with writing_to(folder / EVENTS), (folder / EVENTS).open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = f"\n{line}"  # After a line that a crash cut off.
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened there, in order; a line that a crash cut off is left out."""
    file = folder / EVENTS
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


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
