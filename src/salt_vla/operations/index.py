"""What has been read of runs that have ended, kept in `runs/.index.db` so that a list of 10,000 reads few.

An entry counts only while its run's files are the very ones it was read from. Nothing else depends on the
file: without it, or where it cannot be written, lists take longer.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FILE = ".index.db"
VERSION = 3  # of the texts below; another one is written anew
WATCHED = ("", "status.json", "recipe.json", "verdict.json", "metrics.jsonl")
# Within this time a file may change without its time of change doing so.
SECONDS_TO_SETTLE = 2.0


@dataclass(frozen=True)
class Entry:
    """`signature`: of the files that `glance` and `best` (JSON; empty where nobody asked) were read from."""

    signature: str
    glance: str
    best: str = ""


class Look(NamedTuple):
    """Which files a run's folder holds now. `changed`: by name, when each of those there last did, in
    nanoseconds since the epoch; that of the folder, "", tells of files that came and went."""

    signature: str
    changed: dict[str, int]

    @property
    def has_settled(self) -> bool:
        """Whether no file changed so recently that the next change may look the same."""
        return time.time_ns() - max(self.changed.values(), default=0) > SECONDS_TO_SETTLE * 1e9


def look(run: str) -> Look:
    parts, changed = [], {}
    for name in WATCHED:
        try:
            found = os.stat(f"{run}/{name}")  # noqa: PTH116  # Ten thousand times, pathlib's part is most.
        except OSError:
            parts.append("-")
            continue
        changed[name] = found.st_mtime_ns
        parts.append(f"{found.st_ino}:{found.st_size if name else 0}:{found.st_mtime_ns}")
    return Look(" ".join(parts), changed)


def read(folder: Path) -> dict[str, Entry]:
    """Entries by the run's name; none where there is no index, or one that cannot be read."""
    if not (folder / FILE).is_file():
        return {}
    with suppress(sqlite3.Error), _opened(folder) as database:
        rows = database.execute("SELECT name, signature, glance, best FROM runs")
        return {name: Entry(*rest) for name, *rest in rows}
    return {}


def write(folder: Path, entries: Mapping[str, Entry], gone: set[str]) -> None:
    """Keep these, and forget those that are `gone`. What cannot be written is read again next time."""
    try:
        _write(folder, entries, gone)
    except sqlite3.OperationalError:
        return  # Somebody else writes it now, or nobody may.
    except sqlite3.DatabaseError:  # Damaged, or of another version: it holds nothing that the runs do not.
        with suppress(OSError, sqlite3.Error):
            (folder / FILE).unlink(missing_ok=True)
            _write(folder, entries, gone)


def _write(folder: Path, entries: Mapping[str, Entry], gone: set[str]) -> None:
    with _opened(folder) as database, database:
        rows = [(name, each.signature, each.glance, each.best) for name, each in entries.items()]
        database.executemany("REPLACE INTO runs VALUES (?, ?, ?, ?)", rows)
        database.executemany("DELETE FROM runs WHERE name = ?", [(name,) for name in gone])


@contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(folder / FILE, timeout=0.5)) as database:
        database.execute("PRAGMA synchronous = OFF")  # What a power cut takes is read again.
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"version {version}")
        if not version:
            database.execute(
                "CREATE TABLE IF NOT EXISTS "
                "runs (name TEXT PRIMARY KEY, signature TEXT, glance TEXT, best TEXT) WITHOUT ROWID"
            )
            database.execute(f"PRAGMA user_version = {VERSION}")
        yield database
