"""Which process: an identity that is never used again, whether it lives, and signals to it and no other.

Times of day are no part of it, since a clock may be set; nothing looks for a process by its command line.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SAME_START = 1.0  # Seconds: how exactly a start is known where only its time of day was written down.
ENDED = ("Z", "X")  # Process states: it has ended, and nobody has waited for it yet.
MOST_OF_STAT = 4096  # bytes
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Another one after every start of the machine; empty where the system has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


@dataclass(frozen=True)
class ProcessId:
    """A pid together with the process' start, since a pid alone is used again: `ticks` of the clock since
    the machine's boot `boot` (proc(5), field 22 of `stat`; no setting of the clock changes it). `started`, in
    seconds since the epoch, is for people, and for systems that count no ticks."""

    pid: int
    started: float
    boot: str = ""
    ticks: int = 0

    def is_alive(self) -> bool:
        """Whether this very process works; one that has ended and that nobody has waited for does not."""
        if self.pid <= 0 or (self.boot and self.boot != boot_id()):
            return False
        state, ticks = state_and_ticks(self.pid)
        if state in ENDED:
            return False
        if self.ticks and ticks:
            return self.ticks == ticks
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < SAME_START
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def send(self, number: signal.Signals) -> bool:
        """Send the signal to this very process; False where it is gone. Raises `PermissionError`."""
        if self.pid <= 0:
            return False
        if not hasattr(os, "pidfd_open"):
            with suppress(ProcessLookupError):
                if self.is_alive():
                    os.kill(self.pid, number)
                    return True
            return False
        with suppress(ProcessLookupError):
            # Opened before the look: what is found alive then is what the descriptor means.
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_alive():
                    signal.pidfd_send_signal(descriptor, number)
                    return True
            finally:
                os.close(descriptor)
        return False


def identity(pid: int | None = None) -> ProcessId:
    """Of a living process; by default of this one. Raises `ProcessLookupError` where there is none."""
    pid = os.getpid() if pid is None else pid
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(pid) from None
    return ProcessId(pid, started, boot_id(), state_and_ticks(pid)[1])


def state_and_ticks(pid: int) -> tuple[str, int]:
    """A process' state letter and its start in clock ticks since boot; "" and 0 where the system does not
    tell."""
    fields = stat_fields(pid)
    return (fields[0], int(fields[19])) if fields else ("", 0)


def stat_fields(pid: int) -> list[str]:
    """The fields of proc(5)'s `stat` from the third on: state, parent, …; empty where the system has none."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return []
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        return os.read(descriptor, MOST_OF_STAT).decode(errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:  # It has gone just now.
        return []
    finally:
        os.close(descriptor)
