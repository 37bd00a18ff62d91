"""Where a clip's records are and what they must be: written once, memory-mapped, checked page by page.

Opening costs the same for a thousand clips and for ten million. Knows clip ids and checksums, not records.
"""

from __future__ import annotations

import math
import mmap
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from salt_vla.cache.format import INDEX, INDEX_PAGES, Manifest, checksum, hexadecimal
from salt_vla.errors import CacheError
from salt_vla.rundir import write_atomically, write_bytes

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8, UInt64

ClipIdsLike: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray
PAGE = 1 << 16  # bytes of the index that share a checksum
CHUNK = 1 << 16  # clips whose ids are Python objects at one time
CURE = "`salt-vla cache repair` writes it anew"
MANIFEST_KEY = b"salt_vla.manifest"  # of the table's metadata


def as_clip_ids(clip_ids: ClipIdsLike) -> pa.LargeStringArray:
    """Clip ids as one Arrow array, which for ten million of them is a tenth of a list's size. It is a copy,
    whose buffers hold the ids and nothing else: what Arrow writes of a slice depends on what it was cut from.

    Raises `CacheError` for what is no text.
    """
    if isinstance(clip_ids, ClipIds):
        clip_ids = clip_ids.ids
    try:
        chunks = clip_ids.chunks if isinstance(clip_ids, pa.ChunkedArray) else [clip_ids]
        array = pa.concat_arrays([pa.array(chunk, pa.large_string()) for chunk in chunks] or [_NONE])
    except (UnicodeError, TypeError) as error:
        raise CacheError(
            f"clip ids are texts, and one of these is not ({error}); mend the clip table"
        ) from error
    if array.null_count:
        raise CacheError(f"{array.null_count} clips have no id; mend the clip table")
    return array


_NONE = pa.array([], pa.large_string())


def _hashes(clip_ids: pa.LargeStringArray) -> UInt64[np.ndarray, " clips"]:
    ids = (clip.encode() for clip in _in_chunks(clip_ids))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, ids), np.uint64, len(clip_ids))


def require_unique(clip_ids: pa.LargeStringArray) -> None:
    """Raises `CacheError` that names a clip id which comes twice."""
    hashes = _hashes(clip_ids)
    order = np.argsort(hashes, kind="stable")
    is_same = np.diff(hashes[order]) == 0
    alike = order[np.append(is_same, False) | np.append(False, is_same)] if len(order) else order
    counts = Counter(clip_ids.take(pa.array(alike)).to_pylist())
    if twice := [clip_id for clip_id, count in counts.items() if count > 1]:
        raise CacheError(f"clip {twice[0]!r} comes more than once; mend the clip table")


def write_index(
    folder: Path,
    clip_ids: pa.LargeStringArray,
    checksums: UInt64[np.ndarray, "clips views"],
    present: UInt8[np.ndarray, "clips views"],
    manifest: str = "",
) -> tuple[int, str]:
    """Write `index.arrow` and `index.pages`; the former's size and the latter's checksum.

    `clip_ids` are as `as_clip_ids` gives them. `present` is 1 where the clip has a record of that view, whose
    checksum then is in `checksums`.
    `manifest`: kept with the columns' description, from where a lost manifest is written anew.
    """
    views = checksums.shape[1]
    hashes = _hashes(clip_ids)
    order = np.argsort(hashes, kind="stable")
    columns = {
        "clip_id": clip_ids,
        "checksums": pa.FixedSizeListArray.from_arrays(pa.array(checksums.reshape(-1)), views),
        "present": pa.FixedSizeListArray.from_arrays(pa.array(present.reshape(-1)), views),
        "id_hash": pa.array(hashes[order]),
        "id_row": pa.array(order.astype(np.uint32)),
    }
    batch = pa.record_batch(list(columns.values()), names=list(columns), metadata={MANIFEST_KEY: manifest})

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    write_atomically(folder / INDEX, write)
    digests = b"".join(checksum(page).to_bytes(8, "little") for page in _pages(folder / INDEX))
    write_bytes(folder / INDEX_PAGES, digests)
    return (folder / INDEX).stat().st_size, hexadecimal(checksum(digests))


def _schema(views: int) -> pa.Schema:
    return pa.schema(
        {
            "clip_id": pa.large_string(),
            "checksums": pa.list_(pa.uint64(), views),
            "present": pa.list_(pa.uint8(), views),
            "id_hash": pa.uint64(),
            "id_row": pa.uint32(),
        }
    )


def _pages(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while page := file.read(PAGE):
            yield page


def _in_chunks(clip_ids: pa.LargeStringArray) -> Iterator[str]:
    for start in range(0, len(clip_ids), CHUNK):
        yield from clip_ids.slice(start, CHUNK).to_pylist()


class ClipIds(Sequence[str]):
    """Clip ids in build order: reads like a list, without being one of ten million strings."""

    def __init__(self, ids: pa.LargeStringArray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return list(self.ids[at].to_pylist())
        return str(self.ids[range(len(self))[at]].as_py())

    def __iter__(self) -> Iterator[str]:
        return _in_chunks(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(self[at]) for at in range(min(len(self), 3)))
        return f"ClipIds([{shown}{', …' if len(self) > 3 else ''}], {len(self)} in all)"


class Index:
    """The open index of a finished cache. Every byte is checked before it first decides anything.

    Raises `CacheError` when it is missing, of the wrong size, or damaged. The file is never changed in place,
    only replaced, so that a mapping stays whole.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.path = folder / INDEX
        self.num_views = manifest.num_views
        try:
            digests = (folder / INDEX_PAGES).read_bytes()
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != manifest.index_bytes:
                    raise CacheError(
                        f"{self.path} has {size} bytes, not the manifest's {manifest.index_bytes}; {CURE}"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CacheError(f"the cache's index at {folder} cannot be read ({error}); {CURE}") from error
        if hexadecimal(checksum(digests)) != manifest.index_checksum:
            raise CacheError(f"{folder / INDEX_PAGES} is damaged: its checksum is not the manifest's; {CURE}")
        self._digests = memoryview(digests).cast("Q")
        self._is_sound = bytearray(len(self._digests))
        self._is_all_sound = False  # Then no page need be looked up.
        self._bytes = memoryview(self._map)
        whole = pa.py_buffer(self._map)
        self._check_descriptions(size)
        batch = self._batch(whole, manifest)
        self._base = whole.address
        self.num_clips = batch.num_rows
        self.ids: pa.LargeStringArray = batch["clip_id"]
        _, offsets, text = self.ids.buffers()
        self._offsets, self._offsets_at = self._column(offsets, "q")
        self._text, self._text_at = self._column(text, "B")
        self._checksums, self._checksums_at = self._column(batch["checksums"].values.buffers()[1], "Q")
        self._present, self._present_at = self._column(batch["present"].values.buffers()[1], "B")
        self._hashes, self._hashes_at = self._column(batch["id_hash"].buffers()[1], "Q")
        self._rows, self._rows_at = self._column(batch["id_row"].buffers()[1], "I")
        self._has_sound_ids = False  # What Arrow is to work with must not point beyond its end.
        self._margin = 4 * math.isqrt(self.num_clips) + 8

    def _batch(self, whole: pa.Buffer, manifest: Manifest) -> pa.RecordBatch:
        """The columns, which must be those that `write_index` writes, of the manifest's clips."""
        try:
            batch = pa.ipc.open_file(whole).get_batch(0)
            batch.validate()
        except (pa.ArrowException, ValueError, IndexError, OSError) as error:
            raise CacheError(f"{self.path} is no index ({error}); {CURE}") from error
        wanted = _schema(manifest.num_views)
        if not batch.schema.equals(wanted) or any(column.null_count for column in batch.columns):
            raise CacheError(
                f"{self.path} is no index of {manifest.num_views} views: its columns differ; {CURE}"
            )
        if batch.num_rows != manifest.num_clips:
            raise CacheError(
                f"{self.path} has {batch.num_rows} clips, and the manifest {manifest.num_clips}; {CURE}"
            )
        return batch

    def _check_descriptions(self, size: int) -> None:
        """Check what describes the columns, and lies at the file's ends: the schema and the batch's layout,
        each after a mark and its length, and the footer, before its length. Values are checked when used."""
        start = 8
        for _ in range(2):
            self._check(start, start + 8)
            start += 8 + int.from_bytes(self._bytes[start + 4 : start + 8], "little")
        self._check(0, start)
        self._check(size - 10, size)
        self._check(size - 10 - int.from_bytes(self._bytes[size - 10 : size - 6], "little"), size)

    def _column(self, buffer: pa.Buffer | None, code: Literal["q", "Q", "I", "B"]) -> tuple[memoryview, int]:
        """A buffer's values and where in the file they begin; Arrow keeps no buffer for no values."""
        if buffer is None or not buffer.size:
            return memoryview(b"").cast(code), 0
        size = np.dtype(code).itemsize
        whole = memoryview(buffer)[: len(buffer) // size * size]
        return whole.cast("B").cast(code), buffer.address - self._base

    def _check(self, start: int, stop: int) -> None:
        """Compare the pages that bytes `start` … `stop` lie in with their checksums, once each."""
        if self._is_all_sound:
            return
        if not 0 <= start <= stop <= len(self._bytes):
            raise CacheError(f"{self.path} is no index: it points beyond its end; {CURE}")
        for page in range(start >> 16, (stop + PAGE - 1) >> 16):
            if not self._is_sound[page]:
                content = self._bytes[page * PAGE : (page + 1) * PAGE]
                if checksum(content) != self._digests[page]:
                    raise CacheError(
                        f"{self.path} is damaged between bytes {page * PAGE} and "
                        f"{page * PAGE + len(content)}: the checksum does not match; {CURE}"
                    )
                self._is_sound[page] = 1
                self._is_all_sound = 0 not in self._is_sound

    def check_all(self) -> Iterator[CacheError | None]:
        """Each page's verdict, read from the file anew."""
        for page in range(len(self._is_sound)):
            self._is_sound[page], self._is_all_sound = 0, False
            try:
                self._check(page * PAGE, min((page + 1) * PAGE, len(self._bytes)))
                yield None
            except CacheError as error:
                yield error

    def find(self, clip_id: str) -> int | None:
        """The clip's row, or None. Hashes are spread evenly, so their values tell nearly where they stand."""
        # Asked at every reading of a record, so written for speed: no more calls than it needs.
        wanted = clip_id.encode("utf-8", "surrogatepass")
        value: int = xxhash.xxh3_64_intdigest(wanted)
        guess, margin = value * self.num_clips >> 64, self._margin
        low = guess - margin if guess > margin else 0
        high = guess + margin if guess + margin < self.num_clips else self.num_clips
        if not self._is_all_sound:
            self._check(self._hashes_at + 8 * low, self._hashes_at + 8 * high)
        at = bisect_left(self._hashes, value, low, high)
        is_beyond = (at == low and low > 0) or (at == high and high < self.num_clips)
        if is_beyond or (high < self.num_clips and self._hashes[high - 1] == value):
            self._check(self._hashes_at, self._hashes_at + 8 * self.num_clips)
            at = bisect_left(self._hashes, value, 0, self.num_clips)
        while at < self.num_clips and self._hashes[at] == value:
            if not self._is_all_sound:
                self._check(self._rows_at + 4 * at, self._rows_at + 4 * at + 4)
            row = self._rows[at]
            if row >= self.num_clips:
                raise CacheError(f"{self.path} is no index: it has no clip {row}; {CURE}")
            if self._id_bytes(row) == wanted:
                return row
            at += 1
        return None

    def rows_of(self, clip_ids: pa.LargeStringArray) -> Int64[np.ndarray, " clips"]:
        """As `find`, of many at once; −1 for a clip that is not there. Takes no memory that grows with it."""
        rows = np.full(len(clip_ids), -1, np.int64)
        if not self.num_clips:
            return rows
        ids = self.all_ids()
        self._check(self._hashes_at, self._hashes_at + 8 * self.num_clips)
        self._check(self._rows_at, self._rows_at + 4 * self.num_clips)
        known, rows_known = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._rows, np.uint32)
        for start in range(0, len(rows), CHUNK):
            asked = clip_ids.slice(start, CHUNK)
            hashes = _hashes(asked)
            at = np.minimum(np.searchsorted(known, hashes), self.num_clips - 1)
            found = np.minimum(rows_known[at], self.num_clips - 1).astype(np.int64)
            is_right = np.asarray(pc.equal(ids.take(pa.array(found)), asked))
            for other in np.flatnonzero(
                ~is_right & (known[at] == hashes)
            ):  # Of two with one hash, the first.
                row = self.find(asked[int(other)].as_py())
                found[other], is_right[other] = (row, True) if row is not None else (-1, False)
            rows[start : start + CHUNK] = np.where(is_right, found, -1)
        return rows

    def _id_bytes(self, row: int) -> bytes:
        if not self._is_all_sound:
            at = self._offsets_at + 8 * row
            self._check(at, at + 16)
        start, stop = self._offsets[row], self._offsets[row + 1]
        if not self._is_all_sound:
            self._check(self._text_at + start, self._text_at + stop)
        return bytes(self._text[start:stop])

    def clip_id(self, row: int) -> str:
        return self._id_bytes(row).decode("utf-8", "surrogatepass")

    def checksum_of(self, row: int, view: int) -> int | None:
        """Of the record of a clip's row; None where there is none."""
        at = row * self.num_views + view
        self._check(self._present_at + at, self._present_at + at + 1)
        if not self._present[at]:
            return None
        self._check(self._checksums_at + 8 * at, self._checksums_at + 8 * at + 8)
        return self._checksums[at]

    def all_ids(self) -> pa.LargeStringArray:
        """Every clip id, checked."""
        if self.num_clips:
            self._check(self._offsets_at, self._offsets_at + 8 * (self.num_clips + 1))
            self._check(self._text_at, self._text_at + len(self._text))
        if not self._has_sound_ids:
            try:
                self.ids.validate(full=True)
            except pa.ArrowException as error:
                raise CacheError(f"{self.path} is no index ({error}); {CURE}") from error
            self._has_sound_ids = True
        return self.ids

    def all_present(self) -> UInt8[np.ndarray, "clips views"]:
        """1 where there is a record, checked."""
        self._check(self._present_at, self._present_at + len(self._present))
        values = np.frombuffer(self._present, np.uint8)[: self.num_clips * self.num_views]
        return values.reshape(self.num_clips, self.num_views)

    def all_checksums(self) -> UInt64[np.ndarray, "clips views"]:
        """Of every record, checked; 0 where there is none."""
        self._check(self._checksums_at, self._checksums_at + 8 * len(self._checksums))
        values = np.frombuffer(self._checksums, np.uint64)[: self.num_clips * self.num_views]
        return values.reshape(self.num_clips, self.num_views)

    def __reduce__(self) -> Any:
        raise TypeError("an index is opened anew in another process, not sent there")
