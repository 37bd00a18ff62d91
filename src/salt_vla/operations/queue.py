"""The queue: jobs, their states, and every change of one as a single transaction with its line of history.

Knows what jobs are and where they are kept; whether their conditions hold and how they run is `runner`'s.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from salt_vla.errors import RunError
from salt_vla.operations.conditions import OF_A_JOB, Condition
from salt_vla.operations.launch import Launch
from salt_vla.operations.processes import ProcessId
from salt_vla.operations.queue_store import changing, reading
from salt_vla.rundir import require_name, root

JobState = Literal["waiting", "starting", "running", "finished", "failed", "stopped", "skipped", "cancelled"]
ACTIVE: tuple[JobState, ...] = ("waiting", "starting", "running")
IN_WORK: tuple[JobState, ...] = ("starting", "running")
QUEUE = "queue.db"


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


class Queue:
    """`queue.db` below the root, or the file given; made by the first change. Every method is one
    transaction, so any number of processes may use it."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.file = file if file is not None else root() / QUEUE
        self.clock = clock

    # What is there

    def jobs(self) -> list[Job]:
        """Every job: those in work, those that wait in their order, those that ended, the last first."""
        if not self.file.is_file():
            return []
        with reading(self.file) as connection:
            return _jobs(connection)

    def job(self, name: str) -> Job:
        """The last that was added by this name. Raises `RunError` where there is none."""
        found = [job for job in self.jobs() if job.name == name]
        if not found:
            raise RunError(f"no job {name!r} is or was in the queue; `salt-vla queue ls --all` lists them")
        return max(found, key=lambda job: job.id)

    def history(self, name: str | None = None) -> list[Event]:
        """All that happened, in order; with a name, to its jobs."""
        if not self.file.is_file():
            return []
        with reading(self.file) as connection:
            rows = connection.execute(
                "SELECT history.id, time, coalesce(jobs.name, '') AS job, event, why "
                "FROM history LEFT JOIN jobs ON jobs.id = history.job ORDER BY history.id"
            )
            return [Event(**row) for row in rows if name is None or row["job"] == name]

    def is_paused(self) -> bool:
        if not self.file.is_file():
            return False
        with reading(self.file) as connection:
            return _is_paused(connection)

    def runners(self) -> list[RunnerSeen]:
        if not self.file.is_file():
            return []
        with reading(self.file) as connection:
            rows = connection.execute("SELECT * FROM runners ORDER BY slot").fetchall()
        return [RunnerSeen(r["slot"], ProcessId(**json.loads(r["process"])), r["since"]) for r in rows]

    # What a person asks for

    def add(self, wanted: Wanted) -> Job:
        """At the end of the line. Raises `RunError` where a job of the name is still in the queue."""
        with changing(self.file) as connection:
            name = wanted.name or _fresh_name(connection, wanted.command)
            require_name(name, "job")
            before = _active(connection, name)
            if before is not None:
                raise RunError(
                    f"a job {name!r} is in the queue already, and {before.state}; give another --name, or "
                    f"take it out with `salt-vla queue cancel {name}`"
                )
            job = connection.execute(
                "INSERT INTO jobs "
                "(name, command, directory, slot, restarts, processes, conditions, added, place, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, (SELECT coalesce(max(place), 0) + 1 FROM jobs), 'waiting')",
                (
                    name,
                    json.dumps(wanted.command),
                    wanted.directory,
                    wanted.slot,
                    wanted.restarts,
                    wanted.processes,
                    json.dumps([asdict(condition) for condition in wanted.conditions]),
                    self.clock(),
                ),
            ).lastrowid
            waits = "; ".join(f"waits for {condition}" for condition in wanted.conditions)
            self._note(connection, job, "added", waits or "waits for its turn")
            return next(found for found in _jobs(connection) if found.id == job)

    def cancel(self, name: str) -> None:
        """Take a waiting job out. Raises `RunError` for one that has begun."""
        with changing(self.file) as connection:
            job = _require_active(connection, name)
            if job.state != "waiting":
                raise RunError(f"job {name!r} is {job.state}; stop it with `salt-vla runs stop {name}`")
            self._end(connection, job, "cancelled", "taken out of the queue by hand")

    def retry(self, name: str) -> list[str]:
        """Put a job that did not end well at the end of the line again, and after it those that were skipped
        on its account, or on theirs; their names. Raises `RunError`."""
        with changing(self.file) as connection:
            jobs = _jobs(connection)
            last = max((job for job in jobs if job.name == name), key=lambda job: job.id, default=None)
            if last is None:
                raise RunError(f"no job {name!r} was in the queue; `salt-vla queue ls --all` lists them")
            if not last.is_over or last.state == "finished":
                so = "ended well; add it again" if last.is_over else f"is {last.state}"
                raise RunError(f"job {name!r} {so}")
            again = [last]
            for job in sorted(jobs, key=lambda job: job.id):
                on = {condition.job for condition in job.conditions if condition.kind in OF_A_JOB}
                if job.state == "skipped" and job != last and on & {other.id for other in again}:
                    again.append(job)
            for job in again:
                self._wait_again(
                    connection, job, "by hand" if job == last else f"since {name} is tried again"
                )
            return [job.name for job in again]

    def _wait_again(self, connection: sqlite3.Connection, job: Job, why: str) -> None:
        other = _active(connection, job.name)
        if other is not None:
            raise RunError(
                f"a newer job {job.name!r} is {other.state}; retry cannot bring the older one back"
            )
        connection.execute(
            "UPDATE jobs SET state = 'waiting', reason = '', ran_on = '', started = NULL, ended = NULL, "
            "place = (SELECT max(place) + 1 FROM jobs) WHERE id = ?",
            (job.id,),
        )
        self._note(connection, job.id, "retried", why)

    def move(self, name: str, before: str | None = None, last: bool = False) -> None:
        """To the head of the line, in front of the job `before`, or to its end. Raises `RunError`."""
        with changing(self.file) as connection:
            line = [job for job in _jobs(connection) if job.state == "waiting"]
            names = [job.name for job in line]
            for wanted in (name, *([before] if before is not None else [])):
                if wanted not in names:
                    raise RunError(
                        f"no job {wanted!r} waits in the queue; `salt-vla queue ls` lists those that do"
                    )
            if name == before:
                return
            job = line.pop(names.index(name))
            rest = [other.name for other in line]
            line.insert(len(rest) if last else rest.index(before) if before is not None else 0, job)
            for place, other in enumerate(line):
                connection.execute("UPDATE jobs SET place = ? WHERE id = ?", (place, other.id))
            where = "to the end" if last else f"before {before}" if before is not None else "to the head"
            self._note(
                connection, job.id, "moved", f"{where} of the line, by hand" if before is None else where
            )

    def pause(self, name: str | None = None, resume: bool = False) -> None:
        """Start no further job, or not this one; or do so again. What runs goes on. Raises `RunError`."""
        event, held = ("resumed", 0) if resume else ("paused", 1)
        with changing(self.file) as connection:
            if name is None:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('paused', ?)", (str(held),))
                self._note(connection, None, event, "by hand")
                return
            job = _require_active(connection, name)
            if job.state != "waiting":
                raise RunError(f"job {name!r} is {job.state}, not waiting")
            connection.execute("UPDATE jobs SET held = ? WHERE id = ?", (held, job.id))
            self._note(connection, job.id, event, "by hand")

    # What a runner does

    def take(self, job: Job, slot: str) -> Job | None:
        """Make a waiting job this slot's, to be started now; None where somebody else was first, the slot has
        a job in work, or it may not start any more."""
        with changing(self.file) as connection:
            taken = connection.execute(
                "UPDATE jobs SET state = 'starting', attempt = attempt + 1, ran_on = :slot, started = :now, "
                "reason = '' WHERE id = :id AND state = 'waiting' AND NOT held AND attempt = :attempt "
                "AND NOT EXISTS (SELECT 1 FROM meta WHERE key = 'paused' AND value = '1') AND NOT EXISTS "
                "(SELECT 1 FROM jobs AS other WHERE other.ran_on = :slot "
                "AND other.state IN ('starting', 'running'))",
                {"slot": slot, "now": self.clock(), "id": job.id, "attempt": job.attempt},
            ).rowcount
            if not taken:
                return None
            self._note(
                connection, job.id, "taken", f"by the runner of {slot}: all that it waited for is there"
            )
            return next(found for found in _jobs(connection) if found.id == job.id)

    def mark_running(self, job: Job, why: str) -> None:
        with changing(self.file) as connection:
            if self._leave(connection, job, ("starting",), "running", why):
                self._note(connection, job.id, "started", why)

    def put_back(self, job: Job, why: str) -> None:
        """A job that was taken and could not be started waits again."""
        with changing(self.file) as connection:
            if self._leave(connection, job, ("starting",), "waiting", why):
                connection.execute("UPDATE jobs SET ran_on = '', started = NULL WHERE id = ?", (job.id,))
                self._note(connection, job.id, "put back", why)

    def end(self, job: Job, state: JobState, why: str) -> None:
        """Of a job that was taken; nothing where it has been written down already."""
        with changing(self.file) as connection:
            self._end(connection, job, state, why, IN_WORK)

    def skip(self, job: Job, why: str) -> None:
        """A waiting job that can never start."""
        with changing(self.file) as connection:
            self._end(connection, job, "skipped", why)

    def note(self, job: Job | None, event: str, why: str) -> None:
        """A line of history that changes nothing."""
        with changing(self.file) as connection:
            self._note(connection, job.id if job is not None else None, event, why)

    def note_runner(self, slot: str, process: ProcessId) -> None:
        with changing(self.file) as connection:
            row = (slot, json.dumps(asdict(process)), self.clock())
            connection.execute("INSERT OR REPLACE INTO runners VALUES (?, ?, ?)", row)
            self._note(connection, None, "runner started", f"slot {slot}, process {process.pid}")

    def note_runner_gone(self, slot: str, why: str) -> None:
        with changing(self.file) as connection:
            connection.execute("DELETE FROM runners WHERE slot = ?", (slot,))
            self._note(connection, None, "runner ended", f"slot {slot}: {why}")

    def _end(
        self,
        connection: sqlite3.Connection,
        job: Job,
        state: JobState,
        why: str,
        before: Sequence[JobState] = ("waiting",),
    ) -> None:
        if self._leave(connection, job, before, state, why):
            connection.execute("UPDATE jobs SET ended = ? WHERE id = ?", (self.clock(), job.id))
            self._note(connection, job.id, state, why)

    def _leave(
        self, connection: sqlite3.Connection, job: Job, before: Sequence[JobState], after: JobState, why: str
    ) -> bool:
        """Whether this start of the job was in one of the states `before`, and is in `after` now."""
        marks = ", ".join("?" * len(before))
        return bool(
            connection.execute(
                f"UPDATE jobs SET state = ?, reason = ? WHERE id = ? AND attempt = ? AND state IN ({marks})",
                (after, why, job.id, job.attempt, *before),
            ).rowcount
        )

    def _note(self, connection: sqlite3.Connection, job: int | None, event: str, why: str) -> None:
        row = (self.clock(), job, event, why)
        connection.execute("INSERT INTO history (time, job, event, why) VALUES (?, ?, ?, ?)", row)


def _jobs(connection: sqlite3.Connection) -> list[Job]:
    queue = connection.execute("SELECT value FROM meta WHERE key = 'queue'").fetchone()[0]
    order = (
        "CASE WHEN state IN ('starting', 'running') THEN 0 WHEN state = 'waiting' THEN 1 ELSE 2 END, "
        "CASE WHEN state = 'waiting' THEN place ELSE -coalesce(ended, id) END, id"
    )
    return [_job(row, queue) for row in connection.execute(f"SELECT * FROM jobs ORDER BY {order}")]


def _job(row: sqlite3.Row, queue: str) -> Job:
    held = dict(row)
    del held["place"]
    try:
        conditions = tuple(Condition(**each) for each in json.loads(held["conditions"]))
        changed = {"command": tuple(json.loads(held["command"])), "conditions": conditions}
    except (ValueError, TypeError) as error:
        raise RunError(
            f"job {held['name']!r} is damaged in the queue's file ({error}); move that away"
        ) from error
    token = f"{queue}-{held['id']}-{held['attempt']}"
    return Job(**held | changed | {"held": bool(held["held"]), "token": token})


def _active(connection: sqlite3.Connection, name: str) -> Job | None:
    return next((job for job in _jobs(connection) if job.name == name and not job.is_over), None)


def _require_active(connection: sqlite3.Connection, name: str) -> Job:
    job = _active(connection, name)
    if job is None:
        raise RunError(f"no job {name!r} waits or runs; `salt-vla queue ls` lists those that do")
    return job


def _is_paused(connection: sqlite3.Connection) -> bool:
    row = connection.execute("SELECT value FROM meta WHERE key = 'paused'").fetchone()
    return row is not None and row[0] == "1"


def _fresh_name(connection: sqlite3.Connection, command: Sequence[str]) -> str:
    """The command's first words, with a number that no job has had."""
    base = "-".join(word for word in command[:2] if not word.startswith("-"))
    taken = {row[0] for row in connection.execute("SELECT name FROM jobs")}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{base}-{n}") not in taken)
