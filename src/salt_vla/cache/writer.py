"""Builds a cache shard by shard; what is in the journal survives any crash, the rest is done again.

A shard becomes visible only whole: temporary file, fsync, rename, then a line in the journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa

from salt_vla.cache.format import (
    INDEX,
    JOURNAL,
    LOCK,
    MANIFEST,
    QUARANTINE,
    Manifest,
    checksum,
    describe_differences,
    shard_name,
)
from salt_vla.errors import CacheError
from salt_vla.rundir import write_atomically, write_text, writing_to

Key = tuple[str, int]  # (clip_id, view)

INDEX_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("view", pa.int32()),
        ("shard", pa.int32()),
        ("slot", pa.int32()),
        ("checksum", pa.uint64()),
    ]
)
UNFINISHED = (".*.part", "shards/.*.part")  # what `write_atomically` leaves behind when it is killed


@dataclass(frozen=True)
class Shard:
    """A fixed stretch of the keys, so that batch boundaries, and with them bytes, never depend on resumes."""

    number: int
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Record:
    """What became of one key: an array, or the reason why there is none."""

    key: Key
    array: np.ndarray | None
    reason: str = ""


class CacheWriter:
    """A context manager over a cache folder under construction; one process at a time.

    `keys` is the complete, ordered list of what the cache shall hold. Raises `CacheError` when the folder
    holds a cache made from something else, or when another process is building it.
    """

    def __init__(self, folder: Path, manifest: Manifest, keys: Sequence[Key]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.keys = list(keys)
        self._lock: IO[str] | None = None

    def __enter__(self) -> CacheWriter:
        self._refuse_strange_folder()
        self._refuse_other_provenance()
        if self.is_complete() and not self._leftovers():
            return self  # Nothing to write, so neither a lock nor permission is needed.
        with writing_to(self.folder):
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        try:
            self._take_over()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _refuse_strange_folder(self) -> None:
        """A folder of other things must not be mistaken for the beginning of a cache."""
        with writing_to(self.folder):
            if not self.folder.exists() or (self.folder / MANIFEST).exists():
                return
            strange = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")} - {
                "shards"
            }
        if strange:
            raise CacheError(
                f"{self.folder} holds other files ({min(strange)}) and no cache; choose another folder"
            )

    def _refuse_other_provenance(self) -> None:
        if (self.folder / MANIFEST).exists():
            differences = Manifest.read(self.folder).differences(self.manifest)
            if differences:
                raise CacheError(
                    f"{self.folder} holds a cache made from something else "
                    f"({describe_differences(differences)}); choose another folder or remove it"
                )

    def _leftovers(self) -> list[Path]:
        """What a killed builder has left behind."""
        patterns = (*UNFINISHED, JOURNAL, LOCK) if self.is_complete() else UNFINISHED
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    def _take_over(self) -> None:
        """Lock the folder, sweep up, begin the manifest."""
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if self.is_complete():
                return  # Another process has just finished it, or is sweeping up.
            raise CacheError(
                f"another process is building {self.folder}; wait for it or choose another folder"
            ) from error
        self._refuse_other_provenance()
        with writing_to(self.folder):
            for leftover in self._leftovers():
                if leftover.name != LOCK:
                    leftover.unlink()
        if not (self.folder / MANIFEST).exists():
            self.manifest.write(self.folder)

    def _release(self) -> None:
        if self._lock is None:
            return
        with self._lock:
            if (self.folder / MANIFEST).exists() and self.is_complete():
                (self.folder / LOCK).unlink(missing_ok=True)
        self._lock = None

    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).exists() and Manifest.read(self.folder).complete

    def missing_shards(self) -> list[Shard]:
        """Shards that are not both in the journal and on disk with the right size, in order."""
        if self.is_complete():
            return []
        done = self._finished()
        return [shard for shard in self._shards() if shard.number not in done]

    def write_shard(self, shard: Shard, records: Iterable[Record]) -> None:
        """Encode and write one shard: a record for each of its keys, in the order they shall lie there.

        Records without an array, and arrays that cannot be encoded, go to the quarantine. A shard of which
        none can be encoded is no accident: `CacheError`.
        """
        encoding = self.manifest.record
        blobs: list[bytes] = []
        entries: list[tuple[str, int, int]] = []
        bad: list[dict[str, Any]] = []
        failed: list[str] = []
        for record in records:
            clip_id, view = record.key
            reason = record.reason
            if record.array is not None:
                try:
                    blob = encoding.encode(record.array)
                    blobs.append(blob)
                    entries.append((clip_id, view, checksum(blob)))
                    continue
                except CacheError as error:
                    reason = str(error)
                    failed.append(f"clip {clip_id!r}, view {view}: {reason}")
            bad.append({"clip_id": clip_id, "view": view, "reason": reason})
        if len(failed) > 1 and not blobs:
            raise CacheError(f"{self.folder}: nothing of shard {shard.number} can be encoded; {failed[0]}")
        line = {"shard": shard.number, "records": entries, "bad": bad}
        if _keys_of(line) != sorted(shard.keys):
            raise ValueError(f"the records of shard {shard.number} are not those of its keys")

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(blobs)

        write_atomically(self.folder / shard_name(shard.number), write)
        self._append_journal(line)

    def finish(self) -> Manifest:
        """Write index and quarantine, then mark the manifest complete: in this order."""
        if self.is_complete():
            return Manifest.read(self.folder)
        missing = self.missing_shards()
        if missing:
            raise CacheError(
                f"{self.folder} lacks {len(missing)} shard(s), the first number {missing[0].number}"
            )
        lines = sorted(self._finished().values(), key=lambda line: line["shard"])
        rows = [
            (clip_id, view, line["shard"], slot, check)
            for line in lines
            for slot, (clip_id, view, check) in enumerate(line["records"])
        ]
        columns = {field.name: [row[at] for row in rows] for at, field in enumerate(INDEX_SCHEMA)}
        index = pa.table(columns, schema=INDEX_SCHEMA)
        write_atomically(self.folder / INDEX, lambda path: _write_arrow(path, index))
        bad = [entry for line in lines for entry in line["bad"]]
        write_text(self.folder / QUARANTINE, json.dumps(bad, indent=2) + "\n")
        manifest = replace(
            self.manifest,
            num_records=len(rows),
            num_quarantined=len(bad),
            index_checksum=f"{checksum((self.folder / INDEX).read_bytes()):016x}",
            complete=True,
        )
        manifest.write(self.folder)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return manifest

    def _shards(self) -> list[Shard]:
        size = self.manifest.records_per_shard
        return [
            Shard(number, tuple(self.keys[start : start + size]))
            for number, start in enumerate(range(0, len(self.keys), size))
        ]

    def _append_journal(self, line: dict[str, Any]) -> None:
        path = self.folder / JOURNAL
        with writing_to(path), path.open("a+b") as journal:
            # A line cut off by a crash has no newline; begin on a fresh one.
            if journal.seek(0, os.SEEK_END):
                journal.seek(-1, os.SEEK_END)
                if journal.read(1) != b"\n":
                    journal.write(b"\n")
            journal.write(json.dumps(line).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _finished(self) -> dict[int, dict[str, Any]]:
        """Journal lines by shard; only those whose shard lies there whole and holds the keys it should."""
        path = self.folder / JOURNAL
        if not path.exists():
            return {}
        shards = self._shards()
        finished = {}
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # Cut off by a crash: that shard is not acknowledged and is built again.
            number = line["shard"]
            file = self.folder / shard_name(number)
            size = len(line["records"]) * self.manifest.record.record_bytes
            is_whole = file.exists() and file.stat().st_size == size
            if is_whole and number < len(shards) and _keys_of(line) == sorted(shards[number].keys):
                finished[number] = line
        return finished


def _keys_of(line: dict[str, Any]) -> list[Key]:
    """The keys that a journal line accounts for, sorted."""
    stored = [(clip_id, view) for clip_id, view, _ in line["records"]]
    return sorted(stored + [(entry["clip_id"], entry["view"]) for entry in line["bad"]])


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
