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
    MANIFEST,
    QUARANTINE,
    Manifest,
    checksum,
    describe_differences,
    shard_name,
)
from salt_vla.errors import CacheError
from salt_vla.rundir import void, write_atomically, write_text, writing_to

Key = tuple[str, int]  # (clip_id, view)

INDEX_SCHEMA = pa.schema(
    [("clip_id", pa.string()), ("view", pa.int32()), ("shard", pa.int32()), ("slot", pa.int32()), ("checksum", pa.uint64())]
)


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
        with writing_to(self.folder):
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"another process is building {self.folder}; wait for it or choose another folder") from error
        if (self.folder / MANIFEST).exists():
            differences = Manifest.read(self.folder).differences(self.manifest)
            if differences:
                raise CacheError(
                    f"{self.folder} holds a cache made from something else ({describe_differences(differences)}); "
                    "choose another folder or remove it"
                )
        else:
            self.manifest.write(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        if self.is_complete():
            (self.folder / ".lock").unlink(missing_ok=True)

    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).exists() and Manifest.read(self.folder).complete

    def missing_shards(self) -> list[Shard]:
        """Shards that are not both in the journal and on disk with the right size, in order."""
        if self.is_complete():
            return []
        size = self.manifest.records_per_shard
        shards = [
            Shard(number, tuple(self.keys[start : start + size]))
            for number, start in enumerate(range(0, len(self.keys), size))
        ]
        done = self._finished()
        return [shard for shard in shards if shard.number not in done]

    def write_shard(self, shard: Shard, records: Iterable[Record]) -> None:
        """Encode and write one shard; records without an array go to the quarantine."""
        encoding = self.manifest.record
        blobs: list[bytes] = []
        entries: list[tuple[str, int, int]] = []
        bad: list[dict[str, Any]] = []
        for record in records:
            clip_id, view = record.key
            if record.array is None:
                bad.append({"clip_id": clip_id, "view": view, "reason": record.reason})
                continue
            blob = encoding.encode(record.array)
            blobs.append(blob)
            entries.append((clip_id, view, checksum(blob)))
        write_atomically(self.folder / shard_name(shard.number), lambda path: void(path.write_bytes(b"".join(blobs))))
        self._append_journal({"shard": shard.number, "records": entries, "bad": bad})

    def finish(self) -> Manifest:
        """Write index and quarantine, then mark the manifest complete: in this order."""
        if self.is_complete():
            return Manifest.read(self.folder)
        lines = sorted(self._finished().values(), key=lambda line: line["shard"])
        rows = [
            (clip_id, view, line["shard"], slot, check)
            for line in lines
            for slot, (clip_id, view, check) in enumerate(line["records"])
        ]
        columns = list(zip(*rows, strict=True)) or [[] for _ in INDEX_SCHEMA]
        index = pa.table(dict(zip(INDEX_SCHEMA.names, columns, strict=True)), schema=INDEX_SCHEMA)
        write_atomically(self.folder / INDEX, lambda path: _write_arrow(path, index))
        bad = [entry for line in lines for entry in line["bad"]]
        write_text(self.folder / QUARANTINE, json.dumps(bad, indent=2) + "\n")
        manifest = replace(self.manifest, num_records=len(rows), num_quarantined=len(bad), complete=True)
        manifest.write(self.folder)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return manifest

    def _append_journal(self, line: dict[str, Any]) -> None:
        path = self.folder / JOURNAL
        with writing_to(path), path.open("a") as journal:
            # A line cut off by a crash has no newline; begin on a fresh one.
            if journal.tell() and path.read_bytes()[-1:] != b"\n":
                journal.write("\n")
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _finished(self) -> dict[int, dict[str, Any]]:
        path = self.folder / JOURNAL
        if not path.exists():
            return {}
        finished = {}
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # Cut off by a crash: that shard is not acknowledged and is built again.
            file = self.folder / shard_name(line["shard"])
            size = len(line["records"]) * self.manifest.record.record_bytes
            if file.exists() and file.stat().st_size == size:
                finished[line["shard"]] = line
        return finished


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
