"""What is watched, moment by moment: which runs, how they go, and the head of the queue.

Reads only what was appended since the last moment; how it looks is `watch_frame`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from salt_vla.errors import UserError
from salt_vla.operations.curves import Follower, points
from salt_vla.operations.overview import Overview, overview, overviews
from salt_vla.operations.queue import ACTIVE, Job, Queue
from salt_vla.operations.tail import is_over
from salt_vla.rundir import RunDirectory, root

SECONDS_A_LIST = 15.0  # between two looks at which runs there are
RECENT = 3600.0  # Seconds: a run that ended within them is still of interest.
MOST_RUNS, MOST_JOBS = 6, 5


@dataclass(frozen=True)
class Watched:
    """A run at one moment, with the curves that are drawn of it."""

    overview: Overview
    loss: list[float] = field(default_factory=list)
    r2: list[float] = field(default_factory=list)
    is_over: bool = False

    def to_json(self) -> dict[str, Any]:
        hidden = ("masks", "cost", "recipe")
        row = {key: value for key, value in self.overview.to_json().items() if key not in hidden}
        return row | {"is_over": self.is_over}


@dataclass(frozen=True)
class Moment:
    """`time`: seconds since the epoch. `jobs`: those of the queue that wait or work, in their order; `paused`
    the whole queue. `more`: runs that are at work and for which there was no room."""

    time: float
    runs: tuple[Watched, ...]
    jobs: tuple[Job, ...] = ()
    paused: bool = False
    more: int = 0
    queue_problem: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nobody works on any of the runs any more."""
        return all(run.is_over for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        jobs = [job.to_json() for job in self.jobs]
        queue = {"jobs": jobs, "paused": self.paused, "problem": self.queue_problem}
        return {"time": self.time, "runs": [run.to_json() for run in self.runs], "queue": queue}


class Watch:
    """Of the runs named, or else of those at work and those that ended within the last hour."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = [RunDirectory.named(name).require().name for name in dict.fromkeys(names)]
        self._followers: dict[str, Follower] = {}
        self._found: list[str] = []
        self._more = 0
        self._listed = -SECONDS_A_LIST

    @property
    def bytes_read(self) -> int:
        """Of metrics, so far."""
        return sum(each.file.bytes_read for each in self._followers.values())

    def look(self) -> Moment:
        names = self.names or self._of_interest()
        # Found, not given: a copy of a folder may have a name that no run would be started under.
        runs = tuple(self._watched(RunDirectory(root() / "runs" / name)) for name in names)
        jobs: tuple[Job, ...] = ()
        paused, problem = False, ""
        try:
            queue = Queue()
            jobs = tuple(job for job in queue.jobs() if job.state in ACTIVE)
            paused = queue.is_paused()
        except UserError as error:  # A damaged queue hides no run.
            problem = str(error)
        return Moment(time.time(), runs, jobs[:MOST_JOBS], paused, self._more, problem)

    def _of_interest(self) -> list[str]:
        """The runs at work, the last started first, then those that ended lately; else the last one."""
        if time.monotonic() - self._listed >= SECONDS_A_LIST:
            runs = sorted(overviews(), key=lambda run: -run.updated)
            working = [run.name for run in runs if run.is_running]
            ended = [run.name for run in runs if not run.is_running and time.time() - run.updated < RECENT]
            chosen = [*working, *ended] or [run.name for run in runs[:1]]
            self._found, self._more = chosen[:MOST_RUNS], max(0, len(working) - MOST_RUNS)
            self._listed = time.monotonic()
            self._followers = {name: each for name, each in self._followers.items() if name in self._found}
        return self._found

    def _watched(self, run: RunDirectory) -> Watched:
        follower = self._followers.setdefault(run.name, Follower(run.metrics_file))
        follower.poll()
        seen = overview(run, follower.rows)
        r2 = next(
            (values for kind in ("val", "train") if (values := _curve(follower, kind, "r2_position_mean"))),
            [],
        )
        return Watched(seen, _curve(follower, "train", "loss"), r2, is_over(run))


def _curve(follower: Follower, kind: str, column: str) -> list[float]:
    return points(follower.rows, kind, column)[1]
