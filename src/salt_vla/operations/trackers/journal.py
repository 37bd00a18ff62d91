"""What of a run's metrics a tracker has been sent: read as they come, remembered across every interruption.

A resume trims `metrics.jsonl` and computes steps again: those that come out the same are not sent twice, and
where they come out otherwise all rows from there on are sent anew. Knows no tracker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from salt_vla.errors import RunError
from salt_vla.operations.trackers.base import Row
from salt_vla.rundir import RunDirectory, read_json, write_text

# Figures that differ when the same step is computed again: as training/clock.py names them.
TIMINGS = ("data_wait_s", "step_s", "clips_per_s", "data_wait_share", "memory_gb")


@dataclass(frozen=True)
class Place:
    """`tracker_NAME.json`: the tracker's own name for the run, where its rows went, and how many are known to
    be there. `is_closed`: whoever sent rows last has seen them arrive."""

    identifier: str
    destination: str = ""
    confirmed: int = 0
    is_closed: bool = True


class Mirror:
    """The files of one tracker in a run's directory."""

    def __init__(self, run: RunDirectory, tracker: str) -> None:
        self.run, self.tracker = run, tracker
        self.place_file = run.path / f"tracker_{tracker}.json"
        self.journal_file = run.path / f"tracker_{tracker}.sent"
        self.log_file = run.path / f"tracker_{tracker}.log"
        self.lock_file = run.path / f".tracker_{tracker}"

    def place(self) -> Place:
        """Raises `RunError` where the file is damaged."""
        try:
            return Place(**read_json(self.place_file, dict, "remove it, and everything is sent again"))
        except FileNotFoundError:
            return Place(uuid4().hex[:8])
        except TypeError as error:
            raise RunError(
                f"{self.place_file} is damaged ({error}); remove it, and everything is sent again"
            ) from error

    def note(self, place: Place, **changes: Any) -> Place:
        place = replace(place, **changes)
        write_text(self.place_file, json.dumps(asdict(place), indent=2))
        return place

    def left(self) -> int:
        """Rows that are not known to be there."""
        place, journal = self.place(), Journal(self.journal_file)
        if not place.is_closed:
            journal.forget_after(place.confirmed)
        return len(journal.unsent(Tail(self.run.metrics_file).read()))


class Tail:
    """The rows of a growing file of metrics: those that have come since the last look, or all of them when it
    was written anew. Lines that are no rows are the run's own business, and are passed over."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._inode = self._offset = 0

    def read(self) -> list[Row]:
        try:
            with self.file.open("rb") as opened:
                about = os.fstat(opened.fileno())
                if about.st_ino != self._inode or about.st_size < self._offset:
                    self._inode, self._offset = about.st_ino, 0
                opened.seek(self._offset)
                data = opened.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]  # The last line may be in the middle of being written.
        self._offset += len(whole)
        return [row for line in whole.splitlines() if (row := _row_of(line)) is not None]


def _row_of(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int
    return row if is_row else None


def _digest(row: Row) -> str:
    figures = {name: value for name, value in row.items() if name not in TIMINGS}
    return xxhash.xxh3_64_hexdigest(json.dumps(figures, sort_keys=True).encode())


class Journal:
    """Which rows have been sent, in order: a line "step digest kind" each, or "step rewind" where the run was
    set back. A line that a crash has cut off counts as not sent."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.count = 0
        self._sent: dict[tuple[str, int], str] = {}
        text = file.read_text(errors="replace") if file.is_file() else ""
        self._lines = text.split("\n")[:-1]
        if text and not text.endswith("\n"):
            self._write()
        for line in self._lines:
            self._take(line)

    def _take(self, line: str) -> None:
        step, what, *kind = line.split(" ", 2)
        if kind:
            self._sent[kind[0], int(step)] = what
            self.count += 1
        else:
            self._sent = {key: digest for key, digest in self._sent.items() if key[1] < int(step)}

    def _write(self) -> None:
        write_text(self.file, "".join(f"{line}\n" for line in self._lines))

    def _append(self, lines: Sequence[str]) -> None:
        with self.file.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._lines.append(line)
            self._take(line)

    def keep(self, count: int) -> None:
        """Only the first `count` rows are there: the others count as not sent, from now on."""
        if count < self.count:
            self.forget_after(count)
            self._write()

    def forget_after(self, count: int) -> None:
        """As `keep`, for whoever only looks: nothing is written."""
        rows = 0
        for number, line in enumerate(self._lines):
            rows += line.count(" ") > 1
            if rows > count:
                del self._lines[number:]
                break
        self.count, self._sent = 0, {}
        for line in self._lines:
            self._take(line)

    def rewind_of(self, rows: Sequence[Row]) -> int | None:
        """The first step that was sent with other figures than it has now."""
        changed = (
            row["step"]
            for row in rows
            if self._sent.get((row["kind"], row["step"]), digest := _digest(row)) != digest
        )
        return min(changed, default=None)

    def rewind(self, step: int) -> None:
        self._append([f"{step} rewind"])

    def unsent(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if (row["kind"], row["step"]) not in self._sent]

    def add(self, rows: Sequence[Row]) -> None:
        self._append([f"{row['step']} {_digest(row)} {row['kind']}" for row in rows])
