"""The queue's runner: one for each device slot, which starts one job after another and writes down how each
ended. It may be killed between any two lines: what it had begun is found again by the job's token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from salt_vla.errors import ResourceError, UserError
from salt_vla.interrupts import StopFlag, stop_on_signals
from salt_vla.operations.asked import asked_of
from salt_vla.operations.conditions_now import UNREADABLE, Now, in_words, may_start, nobody_works_on
from salt_vla.operations.launch import Supervision, launch, supervision, take_over, wanted_in
from salt_vla.operations.processes import identity
from salt_vla.operations.queue import Job, JobState, Queue
from salt_vla.operations.slots import environment_of, holding, require_slot, suits
from salt_vla.rundir import RunDirectory

LONGEST_WAIT = 60.0  # seconds between two tries, where the machine refuses
Point = Literal["free", "taken", "launched", "running", "over", "ended"]


def nothing(point: Point) -> None:
    """Between two transitions nothing is done."""


@dataclass
class Runner:
    """Of one slot. `seconds` between two looks; `say` tells a person what it does; `passing` is called
    between any two of its transitions, for tests that end it there."""

    slot: str
    queue: Queue
    say: Callable[[str], None]
    seconds: float = 1.0
    passing: Callable[[Point], None] = nothing
    _said: str = field(default="", init=False)
    _to_be_told: list[RunDirectory] = field(default_factory=list, init=False)  # of in the report

    def __post_init__(self) -> None:
        require_slot(self.slot)

    def run(self, until_empty: bool = False) -> None:
        """Until a signal comes (raises `Stopped`; jobs go on without it), or with `until_empty` until nothing
        is left for this slot. Raises `RunError` where another runner has the slot."""
        with holding(self.slot), stop_on_signals() as stop:
            self.queue.note_runner(self.slot, identity())
            why = "killed or failed"
            try:
                self._look_until(stop, until_empty)
                why = "nothing is left to do" if not stop else "stopped by a signal"
            finally:
                self.queue.note_runner_gone(self.slot, why)
            working = self._in_work(self.queue.jobs(ended=False))
            goes_on = f", while {working.name} goes on under its supervisor" if working else ""
            stop.check(f"in slot {self.slot}{goes_on}")

    def _look_until(self, stop: StopFlag, until_empty: bool) -> None:
        wait = self.seconds
        while not stop:
            try:
                left = self.look()
                wait = self.seconds
                if until_empty and not left:
                    return
            except ResourceError as error:  # A full disk at night may have space again in the morning.
                self._tell(f"{error}; tried again in {wait:.0f} s")
                wait = min(2 * wait, LONGEST_WAIT)
            _sleep(wait, stop)

    def look(self) -> int:
        """One look at everything; how many jobs are left for this slot."""
        for job in self.queue.jobs(ended=False):
            if job.state == "running":  # Of any slot: its own runner may never come back.
                try:
                    self._follow(job)
                except UNREADABLE as error:  # Whether it works cannot be told: its slot is not given away.
                    self._tell(f"{job.name}: {in_words(error)}")
        jobs = self.queue.jobs(ended=False)
        mine = self._in_work(jobs)
        if mine is None:
            self.passing("free")
            mine = self._take(jobs)
        if mine is not None and mine.state == "starting":
            self._start(mine)
        self._report()  # Takes seconds, in which the slot shall not be idle.
        left = self.queue.jobs(ended=False)
        waiting = sum(job.state == "waiting" and suits(job.slot, self.slot) for job in left)
        return waiting + (self._in_work(left) is not None)

    def _in_work(self, jobs: list[Job]) -> Job | None:
        mine = (job for job in jobs if job.state in ("starting", "running") and job.ran_on == self.slot)
        return next(mine, None)

    def _take(self, jobs: list[Job]) -> Job | None:
        """The first that may start. One that never can is skipped, and what waits for it then is, too."""
        if self.queue.is_paused():
            return None
        line = [job for job in jobs if job.state == "waiting" and suits(job.slot, self.slot) and not job.held]
        now = Now({job.id: job for job in jobs}, self.slot, self.queue.clock())
        for job in line:
            found = may_start(job, now)
            if found.state == "never":
                self.queue.skip(job, found.why)
                self._tell(f"{job.name}: skipped: {found.why}")
                return self._take(self.queue.jobs(ended=False))
            if found.state == "holds":
                taken = self.queue.take(job, self.slot)
                if taken is not None:
                    self.passing("taken")
                return taken
        return None

    def _start(self, job: Job) -> None:
        try:
            now = launch(replace(job.launch, environment=environment_of(self.slot)))
        except ResourceError:
            raise  # The machine's state, not the job's.
        except UserError as error:
            self._could_not_start(job, error)
            return
        self.passing("launched")
        self.queue.mark_running(job, f"under supervisor {now.supervisor.pid}")
        self._tell(f"{job.name}: started: salt-vla {' '.join(job.command)}")
        self.passing("running")

    def _could_not_start(self, job: Job, error: UserError) -> None:
        asked = None
        with suppress(UserError):
            asked = wanted_in(job.folder)
        if asked is not None and asked.token == job.token:  # It may have begun all the same.
            raise ResourceError(f"{job.name}: {error}") from error
        if nobody_works_on(job).state == "waits":
            self.queue.put_back(job, str(error))
            return
        self.queue.end(job, "failed", f"could not be started: {error}")
        self._tell(f"{job.name}: could not be started: {error}")

    def _follow(self, job: Job) -> None:
        now = supervision(job.folder)
        if now is not None and now.is_at_work:
            return
        if now is not None and not now.is_over:
            self._tell(f"{job.name}: its supervisor is gone; another one takes over")
            take_over(job.folder)
            return
        self.passing("over")
        state, why = _ending(job, now)
        self.queue.end(job, state, why)
        self._tell(f"{job.name}: {state}: {why}")
        self.passing("ended")
        if job.is_run:
            self._to_be_told.append(RunDirectory(job.folder))

    def _report(self) -> None:
        """The page anew for runs that have ended: when they wrote it they were in the queue still."""
        if self._to_be_told:
            from salt_vla.operations.handoff import refresh  # Loads much that only a report needs.

            newest = self._to_be_told[-1]  # The page is that of all.
            self._to_be_told.clear()
            try:
                refresh(newest)
            except UNREADABLE as error:
                self._tell(f"the report was not written anew: {in_words(error)}")

    def _tell(self, sentence: str) -> None:
        if sentence != self._said:
            self.say(sentence)
        self._said = sentence


def _ending(job: Job, now: Supervision | None) -> tuple[JobState, str]:
    if now is None:
        return "failed", f"{job.folder} is gone, and with it how it went"
    why = now.exit_reason or "nobody saw how it ended"
    if now.ended_well:
        return "finished", why
    was_stopped = asked_of(job.folder, now.token) is not None
    if job.is_run and not was_stopped:
        with suppress(*UNREADABLE):  # What the supervisor says is enough.
            was_stopped = RunDirectory(job.folder).status().state == "stopped"
    return "stopped" if was_stopped else "failed", why


def _sleep(seconds: float, stop: StopFlag) -> None:
    """That long, or until a signal comes."""
    until = time.monotonic() + seconds
    while not stop and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))
