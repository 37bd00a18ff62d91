"""Work spread over processes that may die: a crash costs one item, which is named, and nothing else.

Knows nothing of videos; decoders written in C are why it exists.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from threading import Event
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items a worker may be ahead of the oldest one that is not answered yet
PAUSE = 0.05  # seconds between two looks at what cannot be waited for: items that are still to come
PARENTS_BUSINESS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item whose worker died or had to be stopped; `reason` is a phrase."""

    reason: str


def map_in_workers(
    function: Callable[[Item], Result],
    items: Iterable[Item | None],
    num_workers: int,
    time_limit: float | None = None,
    *,
    prepare: Callable[[], object] | None = None,
    ahead: int = AHEAD,
    cancelled: Event | None = None,
) -> Iterator[Result | Lost]:
    """`function(item)` of every item, in the items' order, from `num_workers` processes (0: from this one).

    Function, items and results must be picklable. An exception of `function` is raised here; a worker that
    is killed, crashes, or takes longer than `time_limit` seconds for an item gives `Lost` for that item and
    is replaced. Leaving the iterator stops the workers, and so does `cancelled` from another thread; when
    this process dies, they do. Workers call `prepare()` first. At most `ahead` × `num_workers` items are in
    work or wait for an older one. An item `None` has no result; it says that for the moment there is none,
    so that results are not held back until the next one comes.
    """
    if num_workers < 1:
        for item in items:
            if item is None:
                time.sleep(PAUSE)
            else:
                yield function(item)
        return
    workers = [_Worker(function, prepare) for _ in range(num_workers)]
    try:
        yield from _in_order(workers, iter(items), time_limit, ahead * num_workers, cancelled or Event())
    finally:
        for worker in workers:
            worker.stop()


def _in_order(
    workers: list[_Worker[Item, Result]],
    items: Iterator[Item | None],
    time_limit: float | None,
    ahead: int,
    cancelled: Event,
) -> Iterator[Result | Lost]:
    answers: dict[int, Result | Lost] = {}
    asked = due = 0  # the numbers of the next item to ask for and of the next answer to give
    has_more = True
    while not cancelled.is_set():
        nothing_now = False
        for worker in workers:
            if worker.number is None and has_more and not nothing_now and asked < due + ahead:
                for item in islice(items, 1):
                    nothing_now = item is None
                    if item is not None:
                        worker.send(asked, item)
                        asked += 1
                    break
                else:
                    has_more = False
        if due in answers:
            yield answers.pop(due)
            due += 1
            continue
        busy = {worker.connection: worker for worker in workers if worker.number is not None}
        if not busy and not has_more:
            return
        limits = [worker.seconds_left(time_limit) for worker in busy.values()] if time_limit else []
        ready = wait(list(busy), timeout=min([*limits, PAUSE if nothing_now else 5 * PAUSE]))
        for connection, worker in busy.items():
            if connection in ready or (time_limit and worker.seconds_left(time_limit) <= 0):
                number = worker.number
                assert number is not None
                answers[number] = worker.answer(connection in ready, time_limit)


class _Worker(Generic[Item, Result]):
    """A process and the item it is at."""

    def __init__(
        self, function: Callable[[Item], Result], prepare: Callable[[], object] | None = None
    ) -> None:
        self.function, self.prepare = function, prepare
        self.number: int | None = None
        self._start()

    def _start(self) -> None:
        # Not forked: decoders and thread pools of this process would be copied in mid-work.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self.function, self.prepare), daemon=True)
        resource_tracker.ensure_running()  # Its start would let signals through again.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_BUSINESS)
        try:  # What starts blocked stays so: whole groups are sent these, and who started us decides.
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, number: int, item: Item) -> None:
        self.number, self._began = number, time.monotonic()
        try:
            self.connection.send(item)
        except (BrokenPipeError, ConnectionResetError):
            return  # It has died between two items or at its start; `answer` finds out how.

    def seconds_left(self, time_limit: float) -> float:
        return max(self._began + time_limit - time.monotonic(), 0.0)

    def answer(self, has_news: bool, time_limit: float | None) -> Result | Lost:
        """What became of the item in hand; a dead worker, and one that is too slow, is replaced."""
        self.number = None
        try:
            if has_news:
                failed, value = self.connection.recv()
                if failed:
                    raise value
                return value
            reason = f"it took longer than {time_limit:g} s"
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            reason = f"the process that worked on it died ({how})"
        self.stop()
        self._start()
        return Lost(reason)

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()


def _work(
    connection: Connection, function: Callable[[Item], Result], prepare: Callable[[], object] | None
) -> None:
    """A worker's life: items in, (has failed, result or exception) out, until the other end is closed."""
    if sys.platform == "linux":  # Also one that hangs in an item ends with who started it (a thread, there).
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        return  # It died while this process was starting; the items it has sent are nobody's.
    if prepare is not None:
        prepare()
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer: tuple[bool, Result | Exception] = (False, function(item))
        except Exception as error:  # noqa: BLE001 (raised where the results are read)
            answer = (True, error)
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return  # Who asked was killed; there is nobody left to tell.
