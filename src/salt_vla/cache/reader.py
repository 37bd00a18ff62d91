"""Reads a finished cache: whole records by pread, each checked the first time it is read.

Safe across forked and spawned workers: files are opened by the process that reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from salt_vla.cache.format import INDEX, Encoding, Manifest, checksum, shard_name
from salt_vla.errors import CacheError

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

MAX_OPEN_SHARDS = 512  # Half of the usual limit of open files.


@dataclass(frozen=True)
class RawRecords:
    """Undecoded records, (n, record_bytes) uint8, and how to decode them (on the device, if there is one)."""

    data: UInt8[np.ndarray, "records bytes"]
    encoding: Encoding

    def decode(self) -> np.ndarray:
        """(n, *shape): float32 for latents, uint8 for pixels."""
        return np.stack([self.encoding.decode(row.data) for row in self.data])


class ArrayCache:
    """An open cache. `clip_ids` are in build order, without repeats; `num_views` is the manifest's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if not self.manifest.complete:
            raise CacheError(f"the cache at {folder} is unfinished; run its `cache build` again to complete it")
        self.encoding = self.manifest.record
        index = _read_index(folder / INDEX)
        self._shards = index["shard"].to_numpy()
        self._slots = index["slot"].to_numpy()
        self._checksums = index["checksum"].to_numpy()
        clip_ids = index["clip_id"].to_pylist()
        self.keys: list[tuple[str, int]] = list(zip(clip_ids, index["view"].to_pylist(), strict=True))
        self._row_of = {key: row for row, key in enumerate(self.keys)}
        self.clip_ids: list[str] = list(dict.fromkeys(clip_ids))
        self._checked = np.zeros(len(self.keys), dtype=bool)
        self._files: dict[tuple[int, int], int] = {}

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._row_of

    def read(
        self, clip_id: str, token_ids: Sequence[int] | np.ndarray | None = None, view: int = 0
    ) -> Float32[np.ndarray, "tokens dim"]:
        """One record decoded; `token_ids` picks rows. Raises `CacheError` naming clip, file and offset."""
        array = self.encoding.decode(self._record(clip_id, view))
        return array if token_ids is None else array[np.asarray(token_ids, dtype=np.int64)]

    def read_many(self, keys: Sequence[tuple[str, int]]) -> RawRecords:
        """The raw bytes of (clip_id, view) records, in the order asked for."""
        blobs = [np.frombuffer(self._record(clip_id, view), dtype=np.uint8) for clip_id, view in keys]
        return RawRecords(np.stack(blobs), self.encoding)

    def verify(self) -> Iterator[dict[str, Any] | None]:
        """Check every record on disk: None for a good one, else what is wrong and where."""
        for row, (clip_id, view) in enumerate(self.keys):
            try:
                self._checked[row] = False
                self._record(clip_id, view)
                yield None
            except CacheError as error:
                file, offset = self._place(row)
                where = {"clip_id": clip_id, "view": view, "file": file, "offset": offset}
                yield where | {"reason": str(error)}

    def _place(self, row: int) -> tuple[str, int]:
        return shard_name(int(self._shards[row])), int(self._slots[row]) * self.encoding.record_bytes

    def _record(self, clip_id: str, view: int) -> bytes:
        row = self._row_of.get((clip_id, view))
        if row is None:
            raise CacheError(f"cache {self.folder} holds no view {view} of clip {clip_id!r}")
        file, offset = self._place(row)
        where = f"cache {self.folder}, {file}, offset {offset} (clip {clip_id!r}, view {view})"
        try:
            record = os.pread(self._descriptor(int(self._shards[row])), self.encoding.record_bytes, offset)
        except OSError as error:
            raise CacheError(f"{where}: {os.strerror(error.errno or 0)}") from error
        if len(record) != self.encoding.record_bytes:
            raise CacheError(f"{where}: the shard is truncated; rebuild the cache")
        if not self._checked[row]:
            if checksum(record) != int(self._checksums[row]):
                raise CacheError(f"{where}: the checksum does not match; the record is damaged")
            self._checked[row] = True
        return record

    def _descriptor(self, shard: int) -> int:
        # Keyed by process, so that a forked worker opens files of its own.
        key = (os.getpid(), shard)
        if key not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self.close()
            self._files[key] = os.open(self.folder / shard_name(shard), os.O_RDONLY)
        return self._files[key]

    def close(self) -> None:
        for (pid, _), descriptor in self._files.items():
            if pid == os.getpid():
                os.close(descriptor)
        self._files.clear()


def _read_index(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise CacheError(f"the cache's index {path} is missing or damaged ({error}); build the cache again") from error


def open_cache(path: str | os.PathLike[str]) -> ArrayCache:
    """Open a finished cache. Raises `CacheError` when it is missing, unfinished, damaged or newer."""
    return ArrayCache(Path(path))
