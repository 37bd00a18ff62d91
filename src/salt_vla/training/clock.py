"""Time as a guard: a step that hangs ends the run with a word, and a run stops before its limit.

Also the figures of a row of metrics that no two machines agree on. Knows nothing of what is trained.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from salt_vla.errors import ResourceError
from salt_vla.interrupts import Stopped

HUNG = 70  # Exit code: sysexits.h calls it a software error.
AGAIN = 75  # sysexits.h: try again later.
SLURM_END = "SLURM_JOB_END_TIME"  # Seconds since the epoch; Slurm sets it in a job's environment.
OVERSLEPT = 1.0  # Seconds by which a thread that only waits is never late, unless it was not let run at all.
MACHINE_COLUMNS = ("data_wait_s", "step_s", "clips_per_s", "data_wait_share", "memory_gb")


class OutOfTime(Stopped):
    """The run was stopped before its time limit, with a checkpoint; the same command goes on from there."""

    def __init__(self, where: str) -> None:
        Exception.__init__(self, f"stopped: time limit, {where}; the same command goes on from there")
        self.exit_code = AGAIN


class Deadline:
    """When to stop so that a checkpoint is on disk before the time is over.

    The limit counts from the process' start; Slurm's own end of the job is respected too. The margin is
    learned: twice what the longest step, validation and checkpoint have taken so far, and a second.
    """

    def __init__(self, limit_minutes: float) -> None:
        self.limit_minutes = limit_minutes
        ends = [float(os.environ[SLURM_END])] if os.environ.get(SLURM_END, "").isdigit() else []
        if limit_minutes:
            ends.append(psutil.Process().create_time() + 60 * limit_minutes)
        self.end = min(ends, default=float("inf"))
        self._longest: dict[str, float] = {}

    def __bool__(self) -> bool:
        return self.end < float("inf")

    def learn(self, what: str, seconds: float) -> None:
        """A `what` took that long."""
        self._longest[what] = max(self._longest.get(what, 0.0), seconds)

    def is_near(self) -> bool:
        return time.time() + 2 * sum(self._longest.values()) + 1.0 >= self.end

    def require_room(self) -> None:
        """Raises `ResourceError` where nothing can be done before the limit."""
        if self.is_near():
            raise ResourceError(
                f"the time limit leaves no time for a step ({self.limit_minutes:g} minutes from the process' "
                "start, or the end of the Slurm job); raise runtime.time_limit_minutes"
            )


class Watchdog:
    """Calls `on_hang` and ends the process when no `beat` comes for `seconds` (0: never).

    A thread: the stacks of all threads are in `log` first. `on_hang` is told what was being done.
    """

    def __init__(self, seconds: float, log: Path, on_hang: Callable[[str], None]) -> None:
        self.seconds = seconds
        self._log = log
        self._on_hang = on_hang
        self._doing = ""
        self._last = time.monotonic()
        self._done = threading.Event()

    def beat(self, doing: str, grace: float = 0.0) -> None:
        """From now on it is doing that; `grace` more seconds may pass, where others watch first."""
        self._doing, self._last = doing, time.monotonic() + grace

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.beat("start")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        due = time.monotonic() + self.seconds
        while not self._done.wait(max(due - time.monotonic(), 0.01)):
            now = time.monotonic()
            if now > due + OVERSLEPT:
                self._last = max(self._last, now)  # This process was suspended, and the step with it.
            due = max(self._last + self.seconds, now + 0.01)
            if now - self._last < self.seconds:
                continue
            reason = f"{self._doing} took more than {self.seconds:g} s (runtime.watchdog_seconds)"
            try:
                with self._log.open("a") as file:
                    print(f"hung: {reason}; what every thread was doing:", file=file, flush=True)
                    faulthandler.dump_traceback(file)
                self._on_hang(reason)
                print(f"salt-vla: {reason}; {self._log} says where it stood", file=sys.stderr, flush=True)
            finally:
                os._exit(HUNG)


class Pace:
    """What the rows of metrics say of speed and memory, from one line to the next."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._restart()

    def _restart(self) -> None:
        self._began, self._clips, self._waited = time.monotonic(), 0, 0.0

    def step(self, clips: int, waited: float) -> None:
        self._clips += clips
        self._waited += waited

    def as_row(self) -> dict[str, Any]:
        """Of the steps since the last row: clips a second, the share of time that the loop waited for its
        data, and memory in GB (the GPU's peak, or this process' resident memory)."""
        seconds = time.monotonic() - self._began
        memory = torch.cuda.max_memory_allocated() if self._on_gpu else psutil.Process().memory_info().rss
        row = {
            "clips_per_s": round(self._clips / seconds, 3),
            "data_wait_share": round(self._waited / seconds, 4),
            "memory_gb": round(memory / 1e9, 3),
        }
        self._restart()
        return row
