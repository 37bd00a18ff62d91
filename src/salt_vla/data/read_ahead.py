"""Views decoded ahead of whoever asks for them, by processes beside this one, in the order of the keys.

Knows the view lock and processes that may die; not what the pixels are for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event
from typing import Protocol

import numpy as np
import pyarrow as pa

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import SCHEMA, Clip, ClipTable
from salt_vla.data.view_lock import Key, ViewReader
from salt_vla.data.workers import AHEAD, PAUSE, Lost, map_in_workers
from salt_vla.errors import DataError, ResourceError
from salt_vla.geometry import ClipGeometry

RUN_BYTES = 16 * 2**20  # of views of one file that a worker decodes in one pass
BYTES_IN_WORK = 512 * 2**20  # of runs that are being decoded, or wait for an older one
BYTES_READY = 256 * 2**20  # of views in order that nobody has taken yet
# For a run of views, then for each by itself; decoding gives up before.
RUN_SECONDS, KEY_SECONDS = 300.0, 90.0
FILES_LOST = 3  # in a row, with every view of them, before it is the machine's fault and not theirs
NICENESS = 5  # Against others on the machine they must still hold their own.

Pixels = np.ndarray | DataError


class Views(Protocol):
    """`ViewReader`, or a store of views that are decoded already."""

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, Pixels]]: ...


def read_ahead(
    views: Views, keys: Iterable[Key | None], num_workers: int, check: Callable[[], object] = lambda: None
) -> Generator[tuple[Key, Pixels], None, None]:
    """Each key with its uint8 pixels (frames, size, size, 3), or with why it has none, in the keys' order.

    A `ViewReader` decodes in `num_workers` processes (0: here, when asked), some way ahead of the caller: at
    most `BYTES_READY` of views lie ready, and `BYTES_IN_WORK` (or one run, `RUN_BYTES`, a worker) are in
    work. Keys of one file that follow one another share a pass. A worker that dies or hangs costs only the
    keys it had in hand: they are tried again one by one, and given up with the reason. Workers give way to
    the caller's threads (`NICENESS`). The pixels and reasons do not depend on `num_workers`. Raises
    `ResourceError` when workers cannot be started, or die over one file after the other.

    `keys` may give `None` where the next key is not known yet; they are drawn from another thread. While
    there is nothing to give, `check()` is called now and then; what it raises ends the reading.
    """
    if num_workers < 1 or not isinstance(views, ViewReader):
        yield from _read_here(views, keys, check)
        return
    ahead = _Ahead(views, keys, num_workers)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        try:
            yield from ahead.take(pool.submit(ahead.fill), check)
        finally:
            ahead.close()


def _read_here(
    views: Views, keys: Iterable[Key | None], check: Callable[[], object]
) -> Iterator[tuple[Key, Pixels]]:
    """Run by run: no key is held back until another one comes."""
    reader = views if isinstance(views, ViewReader) else None
    runs = _runs(reader, keys) if reader else (key and _Run((key,)) for key in keys)
    for run in runs:
        if run is None:
            time.sleep(PAUSE)
            check()
        else:
            yield from views.read_each(run.keys)


@dataclass(frozen=True)
class _Run:
    """Keys of one file in a row; for a worker, with the little of the clip table that it needs."""

    keys: tuple[Key, ...]
    clips: tuple[Clip, ...] = ()
    roots: tuple[tuple[str, Path], ...] = ()

    def each(self) -> list[_Run]:
        return [_Run((key,), self.clips, self.roots) for key in self.keys]


def _runs(views: ViewReader, keys: Iterable[Key | None]) -> Iterator[_Run | None]:
    """The keys in stretches that a worker decodes in one pass; `None` where the next key is not known yet."""
    most = max(RUN_BYTES // views.geometry.clip_bytes, 1)
    run: list[Key] = []
    clips: list[Clip] = []

    def flush() -> Iterator[_Run]:
        if run:
            names = {clip.dataset for clip in clips} or views.table.roots
            roots = tuple((name, views.table.roots[name]) for name in names)
            yield _Run(tuple(run), tuple(clips), roots)
            run.clear()
            clips.clear()

    for key in keys:
        if key is None:
            yield from flush()
            yield None
            continue
        clip = _clip(views.table, key)
        if len(run) == most or not (clip and clips and _share_a_file(clip, clips[0])):
            yield from flush()
        run.append(key)
        if clip is not None and clip not in clips[-1:]:
            clips.append(clip)
    yield from flush()


def _clip(table: ClipTable, key: Key) -> Clip | None:
    """`None` for a clip that is not in the table: who reads it will say so."""
    try:
        return table.clip(key[0])
    except DataError:
        return None


def _share_a_file(one: Clip, other: Clip) -> bool:
    return (one.dataset, one.file) == (other.dataset, other.file)


@dataclass(frozen=True)
class _Decode:
    """What a worker does: the views of a run."""

    config: ViewConfig
    geometry: ClipGeometry

    def __call__(self, run: _Run) -> list[Pixels]:
        columns = {name: [getattr(clip, name) for clip in run.clips] for name in SCHEMA.names}
        table = ClipTable(pa.table(columns, schema=SCHEMA), dict(run.roots))
        return [pixels for _, pixels in ViewReader(table, self.config, self.geometry).read_each(run.keys)]


def _give_way() -> None:
    """One thread, and only when the caller's threads leave a core: they wait for one another, so that one
    that is held up holds up all."""
    import torch

    os.nice(NICENESS)
    torch.set_num_threads(1)


class _Ahead:
    """A buffer of views in order, filled by one thread and taken from by another."""

    def __init__(self, views: ViewReader, keys: Iterable[Key | None], num_workers: int) -> None:
        self.decode = _Decode(views.config, views.geometry)
        self.runs = _runs(views, keys)
        self.num_workers = num_workers
        self._ready: deque[tuple[Key, Pixels]] = deque()
        self._bytes = 0
        self._changed = Condition()
        self._closed = Event()
        self._lost: dict[object, str] = {}  # file → why nothing of it came, since a view came last

    def fill(self) -> None:
        """Decode everything; returns early once closed."""
        asked: deque[_Run] = deque()

        def items() -> Iterator[_Run | None]:
            for run in self.runs:
                asked.extend([run] if run else [])
                yield run

        ahead = min(max(BYTES_IN_WORK // (RUN_BYTES * self.num_workers), 1), AHEAD)
        answers = map_in_workers(
            self.decode, items(), self.num_workers, RUN_SECONDS,
            prepare=_give_way, ahead=ahead, cancelled=self._closed,
        )  # fmt: skip
        for answer in answers:
            run = asked.popleft()
            if isinstance(answer, Lost):
                self._put_one_by_one(run)
            else:
                self._lost.clear()
                self._put(zip(run.keys, answer, strict=True))

    def _put_one_by_one(self, run: _Run) -> None:
        """Who of a lost run killed its worker comes out when each has one to itself; so does bad luck."""
        answers = map_in_workers(
            self.decode, run.each(), 1, KEY_SECONDS, prepare=_give_way, cancelled=self._closed
        )
        for key, answer in zip(run.keys, answers, strict=False):  # Fewer when closed meanwhile.
            if isinstance(answer, Lost):
                self._note_lost(run, answer.reason)
                self._put([(key, DataError(f"clip {key[0]!r}, view {key[1]}: {answer.reason}"))])
            else:
                self._lost.clear()
                self._put([(key, answer[0])])

    def _note_lost(self, run: _Run, reason: str) -> None:
        """One film may kill every process that opens it. Several in a row do not: memory is full, say."""
        self._lost[(run.clips[0].dataset, run.clips[0].file) if run.clips else run.keys] = reason
        if len(self._lost) == FILES_LOST:
            raise ResourceError(
                "the processes that decode die or hang over one file after the other "
                f"({FILES_LOST} in a row; the last: {reason}), as where memory is full; make some free, take "
                "fewer of them (--workers), and run the same command again"
            )

    def _put(self, views: Iterable[tuple[Key, Pixels]]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < BYTES_READY or self._closed.is_set())
            for key, pixels in views:
                self._ready.append((key, pixels))
                self._bytes += _size(pixels)
            self._changed.notify_all()

    def take(self, filling: Future[None], check: Callable[[], object]) -> Iterator[tuple[Key, Pixels]]:
        while True:
            with self._changed:
                while not self._ready and not filling.done():
                    self._changed.wait(PAUSE)
                    check()
                if not self._ready:
                    filling.result()  # Raises what ended it.
                    return
                key, pixels = self._ready.popleft()
                self._bytes -= _size(pixels)
                self._changed.notify_all()
            yield key, pixels

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()


def _size(pixels: Pixels) -> int:
    return 0 if isinstance(pixels, DataError) else pixels.nbytes
