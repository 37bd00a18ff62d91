"""What surrounds the work of a run in its own process: the log, the mirrors of its metrics, and what is
written anew when it has ended. None of it can slow the work or end it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from salt_vla.rundir import RunDirectory


@contextmanager
def recorded(run: RunDirectory, trackers: Sequence[str] = ()) -> Iterator[None]:
    """Within the block all that the process says is in the run's log too; trackers follow its metrics."""
    try:
        yield
    finally:
        after_run(run)


def after_run(run: RunDirectory) -> None:
    """When a run has ended, however: what is said of all runs is written anew."""
