"""Reads a finished cache: whole records by pread, each checked the first time it is read.

Safe across forked and spawned workers; knows nothing of how a cache is built.
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

MAX_OPEN_SHARDS = 128  # A run reads several caches, and 1,024 open files is the usual limit.


@dataclass(frozen=True)
class RawRecords:
    """Undecoded records, (n, record_bytes) uint8, and how to decode them (on the device, if there is one)."""

    data: UInt8[np.ndarray, "records bytes"]
    encoding: Encoding

    def decode(self) -> np.ndarray:
        """(n, *shape): float32 for latents, uint8 for pixels."""
        if not len(self.data):
            return np.empty(
                (0, *self.encoding.shape), np.uint8 if self.encoding.name == "uint8" else np.float32
            )
        return np.stack([self.encoding.decode(row.data) for row in self.data])


class ArrayCache:
    """An open cache. `clip_ids` are in build order, without repeats; `num_views` is the manifest's."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[int, int] = {}
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if not self.manifest.complete:
            raise CacheError(
                f"the cache at {folder} is unfinished; run its `cache build` again to complete it"
            )
        self.encoding = self.manifest.record
        index = _read_index(folder, self.manifest)
        self._shards = index["shard"].to_numpy()
        self._slots = index["slot"].to_numpy()
        self._checksums = index["checksum"].to_numpy()
        clip_ids = index["clip_id"].to_pylist()
        self.keys: list[tuple[str, int]] = list(zip(clip_ids, index["view"].to_pylist(), strict=True))
        self._row_of = {key: row for row, key in enumerate(self.keys)}
        self.clip_ids: list[str] = list(dict.fromkeys(clip_ids))
        self._checked = np.zeros(len(self.keys), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # Descriptors mean nothing in another process.

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
        data = np.empty((len(keys), self.encoding.record_bytes), dtype=np.uint8)
        for row, (clip_id, view) in enumerate(keys):
            data[row] = np.frombuffer(self._record(clip_id, view), dtype=np.uint8)
        return RawRecords(data, self.encoding)

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
            raise CacheError(f"{where}: the shard is truncated; remove the cache and build it again")
        if not self._checked[row]:
            if checksum(record) != int(self._checksums[row]):
                raise CacheError(
                    f"{where}: the checksum does not match, so the record is damaged; "
                    "remove the cache and build it again"
                )
            self._checked[row] = True
        return record

    def _descriptor(self, shard: int) -> int:
        # A forked worker may go on with its parent's descriptors: pread moves no shared file position.
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self.close()
            self._files[shard] = os.open(self.folder / shard_name(shard), os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        self.close()


def _read_index(folder: Path, manifest: Manifest) -> pa.Table:
    path = folder / INDEX
    cure = f"remove {folder} and build it again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(f"the cache's index {path} cannot be read ({error.strerror}); {cure}") from error
    if f"{checksum(content):016x}" != manifest.index_checksum:
        raise CacheError(f"the cache's index {path} is damaged: its checksum is not the manifest's; {cure}")
    return pa.ipc.open_file(content).read_all()


def open_cache(path: str | os.PathLike[str]) -> ArrayCache:
    """Open a finished cache. Raises `CacheError` when it is missing, unfinished, damaged or newer."""
    return ArrayCache(Path(path))
