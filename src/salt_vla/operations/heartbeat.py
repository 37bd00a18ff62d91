"""A sign of life beside a supervised command: when it was last seen, and what memory it and its children
held. Written often and cheaply; after a loss it is the last that is known.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from salt_vla.identity import ProcessId, stat_fields
from salt_vla.operations.processes import descendants, reap_orphans

HEARTBEAT = "heartbeat.json"
SECONDS = 5.0
SECONDS_BETWEEN_GPU = 60.0  # Asking starts a program, which takes some hundredths of a second.
MOST_OF_A_CORE = 0.0005  # Of its time: on a machine with very many processes a look at them takes longer.
PAGE = resource.getpagesize()


def last_heartbeat(folder: Path) -> dict[str, Any]:
    """`time` (seconds since the epoch), `pid`, `rss_gb` and `processes` (of the command and all below it),
    and `gpu_gb` (used on the GPUs it may see, by all) where there are some; empty where none can be read."""
    with suppress(OSError, ValueError):
        held = json.loads((folder / HEARTBEAT).read_bytes())
        return held if isinstance(held, dict) else {}
    return {}


@dataclass
class Heartbeat:
    """Writes the file, every `SECONDS` at most. `known`: the processes below the command when it was last
    looked for them, which takes the longer the more processes the machine has."""

    folder: Path
    known: list[ProcessId] = field(default_factory=list)
    gpu: GpuMemory = field(default_factory=lambda: GpuMemory())
    next_look: float = field(default_factory=time.monotonic)

    def beat(self, process: ProcessId) -> None:
        """Where the disk is full there is no sign of life this time."""
        if time.monotonic() >= self.next_look:
            began = time.process_time()
            self.known = descendants(process)
            reap_orphans(but=process)
            cost = time.process_time() - began
            self.next_look = time.monotonic() + max(SECONDS / 2, cost / MOST_OF_A_CORE)
        row: dict[str, Any] = {"time": round(time.time(), 3), "pid": process.pid}
        resident = [resident_bytes(each) for each in (process, *self.known) if each.is_alive()]
        row |= {"rss_gb": round(sum(resident) / 1e9, 3), "processes": len(resident)}
        used = self.gpu.gb()
        if used is not None:
            row["gpu_gb"] = used
        file = self.folder / HEARTBEAT
        part = file.with_name(f".{HEARTBEAT}.{os.getpid()}-0.part")
        # Not flushed to disk: it is written again at once, and a reader of a damaged one does without.
        with suppress(OSError):
            part.write_text(json.dumps(row))
            part.replace(file)


def resident_bytes(process: ProcessId) -> int:
    """0 where it has gone."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        fields = stat_fields(process.pid)
        if fields:
            return int(fields[21]) * PAGE
        return psutil.Process(process.pid).memory_info().rss
    return 0


class GpuMemory:
    """What nvidia-smi says of the GPUs that may be seen; never waited for, since a GPU that has failed lets
    it hang."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._asked: subprocess.Popen[str] | None = None
        self._next = time.monotonic()
        self._last: float | None = None

    def gb(self) -> float | None:
        """The last answer; None before there is one."""
        if self._asked is not None and self._asked.poll() is not None:
            out, _ = self._asked.communicate()
            numbers = [float(word) for word in out.split() if word.replace(".", "", 1).isdigit()]
            self._last = round(sum(numbers) * 2**20 / 1e9, 3) if numbers else None
            self._asked = None
        if self._program and self._asked is None and time.monotonic() >= self._next:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            which = [f"--id={seen}"] if seen else []
            question = [self._program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", *which]
            none, pipe = subprocess.DEVNULL, subprocess.PIPE
            with suppress(OSError):  # No further process can be started.
                self._asked = subprocess.Popen(question, stdin=none, stdout=pipe, stderr=none, text=True)
            self._next = time.monotonic() + SECONDS_BETWEEN_GPU
        return self._last

    @property
    def process(self) -> int:
        """The pid of the program that was asked and has not answered yet; 0 for none."""
        return self._asked.pid if self._asked is not None else 0
