"""Why a process is gone that wrote down no reason itself: what the kernel, the machine's boots, the log's end
and the last heartbeat tell.
"""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from salt_vla.errors import UserError
from salt_vla.identity import ProcessId, boot_id
from salt_vla.operations import kernel_log
from salt_vla.operations.asked import asked_of
from salt_vla.operations.heartbeat import last_heartbeat
from salt_vla.operations.launch import supervision
from salt_vla.rundir import RunDirectory, Status

CGROUPS = Path("/sys/fs/cgroup")
END_OF_LOG = 1 << 16  # bytes
TIME = "%Y-%m-%d %H:%M:%S"
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Loss:
    """`ending` is one of rundir's `ENDINGS`, `reason` a sentence; `lines` are the kernel's, as they are."""

    ending: str
    reason: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class OomCount:
    """How often the kernel has killed for want of memory in a process' control group, which `file` counts."""

    file: Path
    kills: int

    def since(self) -> int:
        """How often more it is by now; 0 where the group is gone."""
        return max(0, _kills(self.file) - self.kills)


def oom_count(pid: int) -> OomCount | None:
    """To be asked while the process lives. None where its control group counts no such thing."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            place = path.lstrip("/")
            file = CGROUPS / place / "memory.events"  # cgroup v2
            if "memory" in controllers.split(","):
                file = CGROUPS / "memory" / place / "memory.oom_control"  # v1
            if file.is_file() and "oom_kill " in file.read_text():
                return OomCount(file, _kills(file))
    return None


def _kills(file: Path) -> int:
    with suppress(OSError):
        return kills_in(file.read_text())
    return 0


def kills_in(text: str) -> int:
    """The count `oom_kill` of a control group's memory.events (v2) or memory.oom_control (v1)."""
    match = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else 0


def explain_loss(
    folder: Path, process: ProcessId, code: int | None = None, before: OomCount | None = None
) -> Loss:
    """Why `process`, which worked on the run or job in `folder`, is gone. `code`: its exit code as the system
    says it, negative for a signal, None where nobody saw it; `before`: counted while it lived."""
    if process.boot and process.boot != boot_id():
        how = kernel_log.end_of_boot(kernel_log.last_lines_of_boot(process.boot))
        return Loss("machine", f"the machine went down while it worked ({how}){_last_seen(folder)}")
    lines = kernel_log.kernel_lines()
    began = kernel_log.start_since_boot(process.ticks)
    if code in (None, -signal.SIGKILL):
        killed = kernel_log.out_of_memory(lines, process.pid, began)
        if killed is not None:
            return Loss("out_of_memory", _words(killed) + _last_seen(folder), killed.lines)
        if code is not None and before is not None and before.since():
            reason = "killed by SIGKILL; the kernel did that in its control group, for want of memory"
            return Loss("out_of_memory", reason + _last_seen(folder))
    seen = tuple(kernel_log.crashes(lines, process.pid, began))
    noted = f"; the kernel says: {seen[-1]}" if seen else ""
    asked = asked_of(folder, process=process)
    if asked is not None and asked.how == "kill" and code in (None, -signal.SIGKILL):
        return Loss("killed", f"killed {asked.words}")
    if code is not None and code < 0 and code != -signal.SIGKILL:
        return Loss("signal", f"{_signal_words(-code, folder)}{noted}{_last_seen(folder)}", seen)
    fatal = _fatal_error(folder / "log.txt")
    if code is None and fatal:
        return Loss("signal", f"crashed: {fatal}; log.txt has the stacks{noted}{_last_seen(folder)}", seen)
    if code is None:
        return Loss("killed", f"killed without a word (the process is gone){noted}{_last_seen(folder)}", seen)
    if code == -signal.SIGKILL:
        said = "killed by SIGKILL; the kernel does not say by whom"
        return Loss("killed", f"{said}{noted}{_last_seen(folder)}", seen)
    return Loss("exception", f"ended with exit code {code}; the end of log.txt says why{noted}", seen)


def _words(killed: kernel_log.OutOfMemory) -> str:
    where = f"the memory limit of {killed.group} was reached" if killed.group else "the machine had none left"
    held = f" when it held {killed.resident_gb:.1f} GB" if killed.resident_gb else ""
    return f"killed by the kernel for want of memory ({where}){held}"


def _signal_words(number: int, folder: Path) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    fatal = _fatal_error(folder / "log.txt")
    return f"crashed by {name} ({fatal}; log.txt has the stacks)" if fatal else f"ended by {name}"


def _fatal_error(log: Path) -> str:
    """What faulthandler wrote last, unless something has been begun after it."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - END_OF_LOG))
        end = file.read().decode(errors="replace")
        if match := list(_FATAL.finditer(end)):
            rest = end[match[-1].end() :]
            return "" if re.search(r"^(?:started,|resumed at) step ", rest, re.MULTILINE) else match[-1][1]
    return ""


def _last_seen(folder: Path) -> str:
    """Such as "; last seen at 2026-11-23 08:10:00 with 3.2 GB of memory and 20.1 GB on the GPU"."""
    heartbeat = last_heartbeat(folder)
    when, parts = heartbeat.get("time"), []
    if not isinstance(when, int | float):
        return ""
    for key, place in (("rss_gb", "of memory"), ("gpu_gb", "on the GPU")):
        if isinstance(heartbeat.get(key), int | float):
            parts.append(f"{heartbeat[key]:.1f} GB {place}")
    at = time.strftime(TIME, time.localtime(when))
    return f"; last seen at {at}" + (f" with {' and '.join(parts)}" if parts else "")


def explained(run: RunDirectory) -> Status:
    """The run's status; of one whose process is gone without a word, with all that can be found out, which is
    written down for those who ask when the kernel has forgotten. Where that cannot be, it is only told."""
    status = run.status()
    if status.ending not in ("killed", "machine") or status.ended or _is_looked_after(run):
        return status
    loss = explain_loss(run.path, status.process)
    found = replace(status, ending=loss.ending, exit_reason=loss.reason, ended=_last_change(run))
    with suppress(OSError, UserError):
        if os.access(run.path, os.W_OK) and run.settle(found) == found:
            run.log(f"{time.strftime(TIME)} {found.state}: {found.exit_reason}")
    return found


def _is_looked_after(run: RunDirectory) -> bool:
    """Whether a supervisor is about to write down more than others can know: it sees the exit code."""
    with suppress(UserError):
        now = supervision(run.path)
        return now is not None and now.is_at_work
    return False


def _last_change(run: RunDirectory) -> float:
    times = [0.0]
    for file in (run.metrics_file, run.log_file, run.path / "status.json"):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)
