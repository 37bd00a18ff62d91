"""What the kernel wrote down: whom it killed for want of memory, whose crash it saw, how a boot ended.

Reading and parsing are apart, so that lines recorded elsewhere can be parsed, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KMSG = Path("/dev/kmsg")
SECONDS_TO_ANSWER = 5.0
RECORD = 8192  # bytes; longer ones do not exist
_PRINTED = re.compile(r"\[\s*(\d+\.\d+)\]\s+(?:\S+ kernel: )?(.*)")
_KILLED = re.compile(r"Kill(?:ed)? process (?P<pid>\d+)[^(]*\((?P<name>[^)]*)\)")
_SUMMARY = re.compile(r"oom-kill:constraint=(?P<constraint>\w+).*\bpid=(?P<pid>\d+)")
_GROUP = re.compile(r"oom_memcg=([^,]*)")
_RESIDENT = re.compile(r"(?:anon|file|shmem)-rss:(\d+)kB")
_IN_ORDER = re.compile(
    r"systemd-shutdown|Reached target .*(?:Shutdown|Power.?Off|Reboot|Halt)"
    r"|System is (?:powering down|rebooting)|reboot: (?:Restarting system|Power down|machine restart)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class KernelLine:
    """`seconds` since boot, suspension left out."""

    seconds: float
    text: str


@dataclass(frozen=True)
class OutOfMemory:
    """The kernel killed that process. `group`: of the control group whose limit was reached; empty where
    the whole machine was out of memory. `resident_gb`: what the process held, 0 where the line is gone."""

    name: str
    group: str
    resident_gb: float
    lines: tuple[str, ...]


def kernel_lines() -> list[KernelLine]:
    """All that the kernel still has, and this user may read; else nothing."""
    with suppress(OSError):
        return list(parse_kmsg(_records()))
    for command in (["journalctl", "-k", "-b", "-o", "short-monotonic", "--no-pager", "-q"], ["dmesg"]):
        said = _said_by(command)
        if said:
            return list(parse_printed(said))
    return []


def _records() -> list[str]:
    descriptor = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK)
    found = []
    try:
        while True:
            try:
                found.append(os.read(descriptor, RECORD).decode(errors="replace"))
            except BrokenPipeError:
                continue  # Overwritten before it was read; the next one is there.
            except BlockingIOError:
                return found
    finally:
        os.close(descriptor)


def _said_by(command: Sequence[str]) -> list[str]:
    program = shutil.which(command[0])
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def parse_kmsg(records: Sequence[str]) -> Iterator[KernelLine]:
    """Of /dev/kmsg: `priority,number,microseconds,flags;text` (Documentation/ABI/testing/dev-kmsg)."""
    for record in records:
        prefix, found, rest = record.partition(";")
        fields = prefix.split(",")
        if found and len(fields) >= 3 and fields[2].isdigit():
            yield KernelLine(int(fields[2]) / 1e6, rest.split("\n", 1)[0])


def parse_printed(lines: Sequence[str]) -> Iterator[KernelLine]:
    """As dmesg prints them, or `journalctl -k -o short-monotonic`."""
    for line in lines:
        if match := _PRINTED.match(line):
            yield KernelLine(float(match[1]), match[2])


def out_of_memory(lines: Sequence[KernelLine], pid: int, not_before: float = 0.0) -> OutOfMemory | None:
    """What the lines say of the process that had that pid after `not_before` (seconds since boot)."""
    about = [line.text for line in lines if line.seconds >= not_before and _is_kill_of(line.text, pid)]
    if not about:
        return None
    group = next((match[1] for text in about if (match := _GROUP.search(text))), "")
    is_of_group = group or any("memory cgroup out of memory" in text.lower() for text in about)
    names = [match["name"] for text in about if (match := _KILLED.search(text))]
    resident = [sum(map(int, _RESIDENT.findall(text))) for text in about]
    return OutOfMemory(
        names[-1] if names else "",
        (group or "its control group") if is_of_group else "",
        max(resident) * 1024 / 1e9,
        tuple(about),
    )


def _is_kill_of(text: str, pid: int) -> bool:
    match = _KILLED.search(text) or _SUMMARY.search(text)
    return match is not None and int(match["pid"]) == pid


def crashes(lines: Sequence[KernelLine], pid: int, not_before: float = 0.0) -> list[str]:
    """Faults of the process' main thread (others have numbers of their own), and errors of a GPU that it
    used: lines as they are."""
    fault = re.compile(rf"\b[^\s\[]+\[{pid}\]:? (?:segfault|general protection|trap |bad frame)")
    gpu = re.compile(rf"NVRM: Xid .*\bpid='?{pid}\b")
    recent = (line.text for line in lines if line.seconds >= not_before)
    return [text for text in recent if fault.search(text) or gpu.search(text)]


def start_since_boot(ticks: int) -> float:
    """Of a process that began so many clock ticks after boot, on the clock of kernel lines: that one stands
    while the machine is suspended, and both are rounded."""
    suspended = 0.0
    if hasattr(time, "CLOCK_BOOTTIME"):
        suspended = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return max(0.0, ticks / os.sysconf("SC_CLK_TCK") - suspended - 1.0)


def last_lines_of_boot(boot: str, number: int = 200) -> list[str]:
    """What the journal has of the end of that boot; nothing where it keeps none."""
    identifier = boot.replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{32}", identifier):
        return []
    return _said_by(["journalctl", "-b", identifier, "-n", str(number), "-o", "cat", "--no-pager", "-q"])


def end_of_boot(lines: Sequence[str]) -> str:
    """How the machine went down, in words, by the last lines of its journal."""
    if not lines:
        return "it was restarted, or it lost its power"
    if any("Kernel panic" in line for line in lines):
        return "its kernel panicked"
    if any(_IN_ORDER.search(line) for line in lines):
        return "it was shut down in order"
    return "it went down without a shutdown: power was lost, or it was reset, or it hung"
