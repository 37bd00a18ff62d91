"""The files that features lie in: rows of one shape, a JSON note beside them, and how they grow.

`<hash>.rows` and `<hash>.json` are whole; `.partial` and `.partial.json` are in work, locked by who works.
Knows neither encoders nor clips' pixels.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from salt_vla.errors import CacheError, ResourceError
from salt_vla.files import read_json, remove_left_parts, write_text, writing_to

DTYPES = ("<f4", "<f2")
POLL_SECONDS = 0.2
CURE = "remove it and run the same command again"


@dataclass(frozen=True)
class Note:
    """What a note says: the rows' shape and type, the clips that have none and why, and `about`."""

    shape: tuple[int, ...] = (0,)
    dtype: str = DTYPES[0]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def note_of(path: Path) -> Note | None:
    """Of whole rows, or of rows that are in work (`.partial`); None where there is none. Raises `RunError`
    or `CacheError` for a damaged one."""
    file = _note_file(path)
    if not file.is_file():
        return None
    said = read_json(file, dict, CURE)
    shape, left_out = said.get("shape"), said.get("left_out", {})
    is_shape = isinstance(shape, list) and shape and all(type(n) is int and n >= 0 for n in shape)
    if not (is_shape and said.get("dtype") in DTYPES and isinstance(left_out, dict)):
        raise CacheError(f"the note of features {file} is damaged; {CURE}")
    return Note(tuple(shape or ()), said["dtype"], left_out)


def write_note(path: Path, note: Note, about: Mapping[str, object] | None = None) -> None:
    said = {"shape": note.shape, "dtype": note.dtype, "left_out": note.left_out} | dict(about or {})
    write_text(_note_file(path), json.dumps(said, indent=1))


def _note_file(path: Path) -> Path:
    return path.with_suffix(".json") if path.suffix == ".rows" else path.with_name(f"{path.name}.json")


def open_rows(path: Path, total: int) -> np.ndarray:
    """Whole rows, mapped read-only; `CacheError` where they are not what their note says."""
    note = note_of(path)
    size = path.stat().st_size if path.is_file() else 0
    if note is None or note.shape[0] != total or size != total * note.row_bytes:
        raise CacheError(f"features {path} are damaged: {size} bytes; remove it and its .json")
    return np.memmap(path, note.dtype, "r", shape=note.shape)


class Growing:
    """One file being written, rows appended in order; what an earlier process wrote whole is kept.

    Entered, the file is this process' alone: another one that works on it is waited for, and where that one
    has finished, `is_done` is true. `check` may raise meanwhile.
    """

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self.path, self.partial, self.check = path, path.with_suffix(".partial"), check
        self.rows, self.is_done = 0, False
        self.note: Note | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Growing:
        with writing_to(self.partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
            remove_left_parts(self.path.parent)
        self.is_done = note_of(self.path) is not None
        self.note = note_of(self.partial)
        if self.note is not None and self.note.row_bytes:
            self.rows = os.fstat(self._file.fileno()).st_size // self.note.row_bytes
        self._file.truncate(self.rows * self.note.row_bytes if self.note else 0)
        return self

    def _locked(self) -> BinaryIO:
        """The partial file, open at its end and locked; a file that was renamed meanwhile is left."""
        has_said = False
        while True:
            file = self.partial.open("ab", buffering=0)
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not has_said:
                        print(
                            f"another process extracts {self.partial.name}; waiting for it", file=sys.stderr
                        )
                    has_said = True
                    time.sleep(POLL_SECONDS)
                    try:
                        self.check()
                    except BaseException:
                        file.close()
                        raise
            if self.partial.is_file() and self.partial.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
            file.close()

    @property
    def left_out(self) -> dict[str, str]:
        return self.note.left_out if self.note else {}

    def append(self, first: int, values: np.ndarray, total: int, left_out: Mapping[str, str]) -> None:
        """Rows `first` and following; those that are there already are left. `total`: rows there may be;
        `left_out`: clips, up to here, that have none."""
        assert self._file is not None
        if self.note is None:
            self._require_room(total * values[:1].nbytes)
        if self.note is None or self.note.left_out != left_out:
            self.note = Note((total, *values.shape[1:]), values.dtype.str, dict(left_out))
            write_note(self.partial, self.note)
        new = values[max(self.rows - first, 0) :]
        data = memoryview(np.ascontiguousarray(new).tobytes())
        with writing_to(self.partial):
            while data:
                data = data[self._file.write(data) :]
        self.rows += len(new)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ResourceError(
                f"these features take {needed / 1e9:.3g} GB and {self.path.parent} has {free / 1e9:.3g} GB "
                "free; make space, or set SALT_VLA_ROOT to a folder on a larger disk"
            )

    def finish(self, path: Path, left_out: Mapping[str, str], about: Mapping[str, object]) -> None:
        """The rows are whole: they get the name `path`, which says which clips they hold; where that are not
        all, a note under the asked name says which are missing."""
        assert self._file is not None and self.note is not None
        note = Note((self.rows, *self.note.shape[1:]), self.note.dtype)
        with writing_to(self.partial):
            os.fsync(self._file.fileno())
            self.partial.replace(path)
        write_note(path, note, about)
        if left_out:
            write_note(self.path, Note(note.shape, note.dtype, dict(left_out)), about)
        _note_file(self.partial).unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        if self._file is None:
            return
        if not self.rows:
            self.partial.unlink(missing_ok=True)  # Nothing was written, or another process was done.
        self._file.close()
