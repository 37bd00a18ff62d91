"""What a job of the queue is, and how jobs are read from its tables."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from salt_vla.errors import RunError
from salt_vla.operations.conditions import Condition
from salt_vla.operations.launch import Launch
from salt_vla.operations.processes import ProcessId

JobState = Literal["waiting", "starting", "running", "finished", "failed", "stopped", "skipped", "cancelled"]
ACTIVE: tuple[JobState, ...] = ("waiting", "starting", "running")
IN_WORK: tuple[JobState, ...] = ("starting", "running")


@dataclass(frozen=True)
class Job:
    """A line of the queue. `command`: salt-vla's arguments, run from `directory`. `slot`: where it may run,
    `ran_on`: where it does or did. `processes`: so many, by torchrun. `attempt` counts its
    starts by the queue, from 1. `held`: paused by name.
    Times in seconds since the epoch. `token` names this one start beyond doubt."""

    id: int
    name: str
    command: tuple[str, ...]
    directory: str
    slot: str
    restarts: int
    processes: int
    conditions: tuple[Condition, ...]
    state: JobState
    held: bool
    attempt: int
    ran_on: str
    reason: str
    added: float
    started: float | None
    ended: float | None
    token: str

    @property
    def launch(self) -> Launch:
        """This start of it, wherever it is to run."""
        where = {"directory": self.directory, "processes": self.processes}
        return Launch(self.name, self.command, self.token, self.restarts, **where)  # type: ignore[arg-type]

    @property
    def folder(self) -> Path:
        """Where its launch is written down: the run's own directory, or `jobs/NAME`."""
        return self.launch.folder

    @property
    def is_run(self) -> bool:
        return self.launch.is_run

    @property
    def is_over(self) -> bool:
        return self.state not in ACTIVE

    def to_json(self) -> dict[str, Any]:
        row = {key: value for key, value in asdict(self).items() if key != "token"}
        return row | {"conditions": [asdict(c) | {"says": str(c)} for c in self.conditions]}


@dataclass(frozen=True)
class Event:
    """A line of history: what happened to which job, when (seconds since the epoch) and why."""

    id: int
    time: float
    job: str
    event: str
    why: str


@dataclass(frozen=True)
class RunnerSeen:
    """Who took a slot last. Whether it still works is `process.is_alive()`."""

    slot: str
    process: ProcessId
    since: float


@dataclass(frozen=True)
class Wanted:
    """A job that is to be added. Without a `name` one is made of the command's words."""

    command: tuple[str, ...]
    directory: str
    name: str = ""
    slot: str = "any"
    restarts: int = 0
    processes: int = 1
    conditions: tuple[Condition, ...] = ()


def jobs_in(connection: sqlite3.Connection, which: str = "TRUE", *values: object) -> list[Job]:
    """Those in work, those that wait in their order, those that ended, the last first. `which` is a text of
    ours; what others have written goes into `values`."""
    queue = connection.execute("SELECT value FROM meta WHERE key = 'queue'").fetchone()[0]
    order = (
        "CASE WHEN state IN ('starting', 'running') THEN 0 WHEN state = 'waiting' THEN 1 ELSE 2 END, "
        "CASE WHEN state = 'waiting' THEN place ELSE -coalesce(ended, id) END, id"
    )
    rows = connection.execute(f"SELECT * FROM jobs WHERE {which} ORDER BY {order}", values)
    return [_job(row, queue) for row in rows]


_FIELDS = {field.name for field in fields(Job)}


def _job(row: sqlite3.Row, queue: str) -> Job:
    # Columns of another version are passed over; one process is what there was before there could be several.
    held = {"processes": 1} | {name: row[name] for name in row.keys() if name in _FIELDS}  # noqa: SIM118
    lacking = sorted(_FIELDS - held.keys() - {"token"})
    if lacking:
        raise RunError(f"the queue's file lacks {', '.join(lacking)} of its jobs; move it away")
    try:
        conditions = tuple(Condition(**each) for each in json.loads(held["conditions"]))
        changed = {"command": tuple(json.loads(held["command"])), "conditions": conditions}
    except (ValueError, TypeError) as error:
        raise RunError(
            f"job {held['name']!r} is damaged in the queue's file ({error}); move that away"
        ) from error
    token = f"{queue}-{held['id']}-{held['attempt']}"
    return Job(**held | changed | {"held": bool(held["held"]), "token": token})


def active_of(connection: sqlite3.Connection, name: str) -> Job | None:
    job = last_of(connection, name)
    return job if job is not None and not job.is_over else None


def last_of(connection: sqlite3.Connection, name: str) -> Job | None:
    """The newest of that name: of the active ones there is at most one, and no newer one."""
    return max(jobs_in(connection, "name = ?", name), key=lambda job: job.id, default=None)


def require_active(connection: sqlite3.Connection, name: str) -> Job:
    job = active_of(connection, name)
    if job is None:
        raise RunError(f"no job {name!r} waits or runs; `salt-vla queue ls` lists those that do")
    return job


def is_paused(connection: sqlite3.Connection) -> bool:
    row = connection.execute("SELECT value FROM meta WHERE key = 'paused'").fetchone()
    return row is not None and row[0] == "1"


def fresh_name(connection: sqlite3.Connection, command: Sequence[str]) -> str:
    """The command's first words, with a number that no job has had."""
    base = "-".join(word for word in command[:2] if not word.startswith("-"))
    taken = {row[0] for row in connection.execute("SELECT name FROM jobs")}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{base}-{n}") not in taken)
