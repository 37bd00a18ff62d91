"""The queue: jobs, their states, and every change of one as a single transaction with its line of history.

Knows what jobs are and where they are kept; whether their conditions hold and how they run is `runner`'s.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from salt_vla.errors import RunError
from salt_vla.operations.conditions import OF_A_JOB
from salt_vla.operations.launch import Launch
from salt_vla.operations.processes import ProcessId
from salt_vla.operations.queue_jobs import (
    ACTIVE,
    IN_WORK,
    Event,
    Job,
    JobState,
    RunnerSeen,
    Wanted,
    active_of,
    fresh_name,
    is_paused,
    jobs_in,
    last_of,
    require_active,
)
from salt_vla.operations.queue_store import changing, reading
from salt_vla.operations.slots import require_own_name
from salt_vla.rundir import require_name, root

__all__ = ["ACTIVE", "Event", "Job", "JobState", "Queue", "RunnerSeen", "Wanted"]

QUEUE = "queue.db"


class Queue:
    """`queue.db` below the root, or the file given; made by the first change. Every method is one
    transaction, so any number of processes may use it."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.file = file if file is not None else root() / QUEUE
        self.clock = clock

    # What is there

    def jobs(self, ended: bool = True) -> list[Job]:
        """Every job: those in work, those that wait in their order, those that ended, the last first; of
        these only what others wait for, where not `ended`."""
        if not self.file.is_file():
            return []
        with reading(self.file) as connection:
            if ended:
                return jobs_in(connection)
            active = jobs_in(connection, "state IN ('waiting', 'starting', 'running')")
            known = {job.id for job in active}
            meant = {condition.job for job in active for condition in job.conditions} - known
            return active + jobs_in(connection, f"id IN ({', '.join(map(str, sorted(meant)))})")

    def job(self, name: str) -> Job:
        """The last that was added by this name. Raises `RunError` where there is none."""
        found = None
        if self.file.is_file():
            with reading(self.file) as connection:
                found = last_of(connection, name)
        if found is None:
            raise RunError(f"no job {name!r} is or was in the queue; `salt-vla queue ls --all` lists them")
        return found

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
            return is_paused(connection)

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
            name = wanted.name or fresh_name(connection, wanted.command)
            require_name(name, "job")
            require_own_name(name)
            # What a launch would refuse is refused now.
            Launch(name, wanted.command, "", wanted.restarts, processes=wanted.processes)
            before = active_of(connection, name)
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
            return jobs_in(connection, "id = ?", job)[0]

    def cancel(self, name: str) -> None:
        """Take a waiting job out. Raises `RunError` for one that has begun."""
        with changing(self.file) as connection:
            job = require_active(connection, name)
            if job.state != "waiting":
                raise RunError(f"job {name!r} is {job.state}; stop it with `salt-vla runs stop {name}`")
            self._end(connection, job, "cancelled", "taken out of the queue by hand")

    def retry(self, name: str) -> list[str]:
        """Put a job that did not end well at the end of the line again, and after it those that were skipped
        on its account, or on theirs; their names. Raises `RunError`."""
        with changing(self.file) as connection:
            jobs = jobs_in(connection)
            last = last_of(connection, name)
            if last is None:
                raise RunError(f"no job {name!r} was in the queue; `salt-vla queue ls --all` lists them")
            if not last.is_over or last.state == "finished":
                so = "ended well; add it again" if last.is_over else f"is {last.state}"
                raise RunError(f"job {name!r} {so}")
            again = [last]
            for job in sorted(jobs, key=lambda job: job.id):
                on = {condition.job for condition in job.conditions if condition.kind in OF_A_JOB}
                newest = last_of(connection, job.name) == job
                if job.state == "skipped" and newest and job != last and on & {each.id for each in again}:
                    again.append(job)
            for job in again:
                self._wait_again(
                    connection, job, "by hand" if job == last else f"since {name} is tried again"
                )
            return [job.name for job in again]

    def _wait_again(self, connection: sqlite3.Connection, job: Job, why: str) -> None:
        connection.execute(
            "UPDATE jobs SET state = 'waiting', reason = '', ran_on = '', started = NULL, ended = NULL, "
            "place = (SELECT max(place) + 1 FROM jobs) WHERE id = ?",
            (job.id,),
        )
        self._note(connection, job.id, "retried", why)

    def move(self, name: str, before: str | None = None, last: bool = False) -> None:
        """To the head of the line, in front of the job `before`, or to its end. Raises `RunError`."""
        with changing(self.file) as connection:
            line = jobs_in(connection, "state = 'waiting'")
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
            job = require_active(connection, name)
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
            return jobs_in(connection, "id = ?", job.id)[0]

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
