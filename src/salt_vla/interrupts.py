"""Stopping politely: SIGINT, SIGTERM and SIGHUP set a flag that long work looks at in safe places."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """Work was stopped by a signal at a safe place; the same command goes on from there."""

    def __init__(self, signal_number: int, where: str) -> None:
        self.signal_number = signal_number
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} {where}; the same command goes on from there"
        )


class StopFlag:
    def __init__(self) -> None:
        self.signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def check(self, where: str) -> None:
        """Raise `Stopped` if a signal has come."""
        if self:
            raise Stopped(self.signal_number, where)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within the block SIGINT, SIGTERM and SIGHUP set the flag; a second one acts as usual.

    A SIGHUP that is ignored (`nohup`) stays so: the work shall outlive its terminal. Outside the main
    thread Python allows no handlers; the flag then stays false.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def handle(number: int, frame: FrameType | None) -> None:
        flag.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
