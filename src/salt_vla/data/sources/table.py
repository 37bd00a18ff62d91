"""A list of videos in CSV, Parquet or JSON lines: path, and start, end, label, split, group, id if there.

Knows the list's columns only; what the files hold is measured later.
"""

from __future__ import annotations

import difflib
import math
import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.data.segments import Listing, Segment, SourceOptions
from salt_vla.data.sources.files import SPLIT_NAMES, is_file, read_csv, read_json_lines
from salt_vla.errors import DataError

COLUMNS = ("path", "start", "end", "label", "split", "group", "id")
ENDINGS = (".csv", ".jsonl", ".parquet")
Rows = list[tuple[int, dict[str, Any]]]


def recognises(path: Path) -> bool:
    if path.suffix.lower() == ".parquet" and is_file(path):
        try:
            names = pq.read_schema(path).names
        except (pa.ArrowException, OSError, UnicodeError):
            return False
        return "path" in names and "clip_id" not in names  # A clip table is no list of videos.
    return path.suffix.lower() in ENDINGS and is_file(path)


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every row is a segment. `root` is the list's file; its paths are relative to `options.videos`, or to
    the folder it lies in. Key: data set / id, or data set / path, with `@start-end` where there is one."""
    rows, unit = _rows(root)
    if not rows:
        raise DataError(f"{root} lists no video")
    dataset = options.dataset or root.stem
    found = tuple(_segment(row, dataset, f"{root}, {unit} {number}") for number, row in rows)
    return Listing(dataset, "table", Path(options.videos) if options.videos else root.parent, found)


def _rows(path: Path) -> tuple[Rows, str]:
    """The rows with their numbers, and what the numbers count."""
    if not is_file(path):
        raise DataError(f"{path} is not a list of videos: it must be a file, {', '.join(ENDINGS)}")
    ending = path.suffix.lower()
    if ending == ".csv":
        rows: Rows = list(read_csv(path, ("path",)))
    elif ending == ".jsonl":
        rows = read_json_lines(path)
    elif ending == ".parquet":
        rows = _parquet(path)
    else:
        raise DataError(f"{path}: a list of videos ends in {', '.join(ENDINGS)}, not {ending!r}")
    _refuse_misspelt({name for _, row in rows for name in row}, path)
    return rows, "row" if ending == ".parquet" else "line"


def _parquet(path: Path) -> Rows:
    try:
        table = pq.read_table(path, partitioning=None)
        known = [name for name in COLUMNS if name in table.column_names]
        _refuse_misspelt(set(table.column_names), path)
        if "path" not in known:
            raise DataError(f"{path} lacks the column 'path'; it has: {', '.join(table.column_names)}")
        columns = {name: _shortest(table[name]) for name in known}
        return list(enumerate(pa.table(columns).to_pylist(), 1))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path} is not a Parquet file, or a damaged one: {reason}") from error


def _shortest(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers of half precision or single as they would be written: 0.1, not 0.10000000149011612."""
    is_coarse = pa.types.is_float16(column.type) or pa.types.is_float32(column.type)
    return column.cast(pa.string()) if is_coarse else column


def _refuse_misspelt(names: set[str], path: Path) -> None:
    """Other columns are nobody's business, but one that nearly has a known name was meant to have it."""
    for name in sorted(names - set(COLUMNS)):
        if meant := difflib.get_close_matches(name.lower(), set(COLUMNS) - names, n=1, cutoff=0.75):
            raise DataError(f"{path} has a column {name!r}; if it means {meant[0]!r}, call it so")


def _segment(row: dict[str, Any], dataset: str, where: str) -> Segment:
    said = _text(row, "path", where)
    if not said:
        raise DataError(f"{where}: the path is empty")
    file = posixpath.normpath(said)  # Two ways to write a film's place are one film.
    start, end = (_seconds(row, name, where) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise DataError(f"{where}: end is {_plain(end)} s, not after start, {_plain(start)} s")
    stretch = f"@{_plain(start)}-" + ("" if end is None else _plain(end))
    place = file if start is None and end is None else file + stretch
    group = _text(row, "group", where) or file
    split = _text(row, "split", where)
    return Segment(
        key=f"{dataset}/{_text(row, 'id', where) or place}",
        file=file,
        group=f"{dataset}/{group}",
        split=SPLIT_NAMES.get(split.lower(), split),
        label=_text(row, "label", where),
        start=start,
        end=end,
    )


def _plain(seconds: float | None) -> str:
    """The shortest decimal that is this number: no two stretches share one."""
    return repr(seconds or 0.0).removesuffix(".0")


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {name} is {value!r:.60}, not text")
    return str(value).strip()


def _seconds(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"{where}: {name} is {value!r:.60}, not a number of seconds")
    return seconds
