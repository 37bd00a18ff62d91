"""The queue's file: SQLite, its schema and version, transactions, and its faults as sentences.

Knows tables, not what jobs and their states mean.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import uuid4

from salt_vla.errors import ResourceError, RunError
from salt_vla.rundir import write_atomically, writing_to

VERSION = 1  # PRAGMA user_version
SECONDS_TO_WAIT = 30.0  # for another process' transaction
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    command TEXT NOT NULL,
    directory TEXT NOT NULL,
    slot TEXT NOT NULL,
    restarts INTEGER NOT NULL,
    processes INTEGER NOT NULL,
    conditions TEXT NOT NULL,
    place INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'starting', 'running', 'finished', 'failed', 'stopped',
                                         'skipped', 'cancelled')),
    held INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    ran_on TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    added REAL NOT NULL,
    started REAL,
    ended REAL
);
CREATE UNIQUE INDEX one_of_a_name ON jobs (name) WHERE state IN ('waiting', 'starting', 'running');
CREATE UNIQUE INDEX one_in_a_slot ON jobs (ran_on) WHERE state IN ('starting', 'running');
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    job INTEGER REFERENCES jobs (id),
    event TEXT NOT NULL,
    why TEXT NOT NULL
);
CREATE TABLE runners (
    slot TEXT PRIMARY KEY,
    process TEXT NOT NULL,
    since REAL NOT NULL
);
CREATE TRIGGER history_is_not_rewritten BEFORE UPDATE ON history
    BEGIN SELECT RAISE(ABORT, 'the history is only ever added to'); END;
CREATE TRIGGER history_is_not_forgotten BEFORE DELETE ON history
    BEGIN SELECT RAISE(ABORT, 'the history is only ever added to'); END;
CREATE TRIGGER jobs_are_not_forgotten BEFORE DELETE ON jobs
    BEGIN SELECT RAISE(ABORT, 'jobs are cancelled, not deleted'); END;
"""


@contextmanager
def reading(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a queue that is there; whoever reads sees whole transactions only."""
    with _in_sentences(file), closing(_opened(file)) as connection:
        _require_version(connection, file)
        yield connection


@contextmanager
def changing(file: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on the queue, which is made where there is none: on disk when the block ends, and no
    trace of it where the block raises. It has the only right to write from its first line on."""
    if not file.is_file():
        _make(file)
    with _in_sentences(file), closing(_connected(file, _is_still(file))) as connection:
        _require_version(connection, file)
        connection.execute("BEGIN IMMEDIATE")  # A reader that turned writer could be refused at once.
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _opened(file: Path) -> sqlite3.Connection:
    """For reading, also on a disk without room for the files that SQLite makes beside it."""
    try:
        return _connected(file, _is_still(file))
    except sqlite3.OperationalError as error:
        if "disk I/O" not in str(error) or _has_changes_beside(file):
            raise
        return _connected(file, is_still=True)


def _is_still(file: Path) -> bool:
    """Whether no file may be made beside it, and nobody's changes wait in one: it is read as it stands."""
    return not os.access(file.parent, os.W_OK) and not file.with_name(f"{file.name}-wal").exists()


def _has_changes_beside(file: Path) -> bool:
    changes = file.with_name(f"{file.name}-wal")
    return changes.is_file() and changes.stat().st_size > 0


def _connected(file: Path, is_still: bool) -> sqlite3.Connection:
    address = f"{file.resolve().as_uri()}?{'immutable=1' if is_still else 'mode=rw'}"
    connection = sqlite3.connect(address, uri=True, timeout=SECONDS_TO_WAIT, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # A power cut takes back nothing that was said.
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _make(file: Path) -> None:
    """A queue without jobs, whole or not at all; of several who would make it one does."""
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_name(f".{file.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return
        for ending in ("-wal", "-shm"):  # What a queue that was moved away left behind is none of this one's.
            file.with_name(f"{file.name}{ending}").unlink(missing_ok=True)
        with _in_sentences(file):
            write_atomically(file, _write_empty)


def _write_empty(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # Is kept in the file.
        connection.executescript(SCHEMA)
        # Two queues never mean the same by "job 1": runs outlive a queue's file.
        connection.execute("INSERT INTO meta VALUES ('queue', ?)", (uuid4().hex,))
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _require_version(connection: sqlite3.Connection, file: Path) -> None:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > VERSION:
        raise RunError(
            f"{file} was written by a newer version of salt-vla (its schema is {found}, this one knows "
            f"{VERSION}); use that version"
        )
    if found < VERSION:
        raise RunError(f"{file} is no queue; move it away, or set another SALT_VLA_ROOT")


@contextmanager
def _in_sentences(file: Path) -> Iterator[None]:
    """What SQLite refuses, in the user's terms."""
    try:
        yield
    except sqlite3.OperationalError as error:
        said = str(error)
        if "locked" in said:
            cure = "another process holds it; try again, and look with `salt-vla queue ls` who is at work"
        elif "readonly" in said or "unable to open" in said:
            cure = "check the permissions of it and of its folder"
        elif "full" in said or "disk I/O" in said:
            cure = "make space; no job is lost, and the same command goes on"
        else:
            raise _damaged(file, error) from error
        raise ResourceError(f"cannot use the queue {file}: {said}; {cure}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: sqlite3.Error) -> RunError:
    return RunError(
        f"{file} is damaged ({error}); move it away with {file.name}-wal, and add the jobs again: those that "
        "began are in runs/ and jobs/, and runs go on by their names"
    )
