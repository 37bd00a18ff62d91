"""A run's `metrics.jsonl` as it grows: only what was appended is read, and only the end where that is enough.

Never complains of a damaged line: whoever looks on shows what can be read; a resume says what cannot.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from salt_vla.operations.appended import Appended
from salt_vla.rundir import is_count

Row = dict[str, Any]
Points = tuple[list[float], list[float]]  # (x, values), in order
FIRST_BLOCK, BLOCK = 2048, 64 * 1024  # bytes read at once from a file's end


def read_rows(lines: Iterable[bytes]) -> tuple[list[Row], int]:
    """The rows of metrics among `lines`, and how many of them are none. In a row a figure that is no finite
    number (nor yes or no) is None."""
    rows: list[Row] = []
    damaged = 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and is_count(row.get("step")):
            for name in [name for name, value in row.items() if not _is_figure(value) and name != "kind"]:
                row[name] = None
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


class Follower:
    """Reads metrics as they grow. `rows` holds all that are there now: fewer than before when a resume
    has trimmed the file. `damaged` counts lines that are no rows."""

    def __init__(self, file: Path) -> None:
        self.file = Appended(file)
        self.rows: list[Row] = []
        self.damaged = 0

    def poll(self) -> list[Row]:
        """Rows that came since the last call; all of them where the file has begun anew."""
        before, lines = self.file.beginnings, list[bytes]()
        with suppress(OSError):  # A disk may fail for a while; what was read is still there.
            lines = self.file.poll()
        if self.file.beginnings > before:
            self.rows, self.damaged = [], 0
        rows, damaged = read_rows(lines)
        self.rows += rows
        self.damaged += damaged
        return rows


def last_rows(file: str | Path, train: int = 1, most_bytes: int = 4 * BLOCK) -> tuple[list[Row], list[Row]]:
    """(the last `train` rows of kind train, the last of kind val) of a file of metrics, each in order, read
    from its end; what lies more than `most_bytes` before the end is not looked for."""
    found: dict[str, list[Row]] = {"train": [], "val": []}
    wanted = {"train": train, "val": 1}
    for line in _lines_from_the_end(file, most_bytes):
        # Most lines of a long file are of a kind that there is enough of: not worth parsing.
        if not any(kind.encode() in line for kind in wanted):
            continue
        for row in read_rows([line])[0]:
            kind = row["kind"]
            if kind in wanted:
                found[kind].append(row)
                if len(found[kind]) == wanted[kind]:
                    del wanted[kind]
        if not wanted:
            break
    return found["train"][::-1], found["val"][::-1]


def _lines_from_the_end(file: str | Path, most_bytes: int) -> Iterator[bytes]:
    """Whole lines, the last first; what a crash has cut off is none."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return
    try:
        end = start = os.fstat(descriptor).st_size
        rest, size = b"", FIRST_BLOCK
        while start > 0 and end - start < most_bytes:
            size, start = min(start, size), max(0, start - size)
            try:
                lines = (os.pread(descriptor, size, start) + rest).split(b"\n")
            except OSError:
                return
            if start + size == end:
                lines.pop()
            rest = lines.pop(0) if start and lines else b""
            yield from reversed(lines)
            size = BLOCK
    finally:
        os.close(descriptor)


def points(rows: Sequence[Row], kind: str, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one column of the rows of one kind; what is no finite number is left out."""
    found = [(row["step"], row[column]) for row in rows if row["kind"] == kind and is_number(row.get(column))]
    return [step for step, _ in found], [float(value) for _, value in found]


def _is_figure(value: Any) -> bool:
    return value is None or type(value) is bool or is_number(value)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
