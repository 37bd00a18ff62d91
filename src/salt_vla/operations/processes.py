"""Processes by an identity that is never used again: starting them apart from any terminal, looking whether
they live, sending them signals. Nothing here ever looks for a process by a pattern of its command line.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SAME_START = 1.0  # Seconds: how exactly a process' start is known.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Another one after every start of the machine; empty where the system has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


@dataclass(frozen=True)
class ProcessId:
    """A pid together with the process' start (seconds since the epoch) and the machine's, since a pid alone
    is used again."""

    pid: int
    started: float
    boot: str = ""

    def is_alive(self) -> bool:
        """Whether this very process works; one that has ended and that nobody has waited for does not."""
        return self._find() is not None

    def send(self, number: signal.Signals) -> bool:
        """Send the signal to this very process; False where it is gone. Raises `PermissionError`."""
        descriptor = -1
        with suppress(ProcessLookupError):
            try:
                # Opened before the look: what is found alive then is what the descriptor means.
                descriptor = os.pidfd_open(self.pid)
                if self._find() is None:
                    return False
                signal.pidfd_send_signal(descriptor, number)
                return True
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        return False

    def _find(self) -> psutil.Process | None:
        if self.pid <= 0 or (self.boot and self.boot != boot_id()):
            return None
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return process if abs(process.create_time() - self.started) < SAME_START else None
        except psutil.NoSuchProcess:
            return None


def identity(pid: int | None = None) -> ProcessId:
    """Of a living process; by default of this one."""
    process = psutil.Process(pid)
    return ProcessId(process.pid, process.create_time(), boot_id())


def start_detached(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> ProcessId:
    """Start `command` in a session of its own, without a terminal and with nobody waiting for it; what it
    says goes to the end of `output`. `environment` replaces this process' own."""
    with output.open("ab") as said:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=dict(environment),
            start_new_session=True,
            close_fds=True,
        )
    started = identity(process.pid)
    process.returncode = 0  # Nobody here waits for it: it outlives this process.
    return started
