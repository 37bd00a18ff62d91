"""A run's log and metrics as lines for a person, the last ones or all that come until the run has ended.

Knows files and whether somebody still works on the run, not where lines are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from salt_vla.errors import UserError
from salt_vla.operations.appended import Appended
from salt_vla.operations.control import find, working_in
from salt_vla.operations.curves import Follower, last_rows
from salt_vla.operations.overview import glance
from salt_vla.operations.words import sentence
from salt_vla.rundir import RunDirectory

SECONDS_A_LOOK = 0.5


def place_of(name: str) -> RunDirectory:
    """The run's directory, or that of a job which has no run. Raises `RunError` for neither."""
    run = RunDirectory.named(name)
    return run if run.exists() else RunDirectory(find(name))


def is_over(run: RunDirectory) -> bool:
    """Whether nobody works on it any more, nor will start it again by himself."""
    try:
        return working_in(run.path).is_over
    except (UserError, OSError):  # What is damaged tells of no supervisor; the run's own word is left.
        return glance(run).state != "running"


def last_lines(file: Path, lines: int) -> list[str]:
    """The last whole lines of a log, without what a terminal would obey."""
    log = Appended(file)
    log.skip_to_last(lines)
    return [_text(line) for line in log.poll()]


def tail(run: RunDirectory, lines: int) -> Iterator[str]:
    """The last lines of the log, and the last rows of metrics as sentences."""
    yield from last_lines(run.log_file, lines)
    for rows in last_rows(run.metrics_file):
        yield from map(sentence, rows)


def follow(run: RunDirectory, lines: int, wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """As `tail`, then every line that comes, until nobody works on the run any more; a log that is another
    one, or shorter, is followed from its beginning."""
    log, metrics = Appended(run.log_file), Follower(run.metrics_file)
    log.skip_to_last(lines)
    yield from map(_text, log.poll())
    metrics.poll()
    yield from (sentence(row) for rows in last_rows(run.metrics_file) for row in rows)
    while True:
        is_last = is_over(run)  # Asked first: what is written before an end is read after it.
        yield from map(_text, log.poll())
        yield from map(sentence, metrics.poll())
        if is_last:
            return
        wait(SECONDS_A_LOOK)


def _text(line: bytes) -> str:
    """What a terminal would show last: progress bars write over themselves."""
    shown = [part for part in line.decode(errors="replace").split("\r") if part]
    return shown[-1] if shown else ""
