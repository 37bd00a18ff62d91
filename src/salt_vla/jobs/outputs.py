"""Files that a command writes where its user says: they take the place of nothing but an earlier answer.

Looked at before the work, so that nobody waits for a table that cannot be written. Knows what the files look
like from outside; writing them is others' business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.data.sources.files import is_text
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.rundir import require_place, writing_to

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Kind:
    """What a command writes, in words, and whether a file is such a one."""

    name: str
    is_one: Callable[[Path], bool]


def _is_clip_table(path: Path) -> bool:
    try:
        return "clip_id" in pq.read_schema(path).names
    except (pa.ArrowException, OSError, UnicodeError):
        return False


def _is_list_of_reasons(path: Path) -> bool:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and "reason" in row for row in rows)


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PNG)) == PNG
    except OSError:
        return False


CLIP_TABLE = Kind("a clip table", _is_clip_table)
REASONS = Kind("a list of reasons in JSON", _is_list_of_reasons)
PICTURE = Kind("a PNG picture", _is_picture)


def require_output(out: Path, kind: Kind, inputs: Iterable[Path] = ()) -> None:
    """Raises `ConfigError` when `out` is one of the command's `inputs` or a file of another kind, and
    `ResourceError` when nothing can be written there. A file of its kind, or an empty one, is overwritten."""
    if not is_text(str(out)):
        raise ConfigError(f"--out {str(out)!r} is not text in UTF-8; give another name")
    with writing_to(out):  # Looking may be refused, too.
        require_place(out)
        folder = next(place for place in out.absolute().parents if place.exists())
        if not folder.is_dir():
            raise ResourceError(f"cannot write {out}: {folder} is no folder; choose another one")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ResourceError(f"cannot write {out}: permission denied; choose another folder")
        if not out.exists():
            return
        for path in inputs:
            if path.exists() and path.samefile(out):
                raise ConfigError(f"--out {out} is what the command reads; give another name")
        if out.stat().st_size and not kind.is_one(out):
            raise ConfigError(
                f"{out} is there already and is not {kind.name}; remove it, or give another name"
            )
