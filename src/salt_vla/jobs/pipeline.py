"""How shards are made: views decoded ahead in processes, batches computed here, shards written behind by a
thread, all at once and with few batches in memory.

Knows neither teachers nor what a cache is for; what a batch becomes is a function it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from queue import Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.cache import CacheWriter, Key, Record
from salt_vla.cache.writer import POLL_SECONDS, Shard
from salt_vla.data.read_ahead import read_ahead
from salt_vla.errors import DataError
from salt_vla.progress import Advance, Shares
from salt_vla.rundir import num_cores
from salt_vla.view_store import ViewSource

if TYPE_CHECKING:
    from jaxtyping import UInt8

SHARDS_IN_HAND = 3  # whose leases are held and whose first view has not come yet
BATCHES_TO_WRITE = 2  # that may wait for the disk
VIEWS_WORTH_A_PROCESS = 64  # Its start takes as long as decoding so many small ones.
MAX_DECODERS = 32
Approve = Callable[[Shard, Sequence[DataError]], None]
Compute = Callable[["UInt8[np.ndarray, 'batch frames size size 3']"], np.ndarray]


def num_decoders(wanted: int | None, views: int, device: str = "") -> int:
    """How many processes shall decode `views` views: as many as wanted, or, for None, what suits a computer
    that has a CUDA device, the cores alone, or ("") nothing else to do; none for a handful of views."""
    if wanted is not None:
        return wanted
    cores = num_cores()
    suited = {"": cores, "cpu": cores // 2}.get(device.partition(":")[0], cores - 1)
    return min(max(suited, 1), views // VIEWS_WORTH_A_PROCESS, MAX_DECODERS)


def nothing() -> None:
    """For who has nothing to check."""


def anything(shard: Shard, errors: Sequence[DataError]) -> None:
    """For who publishes whatever comes."""


def records_of(batch: Sequence[tuple[Key, np.ndarray | DataError]], compute: Compute) -> list[Record]:
    """A batch's records: computed at once of all the views that there are, and reasons for the others."""
    seen = [(key, pixels) for key, pixels in batch if not isinstance(pixels, DataError)]
    records = [Record(key, None, str(error)) for key, error in batch if isinstance(error, DataError)]
    if seen:
        arrays = compute(np.stack([pixels for _, pixels in seen]))
        records += [Record(key, array) for (key, _), array in zip(seen, arrays, strict=True)]
    return records


@dataclass
class Pipeline:
    """Makes what a cache lacks. `compute` turns a batch of uint8 clips into an array of as many records;
    batches are `batch_size` keys from each shard's first on, so that no number depends on who made what.

    `num_workers`: processes that decode (0: none). `check` is called between batches and while waiting, and
    may raise: shards that are computed are still written, the one in work is given up. `work`: what computing
    is called in the notes beside the progress. `approve` is asked from another thread before a shard is
    published, with why views of it have no pixels, and may raise: that one is given up, and all that follow.
    """

    writer: CacheWriter
    views: ViewSource
    compute: Compute
    batch_size: int
    num_workers: int
    check: Callable[[], None] = nothing
    work: str = "computing"
    approve: Approve = anything

    def __post_init__(self) -> None:
        self.shares = Shares()
        self.computed = 0  # keys
        self._written_before = 0
        self._shown = self.writer.num_keys_done
        self._drawn: deque[Shard] = deque()
        self._waiting_for = ""

    def run(self, advance: Advance, numbers: Sequence[int] | None = None) -> None:
        """Returns when every shard, or each of these `numbers`, is on disk, whoever made it. Raises what
        decoding, computing, writing or `check` raise."""
        while self._make_what_is_left(advance, numbers):
            pass  # Another writer has taken shards over: they are its now, or ours once more.

    def _make_what_is_left(self, advance: Advance, numbers: Sequence[int] | None) -> int:
        """The number of shards that were taken over by others while they were made here."""
        self._drawn.clear()
        views = read_ahead(self.views, self._keys(numbers), self.num_workers, lambda: self._wait(advance))
        with BackgroundWriter(self.writer, self.approve) as out, closing(views):
            for shard, batch, is_last in self._batches(views):
                self.check()
                with self.shares.of(self.work):
                    records = records_of(batch, self.compute)
                with self.shares.of("disk"):
                    errors = [pixels for _, pixels in batch if isinstance(pixels, DataError)]
                    out.put(_Part(shard, records, is_last, errors))
                self.computed += len(batch)
                self._tell(advance, out)
            with self.shares.of("disk"):
                out.finish()
            self._tell(advance, out)
        self._written_before += out.num_keys
        return out.num_lost

    def _keys(self, numbers: Sequence[int] | None) -> Iterator[Key | None]:
        """Of the shards that this process gets, one after the other; asked from the thread that decodes."""
        for offer in self.writer.offers(numbers):
            if isinstance(offer, Shard):
                self._waiting_for = ""
                self._drawn.append(offer)
                yield from offer.keys
                while len(self._drawn) >= SHARDS_IN_HAND:
                    yield None
            else:
                self._waiting_for = offer
                again = time.monotonic() + POLL_SECONDS
                while time.monotonic() < again:
                    yield None

    def _batches(
        self, views: Iterator[tuple[Key, np.ndarray | DataError]]
    ) -> Iterator[tuple[Shard, list[tuple[Key, np.ndarray | DataError]], bool]]:
        """(shard, keys with their views, whether they are the shard's last)."""
        timed = self._timed(views)
        for first in timed:
            shard = self._drawn.popleft()
            rest = chain([first], islice(timed, len(shard.keys) - 1))
            for start in range(0, len(shard.keys), self.batch_size):
                is_last = start + self.batch_size >= len(shard.keys)
                yield shard, list(islice(rest, self.batch_size)), is_last

    def _timed(
        self, views: Iterator[tuple[Key, np.ndarray | DataError]]
    ) -> Iterator[tuple[Key, np.ndarray | DataError]]:
        while True:
            with self.shares.of("decode"):
                view = next(views, None)
            if view is None:
                return
            yield view

    def _tell(self, advance: Advance, out: BackgroundWriter) -> None:
        done = self.writer.num_keys_done + self.computed - self._written_before - out.num_keys
        written = self.computed * self.writer.manifest.record.record_bytes
        note = f"{written / self.shares.elapsed / 1e9:.3g} GB/s, {self.shares}"
        advance(max(done - self._shown, 0), note=note)
        self._shown = max(done, self._shown)

    def _wait(self, advance: Advance) -> None:
        self.check()
        if self._waiting_for:
            advance(0, note=f"waiting for {self._waiting_for}")


@dataclass(frozen=True)
class _Part:
    """A batch of a shard's records."""

    shard: Shard
    records: list[Record]
    is_last: bool
    errors: list[DataError]


class _GivenUp(Exception):
    """The rest of a shard will not come."""


class BackgroundWriter:
    """A context manager: a thread that encodes, checks and writes shards while the next are computed.

    An error of the thread is raised by the next `put`, or by `finish`. Leaving the block with an error still
    writes the shards that have come whole.
    """

    def __init__(self, writer: CacheWriter, approve: Approve = anything) -> None:
        self.writer, self.approve = writer, approve
        self.num_keys = 0  # of shards that are off our hands, and that the cache's writer counts from now on
        self.num_lost = 0  # shards that others have taken over
        self._parts: Queue[_Part | None] = Queue(BATCHES_TO_WRITE)

    def __enter__(self) -> BackgroundWriter:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._work = self._pool.submit(self._write_shards)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._work.done():
            self._send(None)
        self._pool.shutdown()

    def put(self, part: _Part) -> None:
        """Hand over a batch; waits while `BATCHES_TO_WRITE` are waiting already."""
        if not self._send(part):
            self._work.result()
            raise RuntimeError("the writing thread has ended before its work")

    def finish(self) -> None:
        """Wait until everything is on disk."""
        self._send(None)
        self._work.result()

    def _send(self, part: _Part | None) -> bool:
        """False when nobody is there any more to take it."""
        while not self._work.done():
            try:
                self._parts.put(part, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def _write_shards(self) -> None:
        while (part := self._parts.get()) is not None:
            shard = part.shard
            try:
                is_ours = self.writer.write_shard(shard, self._rest_of(part))
            except _GivenUp:
                return
            self.num_lost += not is_ours
            self.num_keys += len(shard.keys)

    def _rest_of(self, part: _Part) -> Iterator[Record]:
        errors: list[DataError] = []
        while True:
            yield from part.records
            errors += part.errors
            if part.is_last:
                self.approve(part.shard, errors)
                return
            following = self._parts.get()
            if following is None:
                raise _GivenUp
            part = following
