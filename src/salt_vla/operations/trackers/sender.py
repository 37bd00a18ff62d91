"""A tracker at work, in a process that may hang or die at any moment: reads what a run measures, sends it,
notes what was sent. Who starts it again, and who ends it, is `keeper`'s business.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, cast

from salt_vla.errors import RunError
from salt_vla.operations.trackers.base import TRACKERS, Opening, Row, Tracker
from salt_vla.operations.trackers.journal import Journal, Mirror, Place, Tail
from salt_vla.redaction import without_secrets
from salt_vla.rundir import RunDirectory, Status, read_json

SECONDS_BETWEEN_LOOKS = 2.0
ROWS_AT_ONCE = 500
NICE = 10  # Behind the run in everything.


def send(run: RunDirectory, tracker: str, is_at_work: Callable[[], bool]) -> None:
    """Send what has not been sent until the run is not at work any more, then close the tracker. Raises what
    the tracker raises."""
    os.nice(NICE)
    sender = Sender(run, tracker)
    while True:
        goes_on = is_at_work()  # Asked before the look: what it wrote last is not missed.
        sender.look()
        if not goes_on:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    sender.close()


@dataclass
class _Open:
    tracker: Tracker
    place: Place


class Sender:
    """Opens the tracker when there is something to send: a run that fails before its first row has none."""

    def __init__(self, run: RunDirectory, tracker: str) -> None:
        self.run = run
        self.entry = TRACKERS[tracker]
        self.mirror = Mirror(run, tracker)
        self.tail = Tail(run.metrics_file)
        self.journal = Journal(self.mirror.journal_file)
        self.open: _Open | None = None

    def look(self) -> None:
        rows = self.tail.read()
        if self.open is None:
            is_closed = not self.mirror.place_file.exists() or self.mirror.place().is_closed
            if is_closed and not self.journal.unsent(rows) and self.journal.rewind_of(rows) is None:
                return
            self.open = self._open()
        tracker = self.open.tracker
        back_to = self.journal.rewind_of(rows)
        if back_to is not None:
            _say(f"the run was set back: step {back_to} has other figures now, and all after it come again")
            tracker.rewind(back_to)
            self.journal.rewind(back_to)
            rows = Tail(self.run.metrics_file).read()
        self._send(tracker, self.journal.unsent(rows))

    def _send(self, tracker: Tracker, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            tracker.send(list(enumerate(part, start=self.journal.count)))
            self.journal.add(part)

    def _open(self) -> _Open:
        before = self.mirror.note(self.mirror.place())  # Also of a tracker that never opens there is a trace.
        config = _config_of(self.run)
        tracker = self.entry.open(Opening(self.run, before.identifier, config, bool(self.journal.count)))
        held = tracker.held()
        if before.destination != tracker.destination:
            self.journal.keep(0)
        elif not before.is_closed:
            if held is None:
                held = self.journal.count if tracker.keeps else before.confirmed
            self.journal.keep(held)
        place = self.mirror.note(
            before,
            destination=tracker.destination,
            confirmed=self.journal.count,
            is_closed=tracker.keeps,
        )
        _say(f"open: {tracker.destination}, {self.journal.count} rows are there")
        return _Open(tracker, place)

    def close(self) -> None:
        if self.open is None:
            return
        self.open.tracker.close(_status_of(self.run))
        self.mirror.note(self.open.place, confirmed=self.journal.count, is_closed=True)
        _say(f"closed: {self.journal.count} rows are there")


def _config_of(run: RunDirectory) -> dict[str, Any]:
    return read_json(run.config_file, dict) if run.config_file.is_file() else {}


def _status_of(run: RunDirectory) -> Status:
    try:
        return run.status()
    except RunError as error:
        return Status("damaged", exit_reason=str(error))


class Redacted:
    """A stream that passes on every piece of text without its secrets; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def without_secrets_in_output() -> None:
    """For the rest of this process, its last traceback included: what it and its tracker print is kept in
    the tracker's log."""
    sys.stdout, sys.stderr = cast(TextIO, Redacted(sys.stdout)), cast(TextIO, Redacted(sys.stderr))


def _say(what: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), what, flush=True)
