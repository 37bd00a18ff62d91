"""Reads a finished cache: whole records by preadv, each checked the first time it is read.

Safe across forked and spawned workers; knows nothing of how a cache is built.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from salt_vla.cache.format import CorruptRecord, Encoding, Manifest, checksum, shard_name
from salt_vla.cache.index import ClipIds, ClipIdsLike, Index, as_clip_ids
from salt_vla.cache.shards import Key, open_to_read
from salt_vla.errors import CacheError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, UInt8

MAX_OPEN_SHARDS = 128  # A run reads several caches, and 1,024 open files is the usual limit.
MOST_NUMBERS = 1 << 16  # of records found before that are kept in mind; some 10 MB
# What the machine or the user lacks; another record would fare no better.
NOT_THE_RECORDS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
Check = Literal["first", "always", "never"]


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


class AnotherCache(CacheError):
    """What lies there now is not the cache that was opened."""


class _OpenShard:
    """A descriptor that closes when nobody reads from it any more, in whatever thread. `stamp` says which
    file it is, `generation` the how manieth that this process has met in the shard's place."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = open_to_read(path)
        about = os.fstat(self.descriptor)
        self.stamp = hash((about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns))
        self.generation = 0

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Place(NamedTuple):
    """Where a record is, and what its checksum must be; None where that has been compared already."""

    number: int
    shard: int
    offset: int
    checksum: int | None


class ArrayCache:
    """An open cache. `num_views` is the manifest's; `check` says when a record's checksum is compared: at its
    first reading in this process, always, or never. Where another file is met in a shard's place, what was
    compared in the old one counts no more; and a record that a repair has written anew is read as it is then.

    Memory does not grow with the cache: a byte a record, what of the index has been looked at, and where
    `MOST_NUMBERS` records were found before.
    """

    def __init__(self, folder: Path, check: Check = "first") -> None:
        self._files: dict[int, _OpenShard] = {}
        if check not in get_args(Check):
            raise ValueError(f"check is one of {', '.join(get_args(Check))}, not {check!r}")
        self.folder, self.check = folder, check
        self.manifest = Manifest.read(folder)
        if not self.manifest.complete:
            raise CacheError(
                f"the cache at {folder} is unfinished; run its `cache build` again to complete it"
            )
        self.encoding = self.manifest.record
        # Asked for at every record, and properties there.
        self._record_bytes = self.encoding.record_bytes
        self._num_views, self._records_per_shard = self.manifest.num_views, self.manifest.records_per_shard
        # Where a key stands follows from the cache's identity, so that a repair changes none.
        self._numbers: dict[Key, int] = {}
        self.index = Index(folder, self.manifest)
        self._checked_in = _zeros(self.manifest.num_keys)  # of a record: its file's generation; 0 if not yet
        self._generations = _zeros(self.manifest.num_shards)
        self._stamps = _zeros(8 * self.manifest.num_shards).cast("q")
        self._most_open = MAX_OPEN_SHARDS

    def __reduce__(self) -> tuple[Any, ...]:
        # Opened anew in another process, where neither descriptors nor mappings mean anything.
        return _reopen, (self.folder, self.check, self.manifest)

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @cached_property
    def clip_ids(self) -> ClipIds:
        """Clips with at least one record, in build order, without repeats."""
        ids = self.index.all_ids()
        if self.manifest.num_quarantined:
            ids = ids.filter(pa.array(self.index.all_present().any(axis=1)))
        return ClipIds(ids)

    def keys(self) -> Iterator[Key]:
        """Every (clip_id, view) that has a record, in build order."""
        present = self.index.all_present()
        for clip_id, views in zip(ClipIds(self.index.all_ids()), present, strict=True):
            yield from ((clip_id, int(view)) for view in np.flatnonzero(views))

    def __contains__(self, key: Key) -> bool:
        row = self.index.find(key[0])
        has_view = row is not None and 0 <= key[1] < self.num_views
        return has_view and self.index.checksum_of(row or 0, key[1]) is not None

    def with_views(self, clip_ids: ClipIdsLike, num_views: int) -> Bool[np.ndarray, " clips"]:
        """Which of these clips have records of views 0 … `num_views` − 1: (clips,) bool."""
        asked = as_clip_ids(clip_ids)
        if num_views > self.num_views:
            return np.zeros(len(asked), bool)
        has_all = np.asarray(self.index.all_present()[:, :num_views].all(axis=1))
        if asked.equals(self.index.all_ids()):
            return has_all
        rows = self.index.rows_of(asked)
        is_known = rows >= 0
        is_known[is_known] = has_all[rows[is_known]]
        return is_known

    def read(
        self, clip_id: str, token_ids: Sequence[int] | np.ndarray | None = None, view: int = 0
    ) -> Float32[np.ndarray, "tokens dim"]:
        """One record decoded; `token_ids` picks rows. Raises `CacheError` for a clip or view that is not
        there, `CorruptRecord` for a damaged one."""
        data = np.empty(self._record_bytes, np.uint8)
        self._read_into(data.data, self._find(clip_id, view), (clip_id, view))
        array = self.encoding.decode(data.data)
        return array if token_ids is None else array[np.asarray(token_ids, dtype=np.int64)]

    def read_many(
        self, keys: Sequence[Key], out: UInt8[np.ndarray, "records bytes"] | None = None
    ) -> RawRecords:
        """The raw bytes of (clip_id, view) records, in the order asked for.

        `out`: a buffer to fill and hand back, C-contiguous, (n, record_bytes) uint8; fresh memory costs as
        much as reading what the page cache holds. Errors as of `read`.
        """
        shape = (len(keys), self._record_bytes)
        data = np.empty(shape, np.uint8) if out is None else out
        if data.shape != shape or data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(f"`out` must be C-contiguous uint8 of shape {shape}")
        whole, size = data.reshape(-1).data, self._record_bytes
        places = [self._find(*key) for key in keys]
        for at, place in enumerate(places):
            if at + 1 < len(places) and places[at + 1].checksum is not None:
                self._fetch(places[at + 1])  # While this one's checksum is computed.
            self._read_into(whole[at * size : (at + 1) * size], place, keys[at])
        return RawRecords(data, self.encoding)

    def _find(self, clip_id: str, view: int) -> _Place:
        number = self._numbers.get((clip_id, view))
        if number is None:
            row = self.index.find(clip_id)
            if row is None or not 0 <= view < self._num_views:
                raise self._nowhere(clip_id, view)
            number = row * self._num_views + view
            if len(self._numbers) >= MOST_NUMBERS:
                self._numbers.clear()
            self._numbers[clip_id, view] = number
        wanted = None
        if not self._checked_in[number]:
            wanted = self.index.checksum_of(*divmod(number, self._num_views))
            if wanted is None:
                raise self._nowhere(clip_id, view)
        shard, slot = divmod(number, self._records_per_shard)
        return _Place(number, shard, slot * self._record_bytes, wanted)

    def _fetch(self, place: _Place) -> None:
        """Have the disk begin with a record that is to be read next, unless it is in memory."""
        no_wait, advise = getattr(os, "RWF_NOWAIT", None), getattr(os, "posix_fadvise", None)
        if no_wait is None or advise is None:
            return  # Not every system has them.
        with suppress(OSError):  # Its reading will tell; and not every file system answers such a question.
            opened = self._shard(place.shard)
            try:
                os.preadv(opened.descriptor, (bytearray(1),), place.offset, no_wait)
            except BlockingIOError:
                advise(opened.descriptor, place.offset, self._record_bytes, os.POSIX_FADV_WILLNEED)

    def _read_into(self, buffer: memoryview, place: _Place, key: Key) -> None:
        reason = self._try_to_read(buffer, place)
        if reason and self._is_renewed(place.shard):
            reason = self._try_to_read(buffer, place)
        if reason:
            raise CorruptRecord(self.folder, *key, shard_name(place.shard), place.offset, reason)

    def _try_to_read(self, buffer: memoryview, place: _Place) -> str:
        """Read a record, and compare its checksum where that is to be; what is wrong with it, if anything."""
        number, shard, offset, wanted = place
        try:
            # Kept, so that no other thread closes it meanwhile.
            opened = self._files.get(shard) or self._shard(shard)
            filled = more = os.preadv(opened.descriptor, (buffer,), offset)
            while more and filled < len(buffer):  # A file system may give less at once than there is.
                more = os.preadv(opened.descriptor, (buffer[filled:],), offset + filled)
                filled += more
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in NOT_THE_RECORDS_FAULT:
                raise CacheError(f"{self.folder / shard_name(shard)} cannot be read: {reason}") from error
            return reason
        if filled != len(buffer):
            return "the shard is truncated"
        if self.check == "never" or self._checked_in[number] == opened.generation:
            return ""
        found = checksum(buffer)
        # The index is asked now where it was not asked before, or is another since.
        if found != wanted and found != self.index.checksum_of(*divmod(number, self._num_views)):
            return "the checksum does not match, so the record is damaged"
        if self.check == "first":
            self._checked_in[number] = opened.generation
        return ""

    def _is_renewed(self, shard: int) -> bool:
        """Whether a shard, or the index, was written anew since it was opened, as by a repair; it is then
        opened again. Raises `CacheError` when another cache has taken this one's place."""
        before = self._stamps[shard]
        self._files.pop(shard, None)
        with suppress(OSError):
            self._shard(shard)
        is_new = self._stamps[shard] != before
        try:
            manifest = Manifest.read(self.folder)
            if manifest.complete and manifest.index_checksum != self.manifest.index_checksum:
                self._go_on_with(manifest, Index(self.folder, manifest))
                is_new = True
        except AnotherCache:
            raise
        except CacheError:
            pass  # It is just being written; what is damaged may be told so meanwhile.
        return is_new

    def _go_on_with(self, manifest: Manifest, index: Index) -> None:
        """Take an index that a repair has written, if all that could be read can be read still."""
        if (
            manifest.identity != self.manifest.identity
            or not index.all_ids().equals(self.index.all_ids())
            or (index.all_present() < self.index.all_present()).any()
        ):
            raise AnotherCache(
                f"the cache {self.folder} was changed while it was in use; start the command again"
            )
        self.index, self.manifest = index, manifest
        self.close()

    def _nowhere(self, clip_id: str, view: int) -> CacheError:
        return CacheError(f"cache {self.folder} holds no view {view} of clip {clip_id!r}")

    def _shard(self, number: int) -> _OpenShard:
        # A forked worker may go on with its parent's descriptors: preadv moves no shared file position.
        shard = self._files.get(number)
        if shard is None:
            if len(self._files) >= self._most_open:
                self.close()
            try:
                shard = _OpenShard(self.folder / shard_name(number))
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                    raise
                self._most_open = max(len(self._files) // 2, 1)  # Others in this process need some too.
                self.close()
                shard = _OpenShard(self.folder / shard_name(number))
            if self._stamps[number] != shard.stamp:
                # Noted before the stamp, so that no other thread trusts what was checked in the old file.
                self._generations[number] = self._generations[number] % 255 + 1
                self._stamps[number] = shard.stamp
            shard.generation = self._generations[number]
            self._files[number] = shard
        return shard

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._files.clear()


def _reopen(folder: Path, check: Check, manifest: Manifest) -> ArrayCache:
    cache = ArrayCache(folder, check)
    if cache.manifest != manifest:
        raise AnotherCache(f"the cache {folder} was changed while it was in use; start the command again")
    return cache


def _zeros(size: int) -> memoryview:
    """Bytes that take neither time nor memory before they are written to, which a heap's may."""
    return memoryview(mmap.mmap(-1, max(size, 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def open_cache(path: str | os.PathLike[str], check: Check = "first") -> ArrayCache:
    """Open a finished cache. Raises `CacheError` when it is missing, unfinished, damaged or newer."""
    return ArrayCache(Path(path), check)
