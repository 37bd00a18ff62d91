"""Stopping politely: SIGINT, SIGTERM, SIGHUP and SIGUSR1 (which Slurm can send before a job's end) set a flag
that long work looks at in safe places."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from salt_vla.senders import POLITE as ASKS
from salt_vla.senders import listen_again, sender_of


class Stopped(Exception):
    """Work was stopped by a signal at a safe place; the same command goes on from there."""

    def __init__(self, signal_number: int, where: str) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} {where}{sender_of(signal_number)}; the same "
            "command goes on from there"
        )


class StopFlag:
    """Which signal has asked for an end; 0 for none."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def check(self, where: str) -> None:
        """Raise `Stopped` if a signal has come."""
        if self:
            raise Stopped(self.signal_number, where)


_flags: list[StopFlag] = []  # of the blocks that the main thread is in


@contextmanager
def stop_on_signals(echo_seconds: float = 0.0) -> Iterator[StopFlag]:
    """Within the block the signals of `ASKS` set the flag; a second one acts as usual, unless it comes within
    `echo_seconds`: a launcher passes on what the terminal has sent already.

    A SIGHUP that is ignored (`nohup`) stays so: the work shall outlive its terminal. A block within a block
    has the outer one's flag. Outside the main thread Python allows no handlers; the flag then stays false.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
        return
    if _flags:
        yield _flags[-1]
        return
    flag = StopFlag()
    before = {number: signal.getsignal(number) for number in ASKS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    heard = 0.0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:
            heard = time.monotonic()
            flag.signal_number = number
            if not echo_seconds:
                restore()
        elif time.monotonic() - heard > echo_seconds:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    listen_again()
    _flags.append(flag)
    try:
        yield flag
    finally:
        _flags.remove(flag)
        restore()
