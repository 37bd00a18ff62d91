"""Work spread over processes that may die: a crash costs one item, which is named, and nothing else.

Knows nothing of videos; decoders written in C are why it exists.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from threading import Event
from typing import Any, Generic, TypeVar

from salt_vla.errors import ResourceError
from salt_vla.senders import listen_again

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items a worker may be ahead of the oldest one that is not answered yet
PAUSE = 0.05  # seconds between two looks at what cannot be waited for: items that are still to come
PARENTS_BUSINESS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
READY = "ready"  # a worker's first word
SECONDS_TO_START = 300.0  # imports from a slow disk, on a machine with much else to do
DEATHS_AT_START = 3  # of one worker, in a row, before it is no accident


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
    is killed, crashes, or takes longer than `time_limit` seconds for an item (its start not counted) gives
    `Lost` for that item and is replaced. One that dies before it can work costs no item, but three of them
    in a row raise `ResourceError`. Leaving the iterator stops the workers, and so does `cancelled` from
    another thread; when this process dies, they do. Workers call `prepare()` first. At most `ahead` ×
    `num_workers` items are in work or wait for an older one. An item `None` has no result; it says that for
    the moment there is none, so that results are not held back until the next one comes.
    """
    if num_workers < 1:
        for item in items:
            if item is None:
                time.sleep(PAUSE)
            else:
                yield function(item)
        return
    cancelled = cancelled or Event()
    workers = [_Worker(function, prepare, time_limit, cancelled) for _ in range(num_workers)]
    try:
        yield from _in_order(workers, iter(items), ahead * num_workers, cancelled)
    finally:
        for worker in workers:
            worker.stop()


def _in_order(
    workers: list[_Worker[Item, Result]],
    items: Iterator[Item | None],
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
        limits = [worker.seconds_left() for worker in busy.values()]
        ready = wait(list(busy), timeout=min([*limits, PAUSE if nothing_now else 5 * PAUSE]))
        for connection, worker in busy.items():
            if connection in ready or worker.seconds_left() <= 0:
                number = worker.number
                assert number is not None
                for answer in worker.answers(connection in ready):
                    answers[number] = answer


class _Worker(Generic[Item, Result]):
    """A process and the item it is at."""

    def __init__(
        self,
        function: Callable[[Item], Result],
        prepare: Callable[[], object] | None,
        time_limit: float | None,
        cancelled: Event,
    ) -> None:
        self.function, self.prepare = function, prepare
        self.time_limit, self.cancelled = time_limit, cancelled
        self.number: int | None = None
        self._deaths_at_start = 0
        self._talk = ThreadPoolExecutor(1, thread_name_prefix="worker-talk")
        self._start()

    def _start(self) -> None:
        # Not forked: decoders and thread pools of this process would be copied in mid-work.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self.function, self.prepare), daemon=True)
        with signals_left_to_parent():
            self._process.start()
        theirs.close()
        self._is_ready = False
        self._began = time.monotonic()

    def send(self, number: int, item: Item) -> None:
        self.number, self._item, self._began = number, item, time.monotonic()
        try:
            self._within_limit(self.connection.send, item)
        except (BrokenPipeError, ConnectionResetError):
            return  # It has died between two items or at its start; `answers` finds out how.

    def seconds_left(self) -> float:
        limit = self.time_limit if self._is_ready else SECONDS_TO_START
        return max(self._began + limit - time.monotonic(), 0.0) if limit else math.inf

    def answers(self, has_news: bool) -> Iterator[Result | Lost]:
        """What became of the item in hand, once it is known; a dead worker, and one that is too slow, is
        replaced."""
        try:
            said = self._within_limit(self.connection.recv) if has_news else None
            is_in_time = self.seconds_left() > 0
        except (EOFError, OSError):  # Also in the middle of an answer.
            said, is_in_time = None, self.seconds_left() > 0
        if said == READY:
            self._is_ready, self._began, self._deaths_at_start = True, time.monotonic(), 0
            return
        if said is None:
            yield from self._replaced(is_in_time)
            return
        self.number = None
        failed, value = said
        if failed:
            raise value
        yield value

    def _within_limit(self, talk: Callable[..., Any], *args: Item) -> Any:
        """A worker that stops in the middle of an item or of its answer would be waited for, for ever: it is
        killed when the time is over, which ends the talk."""
        talking = self._talk.submit(talk, *args)
        while True:
            done, _ = wait_for([talking], timeout=min(self.seconds_left(), 5 * PAUSE))
            if done:
                return talking.result()
            if self.cancelled.is_set() or self.seconds_left() <= 0:
                self._process.kill()
                talking.exception()  # It ends now.

    def _replaced(self, is_in_time: bool) -> Iterator[Lost]:
        """Another process for one that is dead or too slow, and, if it had begun, what became of its item."""
        if not is_in_time:
            self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        died = f"died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        limit = self.time_limit if self._is_ready else SECONDS_TO_START
        how = died if is_in_time else f"took longer than {limit:g} s"
        self.connection.close()
        if self.cancelled.is_set():
            return
        if self._is_ready:
            self.number = None
            self._start()
            yield Lost(f"the process that worked on it {how}" if is_in_time else f"it {how}")
            return
        self._deaths_at_start += 1
        if self._deaths_at_start == DEATHS_AT_START:
            raise ResourceError(
                f"no process can be started to work beside this one: {DEATHS_AT_START} in a row {how} before "
                "they began; see above what they said, make memory free, or do without them (--workers 0)"
            )
        self._start()
        if self.number is not None:
            self.send(self.number, self._item)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._talk.shutdown()
        self.connection.close()


def end_with_parent() -> None:
    """From here on also a process that hangs ends with who started it (a thread, on Linux); at once where
    that one died while this one was starting, since then no signal will come."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # What it has sent is nobody's, and nobody would hear an exception.


@contextmanager
def signals_left_to_parent() -> Iterator[None]:
    """Processes that are started within never see SIGINT, SIGTERM or SIGHUP: whole groups are sent these, and
    who started us decides. They are stopped by SIGKILL."""
    resource_tracker.ensure_running()  # Its start would let signals through again.
    listen_again()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_BUSINESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    connection: Connection, function: Callable[[Item], Result], prepare: Callable[[], object] | None
) -> None:
    """A worker's life: items in, (has failed, result or exception) out, until the other end is closed."""
    end_with_parent()
    if prepare is not None:
        prepare()
    try:
        connection.send(READY)
    except (BrokenPipeError, ConnectionResetError):
        return
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
