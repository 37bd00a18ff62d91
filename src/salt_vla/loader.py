"""Batches one after another: read ahead by processes, sent through shared memory that is used again, watched.

The only room where loader processes live. Knows nothing of what a batch is for.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from salt_vla.batches import Batch, Batches, Memory
from salt_vla.cache import Key
from salt_vla.config import TrainConfig
from salt_vla.data.view_lock import ViewReader
from salt_vla.data.workers import SECONDS_TO_START, end_with_parent, signals_left_to_parent
from salt_vla.errors import DataError, ResourceError, UserError

SHARED_MEMORY = "/dev/shm"
LOOK = 2.0  # seconds between two looks at processes that are waited for
NOTE_BYTES = 2048
SECONDS_TO_DIE = 30.0  # at most between the end of a connection and that of its process: cores are dumped
SPARE_SLOTS = 2  # the batch in use and the one before it; the others wait or are being filled
OF_THE_MACHINE = (signal.SIGKILL, signal.SIGBUS)  # memory or /dev/shm ran out, where nobody killed by hand


@dataclass(frozen=True)
class Loading:
    """How batches come; never which. `num_workers` processes (0: none, a batch is read when asked for) have
    up to `prefetch` batches each in hand. `masks_in`: who draws the masks, the `loader`'s processes or this
    one (`step`). `device`: where batches are wanted; a GPU is sent each while the one before it is in use.
    `patience`: seconds that a process may take for a batch that is waited for (0: for ever).
    """

    num_workers: int = 0
    prefetch: int = 2
    masks_in: Literal["loader", "step"] = "loader"
    device: str = "cpu"
    patience: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Loading:
        data, runtime = config.data, config.runtime
        return cls(data.num_workers, data.prefetch, data.masks_in, runtime.device, runtime.watchdog_seconds)

    @property
    def seconds_to_start(self) -> float:
        """By which a first batch may come later than another, before those who watch here give up."""
        return SECONDS_TO_START + self.patience if self.num_workers else 0.0


def slots(prefetch: int) -> int:
    """Batches for which each loader process holds shared memory."""
    return prefetch + SPARE_SLOTS


def load_from(batches: Batches, first_step: int, how: Loading = Loading()) -> Iterator[Batch]:
    """Batches `first_step`, `first_step` + 1, … in order, on `how.device`.

    With loader processes a batch's memory is written over after the next two are asked for. What a process
    cannot read is raised here as it would be without processes; one that dies, or that takes longer than
    `patience`, raises a `DataError` or `ResourceError` that names the step and the clips in its hands.
    """
    is_sent = torch.device(how.device).type == "cuda"
    if how.num_workers:
        loaded = _in_processes(batches, first_step, how)
    else:
        loaded = in_this_process(batches, first_step, again=is_sent)
    if is_sent:
        yield from one_ahead(loaded, _sender_to(how.device))
    else:
        yield from loaded


def in_this_process(batches: Batches, first_step: int, again: bool = False) -> Iterator[Batch]:
    """Each batch read when it is asked for; with `again` into the memory of the one before it, pinned where
    there is a GPU."""
    memory = None
    for step in range(first_step, len(batches)):
        batch = batches.read(step, memory)
        if again:
            batch = batch.pin_memory()
            memory = Memory(batch.frames, batch.records)
        yield batches.with_masks(batch, step)


def one_ahead(batches: Iterator[Batch], prepare: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """The batches, each of them read and prepared in a thread while the one before it is in use."""

    def following() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else prepare(batch)

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        coming = pool.submit(following)
        while (batch := coming.result()) is not None:
            if batch.frames.is_cuda:
                # Made on another stream: the allocator must not give this memory away before ours is done.
                for tensor in batch.tensors():
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            coming = pool.submit(following)
            yield batch


def _sender_to(device: str) -> Callable[[Batch], Batch]:
    stream = torch.cuda.Stream(device)

    def send(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            moved = batch.pin_memory().to(device)
        stream.synchronize()  # This thread may wait; afterwards the memory that was read from is free.
        return moved

    return send


def _in_processes(batches: Batches, first_step: int, how: Loading) -> Iterator[Batch]:
    context = _Context()
    notes = torch.zeros((how.num_workers, NOTE_BYTES), dtype=torch.uint8).share_memory_()
    before = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        _Answers(batches, notes, how),
        batch_size=None,
        sampler=range(first_step, len(batches)),
        num_workers=how.num_workers,
        prefetch_factor=how.prefetch,
        multiprocessing_context=context,
        worker_init_fn=_prepare_worker,
        timeout=LOOK,
    )
    answers = iter(loader)
    with suppress(ValueError):  # In another thread than the main one torch has set nothing.
        # Torch would raise a worker's death wherever the training happens to be, in the midst of an update.
        signal.signal(signal.SIGCHLD, before)
    mapped: deque[Tensor] = deque(maxlen=2 * how.num_workers * slots(how.prefetch))
    try:
        for step in range(first_step, len(batches)):
            answer = _wait_for(answers, context.started, notes, how.patience)
            if isinstance(answer, UserError):
                raise answer
            mapped.extend(answer.large_tensors())  # A mapping that somebody holds need not be made again.
            yield batches.with_masks(answer, step) if how.masks_in == "step" else answer
    finally:
        del answers, loader
        for process in context.started:
            process.kill()


def _wait_for(
    answers: Iterator[Batch | UserError], processes: list[SpawnProcess], notes: Tensor, patience: float
) -> Batch | UserError:
    asked = began = time.monotonic()
    while True:
        try:
            return next(answers)
        except (RuntimeError, EOFError, OSError) as error:  # Who dies takes with it what it has just sent.
            hands = [_Note.read(notes, number) for number in range(len(notes))]
            is_late = isinstance(error, RuntimeError) and "timed out" in str(error)
            dead = _dead(processes, 0 if isinstance(error, RuntimeError) else SECONDS_TO_DIE)
            if dead:
                first = min(dead, key=lambda number: hands[number].step)
                raise _died(f"{first + 1} of {len(processes)}", processes[first], hands[first]) from error
            if not is_late:
                raise
            if not any(note.is_there for note in hands) and time.monotonic() - asked < SECONDS_TO_START:
                began = time.monotonic()  # Imports from a slow disk are no hanging.
            elif patience and time.monotonic() - began > patience:
                for process in processes:
                    process.kill()  # It would be waited for at the end of this program, too.
                raise _hangs(hands, patience) from error


def _dead(processes: list[SpawnProcess], seconds: float) -> list[int]:
    """The numbers of those that have ended, after waiting up to `seconds` for one."""
    ending = wait([process.sentinel for process in processes], timeout=seconds)
    for process in processes:
        if process.sentinel in ending:
            process.join(SECONDS_TO_DIE)  # What it held open is closed a moment before it has ended.
    return [number for number, process in enumerate(processes) if not process.is_alive()]


def _died(which: str, process: SpawnProcess, note: _Note) -> UserError:
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = f"loader process {which} {how} {note}"
    if code >= 0 and not note.is_there:
        return ResourceError(
            f"{said}: it could not start, and what it said is above; a Python script has to train below "
            '`if __name__ == "__main__":`, since each process imports it anew, or to do without them: '
            "data.num_workers=0"
        )
    if -code in OF_THE_MACHINE:
        free = shutil.disk_usage(SHARED_MEMORY).free
        return ResourceError(
            f"{said}; most likely memory ran out ({free / 1e9:.2f} GB of {SHARED_MEMORY} are free now): "
            "lower data.num_workers, data.prefetch or batch_size, and run the same command again"
        )
    return DataError(
        f"{said}; its file makes the decoder crash: take it out of the clip table, or set "
        "data.store_views=true, which decodes each clip once and leaves out those that cannot be read"
    )


def _hangs(hands: list[_Note], patience: float) -> DataError:
    found = [note for note in hands if note.is_there]
    late = f"a loader process hangs {min(found, key=lambda note: note.step)}" if found else "none has begun"
    return DataError(
        f"no batch came in {patience:g} s: {late}; look at the file and at its disk, or raise "
        "runtime.watchdog_seconds"
    )


@dataclass(frozen=True)
class _Note:
    """What a loader process has in hand: its last word, should it die. Kept in shared memory."""

    step: int = -1
    keys: list[Key] = field(default_factory=list)
    others: int = 0  # keys that there was no room for

    def __str__(self) -> str:
        if not self.is_there:
            return "before it read anything"
        named = ", ".join(f"{clip!r} (view {view})" for clip, view in self.keys)
        more = f" and {self.others} more" * bool(self.others)
        return f"while it read for step {self.step + 1}: clip{'s' * (len(self.keys) > 1)} {named}{more}"

    @property
    def is_there(self) -> bool:
        return self.step >= 0

    def write(self, notes: Tensor, number: int) -> None:
        text = json.dumps([self.step, self.keys, self.others]).encode()
        if len(text) >= NOTE_BYTES and self.keys:
            fewer = self.keys[: len(self.keys) // 2]
            return _Note(self.step, fewer, self.others + len(self.keys) - len(fewer)).write(notes, number)
        text = text[: NOTE_BYTES - 1]
        row = notes[number].numpy()
        row[: len(text) + 1] = memoryview(text + b"\0")
        return None

    @classmethod
    def read(cls, notes: Tensor, number: int) -> _Note:
        text = notes[number].numpy().tobytes().partition(b"\0")[0]
        try:
            step, keys, others = json.loads(text)
        except ValueError:
            return cls()  # Nothing yet, or it died in the midst of a word.
        return cls(step, [(clip, view) for clip, view in keys], others)


class _Answers(Dataset[Batch | UserError]):
    """What a loader process does for a step.

    A `UserError` is an answer: raised, torch would bury it in a traceback. Batches lie in a ring of slots in
    shared memory: fresh memory for each would take longer to get than a batch takes to be read.
    """

    def __init__(self, batches: Batches, notes: Tensor, how: Loading) -> None:
        self.batches, self.notes, self.how = batches, notes, how
        self.ring: deque[Memory] = deque()

    def __len__(self) -> int:
        return len(self.batches)

    def prepare(self, number: int) -> None:
        """In the process, before its first batch."""
        self.number, self.step = number, -1
        if isinstance(self.batches.views, ViewReader):
            self.batches.views.before_pass = self.note

    def note(self, keys: list[Key]) -> None:
        _Note(self.step, keys).write(self.notes, self.number)

    def __getitem__(self, step: int) -> Batch | UserError:
        self.step = step
        self.note(self.batches.keys(step))
        try:
            batch = self._read(step)
        except UserError as error:
            return error
        return self.batches.with_masks(batch, step) if self.how.masks_in == "loader" else batch

    def _read(self, step: int) -> Batch:
        if len(self.ring) == slots(self.how.prefetch):
            self.ring.rotate(-1)
            return self.batches.read(step, into=self.ring[-1])
        batch = self.batches.read(step)
        for tensor in batch.large_tensors():
            tensor.share_memory_()
        self.ring.append(Memory(batch.frames, batch.records))
        return batch


def _prepare_worker(number: int) -> None:
    end_with_parent()
    if faulthandler.is_enabled():
        faulthandler.disable()  # Torch has put a sentence in the place of the stacks.
        faulthandler.enable()
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, _Answers)
    info.dataset.prepare(number)


class _Process(SpawnProcess):
    """Ctrl-C reaches every process of the terminal; the loop decides when to stop, and still waits for us."""

    def start(self) -> None:
        with signals_left_to_parent():
            super().start()


class _Context(SpawnContext):
    """Remembers the processes that a loader starts, which tell how they ended."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Process(*args, **options)
        self.started.append(process)
        return process
