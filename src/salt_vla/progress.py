"""Progress a person can watch: a bar on a terminal, a line every few seconds in a log.

Knows nothing of what is being counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask

from salt_vla import capture

SECONDS_BETWEEN_LOG_LINES = 10.0


class Advance(Protocol):
    """Counts `amount` more units as done; `note` stands beside the figures."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


class Shares:
    """Where time goes: seconds by what was waited for, as shares of all that has passed."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the seconds of the block towards `what`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began

    @property
    def elapsed(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def __str__(self) -> str:
        """Such as "decode 3 %, teacher 96 %", in the order in which they first came."""
        return ", ".join(f"{what} {s / self.elapsed:.0%}" for what, s in self.seconds.items())


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: RichTask) -> str:
        speed = task.finished_speed or task.speed
        return f"{speed:.1f} {self.unit}/s" if speed else f"- {self.unit}/s"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` units of work, of which `done` are there already.

    Yields `advance(amount=1, note="")`. On a terminal it draws a bar with rate and ETA; elsewhere (a log
    file, CI) it prints one line at most every ten seconds, on stderr, so stdout stays machine-readable. A
    run's log has these lines in any case, and never the bar.
    """
    screen = capture.terminal()
    if screen is not None or sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        console = Console(stderr=True) if screen is None else Console(file=screen)
        is_whole = screen is None  # Else what is printed meanwhile goes another way, into the log.
        in_log = _log_lines(title, total, unit, done, capture.note)
        with RichProgress(
            *columns, console=console, redirect_stdout=is_whole, redirect_stderr=is_whole
        ) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")

            def advance(amount: int = 1, note: str = "") -> None:
                bar.update(task, advance=amount, note=note)
                in_log(amount, note)

            yield advance
        return
    yield _log_lines(title, total, unit, done, _say)


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "9 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _log_lines(title: str, total: int, unit: str, done: int, say: Callable[[str], None]) -> Advance:
    started = time.monotonic()
    last_line = started
    completed = done
    has_said_all = False

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal last_line, completed, has_said_all
        completed += amount
        now = time.monotonic()
        if has_said_all or (now - last_line < SECONDS_BETWEEN_LOG_LINES and completed < total):
            return
        last_line = now
        has_said_all = completed >= total
        rate = (completed - done) / max(now - started, 1e-9)
        eta = (total - completed) / rate if rate else 0.0
        line = f"{title}: {completed}/{total} {unit}, {rate:.1f} {unit}/s, ETA {duration(eta)} {note}"
        say(line.rstrip())

    return advance
