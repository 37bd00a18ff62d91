"""The processes that train one run together: who they are, what they tell each other, how they end together.

Knows torch.distributed, not what is trained.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from salt_vla.errors import ConfigError, RunError, UserError
from salt_vla.interrupts import StopFlag, Stopped, stop_on_signals
from salt_vla.rundir import Launched, launched

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # for another's work; a step that hangs is the watchdog's business
ECHO_SECONDS = 5.0  # within which a launcher passes on a signal that the terminal has sent to all
LAST_WORDS_SECONDS = 10.0  # that one process waits for another's reason, or for its end
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
_AT_END, _HAS_ONE = 0, 1  # what the processes tell each other of the next item; more: it failed
_REASON, _SPOKEN = "reason", "the first has spoken"  # keys of the store


class LostProcess(RunError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class World:
    """This process' number among `size` that train together; alone, everything here costs nothing.

    What is agreed upon goes over the CPU, so that no device waits for it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Store | None = field(default=None, compare=False, repr=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """The one that writes files and talks to people."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes, of a tensor that each has."""
        return self.sum(value) / self.size if self.size > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        return value if self.size == 1 else self._reduced(value.clone(), dist.ReduceOp.SUM)

    def agree(self, number: int) -> int:
        """The largest of the numbers that the processes say, to all of them."""
        if self.size == 1:
            return number
        return int(self._reduced(torch.tensor(number, dtype=torch.int64), dist.ReduceOp.MAX))

    def total(self, number: int) -> int:
        """The sum of the numbers that the processes say, to all of them."""
        return int(self.sum(torch.tensor(number, dtype=torch.int64)))

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)

    def tell(self, text: str, teller: int = 0) -> str:
        """What process `teller` says, to all of them; as bytes, since objects would travel as pickles."""
        if self.size == 1:
            return text
        spoken = text.encode() if self.rank == teller else b""
        said = torch.zeros(self.agree(len(spoken)), dtype=torch.uint8)
        if spoken:
            said = torch.frombuffer(bytearray(spoken), dtype=torch.uint8)
        return self.sum(said).numpy().tobytes().decode()

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        assert self.group is not None
        self.group.allreduce([value], how).wait()
        return value

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Within the block torch's complaint that another process is gone becomes that one's last word, where
        it left any, as a `LostProcess`."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            raise LostProcess(self._last_word(error)) from error

    def has_ended(self) -> bool:
        """Whether a process has left with a last word."""
        return self.store is not None and self.store.check([_REASON])

    def _last_word(self, error: RuntimeError) -> str:
        assert self.store is not None
        until = time.monotonic() + 1.0
        with suppress(RuntimeError):
            while time.monotonic() < until:
                if self.has_ended():
                    return self.store.get(_REASON).decode()
                time.sleep(0.02)
        said = str(error).splitlines()[0]
        return (
            f"another of this run's {self.size} processes has died without a word ({said}); the same command "
            "goes on from the last checkpoint"
        )

    def require_even(self, batch_size: int, micro_batches: int) -> None:
        """Raises `ConfigError` where a batch cannot be shared out among processes and micro-batches."""
        parts = self.size * micro_batches
        if batch_size % parts:
            raise ConfigError(
                f"batch_size={batch_size} cannot be shared out evenly among {self.size} processes with "
                f"grad_accum_steps={micro_batches}; choose a multiple of {parts}"
            )

    def is_stopping(self, stop: StopFlag) -> bool:
        """Whether any process has been asked to stop; then `stop` says so in all of them."""
        agreed = self.agree(stop.signal_number)
        if not agreed:  # A signal that came while they agreed counts from the next time on.
            return False
        stop.signal_number = agreed
        return True

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block, in the first process before it is in the others: what is made once is then there."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def in_step(self, items: Iterable[T]) -> Iterator[T | None]:
        """The `items` of each process, one in each at a time; None where it has no more while another has.

        The `UserError` of one process is raised in all.
        """
        if self.size == 1:
            yield from items
            return
        iterator = iter(items)
        while True:
            item, error, said = None, None, _HAS_ONE
            try:
                item = next(iterator)
            except StopIteration:
                said = _AT_END
            except UserError as caught:
                error, said = caught, _HAS_ONE + self.size - self.rank
            most = self.agree(said)
            if most == _AT_END:
                return
            if most > _HAS_ONE:
                teller = _HAS_ONE + self.size - most  # The first of those that failed.
                sentence = self.tell(str(error), teller)
                raise error if error is not None and teller == self.rank else RunError(sentence)
            yield item


@contextmanager
def joined() -> Iterator[World]:
    """Within the block: this process' place among those that torchrun started, or alone.

    Whatever ends the block in one of several processes ends it in all. The first then raises what happened:
    its own error, the `UserError` of another, or a `RunError` that says that another is gone. The others
    leave with the exit code and without a word, when the first has spoken. A block within a block has the
    outer one's world.
    """
    place = launched()
    if place.size == 1 or _worlds:
        yield _worlds[-1] if _worlds else World()
        return
    world = _join(place)
    with stop_on_signals(ECHO_SECONDS), _remembered(world):
        try:
            with world.losses_named():
                yield world
                world.wait()
        except BaseException as error:
            _leave(world, error)
            if world.is_first or not isinstance(error, UserError | Stopped | KeyboardInterrupt):
                raise
            raise SystemExit(_exit_code(error)) from error
        dist.destroy_process_group()


_worlds: list[World] = []  # The one that this process is in, where there are several.


@contextmanager
def _remembered(world: World) -> Iterator[None]:
    _worlds.append(world)
    try:
        yield
    finally:
        _worlds.clear()


def _join(place: Launched) -> World:
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{place.local_size} processes were started on this machine, which has "
                f"{torch.cuda.device_count()} GPUs; give torchrun --nproc-per-node that many at most"
            )
        torch.cuda.set_device(place.local_rank)  # What `cuda` means from here on.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE)
    last_words = PrefixStore("salt_vla", store)
    group = dist.group.WORLD
    return World(place.rank, place.size, place.local_rank, place.local_size, last_words, group)


def _leave(world: World, error: BaseException) -> None:
    """Tell the others why, and let them notice. The first is waited for: when one process has ended, a
    launcher ends the others too."""
    assert world.store is not None
    with suppress(RuntimeError):  # The launcher, which holds the store, may be gone.
        if not isinstance(error, LostProcess):
            world.store.set(_REASON, str(error) if isinstance(error, UserError) else repr(error))
        if not torch.cuda.is_available():  # NCCL would wait for operations that never end.
            dist.destroy_process_group()
        if world.is_first:
            atexit.register(_say_goodbye, world.store)
        else:
            world.store.wait([_SPOKEN], timedelta(seconds=LAST_WORDS_SECONDS))


def _say_goodbye(store: Store) -> None:
    with suppress(RuntimeError):
        store.set(_SPOKEN, "yes")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return 128 + error.signal_number
    return 2 if isinstance(error, UserError) else 130


def _is_loss(error: RuntimeError) -> bool:
    """Whether torch means that another process cannot be reached; gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)
