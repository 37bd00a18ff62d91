"""What sources share in reading folders and lists: video files, paths that stay below the root, CSV, JSON.

Opens no video. Knows no data set.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from salt_vla.data.segments import Problem
from salt_vla.errors import DataError

_SUFFIXES = "mp4 m4v mov webm mkv avi mpg mpeg m2ts mts ts wmv flv ogv 3gp"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
# Folder names that stand for a split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


def is_inside(file: str) -> bool:
    """Whether a relative path stays below the folder it is relative to (links set within may lead out)."""
    if not file or "\0" in file or PurePosixPath(file).is_absolute():
        return False
    return PurePosixPath(os.path.normpath(file)).parts[:1] not in ((), ("..",))


def video_files(root: Path, unreadable: Callable[[OSError], None]) -> Iterator[PurePosixPath]:
    """Video files below `root` by their names' endings, in a fixed order; hidden ones and linked folders are
    passed over. Folders that cannot be listed are handed to `unreadable`."""
    for folder, below, names in os.walk(root, onerror=unreadable):
        below[:] = sorted(name for name in below if not name.startswith("."))
        place = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield place / name


def noting(problems: list[Problem], dataset: str, root: Path) -> Callable[[OSError], None]:
    """What `video_files` hands unreadable folders to: each becomes one of the problems."""

    def note(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        problems.append(Problem(f"{dataset}/{name}", name, f"the folder cannot be listed: {error.strerror}"))

    return note


def holds_video(root: Path) -> bool:
    return is_folder(root) and next(video_files(root, lambda error: None), None) is not None


def is_file(path: Path) -> bool:
    """Whether there is one that can be looked at. Names too long for the system, links in a circle and closed
    folders are no error, as they are to `Path.is_file`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path | str) -> bool:
    """As `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_text(name: str) -> bool:
    """Whether it can be written: names of files may hold any bytes, and JSON halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def begins_with(path: Path, text: str) -> bool:
    """Whether a file does, after its byte-order mark if there is one; reads no more than that."""
    try:
        with path.open("rb") as file:
            head = file.read(len(codecs.BOM_UTF8) + len(text.encode()))
    except OSError:
        return False
    return head.removeprefix(codecs.BOM_UTF8).startswith(text.encode())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped). Raises `DataError` naming the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as text ({error}); save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}") from error


def read_json(path: Path, kind: type) -> Any:
    """The JSON value in a file, which must be a `kind`."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return value


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}, is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, must be a JSON object")
        rows.append((number, row))
    return rows


def read_csv(path: Path, required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of every row of a CSV file with a header that names the `required` columns."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline="\n"), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        columns = list(reader.fieldnames or [])
        missing = [name for name in required if name not in columns]
        if missing:
            raise DataError(
                f"{path} lacks the column(s) {', '.join(missing)}; its first line names: "
                f"{', '.join(columns)[:200] or 'nothing'}"
            )
        if repeated := [name for name, count in Counter(columns).items() if name and count > 1]:
            raise DataError(f"{path} has the column {repeated[0]!r} more than once")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}, does not have {len(columns)} values")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        first = rows[-1][0] + 1 if rows else reader.line_num + 1
        raise DataError(f"{path}: the row that begins in line {first} is not CSV: {error}") from error
    return rows
