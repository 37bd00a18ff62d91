"""Processes that outlive whoever starts them, that wait until it is written down that they are there, and
whose end is waited for. Which process it is, and signals to it, are `identity`'s business.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from salt_vla.errors import ResourceError, RunError
from salt_vla.identity import (
    ENDED,
    ProcessId,
    boot_id,
    identity,
    stat_fields,
    state_and_ticks,
)
from salt_vla.rundir import DETACHED, SUPERVISED

__all__ = ["ProcessId", "boot_id", "identity", "salt_vla", "start_apart", "start_detached", "user_manager"]

SECONDS_TO_START = 60.0
SECONDS_TO_ANSWER = 3.0
SECONDS_TO_DIE = 10.0  # After SIGKILL; longer only in a system call that hangs.
SCOPES_KNOW_OOM = 253  # systemd's version from which on a scope can outlive a process that was out of memory.
_SUBREAPER = 36  # prctl(2): PR_SET_CHILD_SUBREAPER


def salt_vla(*args: str) -> list[str]:
    """The command line of another salt-vla by this very Python; modules beside the current folder's files
    are never taken for those of a library."""
    return [sys.executable, "-P", "-m", "salt_vla", *args]


@dataclass(frozen=True)
class UserManager:
    """The user's own service manager. Where the user does not linger it ends, with all that it keeps, when
    the user's last session does."""

    version: int
    lingers: bool


def user_manager() -> UserManager | None:
    """None where no manager answers, as in most containers."""
    if not all(shutil.which(tool) for tool in ("systemctl", "systemd-run")):
        return None
    question = ["systemctl", "--user", "show", "--property=Version,SystemState"]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    said = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    if answer.returncode or said.get("SystemState") not in ("running", "degraded", "starting"):
        return None
    digits = "".join(c if c.isdigit() else " " for c in said.get("Version", "")).split()
    user = psutil.Process().username()
    return UserManager(int(digits[0]) if digits else 0, (Path("/var/lib/systemd/linger") / user).exists())


def start_detached(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> ProcessId:
    """Start `command` in a session of its own, without a terminal; it is no part of this process, and goes on
    where this one is killed with all that is below it. What it says goes to the end of `output`."""
    with output.open("ab") as said:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=dict(environment) | {DETACHED: "1"},
            start_new_session=True,
        )
    started = identity(process.pid)
    process.returncode = 0  # Nobody here waits for it.
    return started


def start_apart(command: Sequence[str], output: Path, environment: Mapping[str, str], unit: str) -> None:
    """Start `command`, which says by exit code 0 that it goes on by itself, in a session of its own without a
    terminal, and as the transient scope `unit` of the user's service manager where there is one; what it says
    goes to the end of `output`. Raises `RunError` when it fails."""
    keeper = _as_scope(unit)
    with output.open("ab") as said:
        if keeper and _succeeds([*keeper, *command], said.fileno(), environment):
            return
        if _succeeds(command, said.fileno(), environment):
            return
    raise RunError(f"the supervisor did not start; {output} says why")


def _as_scope(unit: str) -> list[str]:
    manager = user_manager()
    if manager is None:
        return []
    # A scope is no part of the login session, so that a logout does not take it; and one process that is out
    # of memory shall not take the supervisor with it.
    outlives = ["--property=OOMPolicy=continue"] * (manager.version >= SCOPES_KNOW_OOM)
    return ["systemd-run", "--user", "--scope", "--collect", "--quiet", f"--unit={unit}", *outlives, "--"]


def _succeeds(command: Sequence[str], output: int, environment: Mapping[str, str]) -> bool:
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment) | {DETACHED: "1"},
            start_new_session=True,
            timeout=SECONDS_TO_START,
            check=False,
        )
        return done.returncode == 0
    return False


def scope_of_this() -> str:
    """The transient scope that this process lives in; empty outside of one of ours."""
    file = Path("/proc/self/cgroup")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.rpartition("/")[2] for line in lines]
    return next((name for name in names if name.startswith("salt-vla-") and name.endswith(".scope")), "")


def go_on_apart(work: Callable[[Callable[[], None]], int]) -> int:
    """Do `work` in a child that nobody waits for; return 0 as soon as it calls what it is given, and its exit
    code where it ends before. Only for a process without threads."""
    answer, said = os.pipe()
    pid = os.fork()
    if pid:
        os.close(said)
        is_at_work = bool(os.read(answer, 1))
        return 0 if is_at_work else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(answer)
    os.setsid()

    def at_work() -> None:
        with suppress(BrokenPipeError):  # Whoever asked is gone; the work goes on.
            os.write(said, b"1")
        os.close(said)

    return work(at_work)


@dataclass(frozen=True)
class Held:
    """A child that has not begun: it is to be written down first. It begins at `begin`, and never where this
    process dies before; `began` tells which of both it was."""

    process: ProcessId
    _gate: int

    def begin(self) -> None:
        with suppress(BrokenPipeError):  # It was killed already; its end will be seen.
            os.write(self._gate, b"1")
        os.close(self._gate)


def start_held(
    command: Sequence[str], outputs: tuple[int, int], environment: Mapping[str, str], folder: Path, mark: Path
) -> Held:
    """`command` in `folder`, as the leader of a session of its own, its output to the two descriptors; at its
    beginning it writes itself down in the file `mark`. Only for a process without threads."""
    ready, gate = os.pipe()
    program, args, variables = os.fsencode(command[0]), list(command), dict(environment)
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        os.close(ready)
        os.close(gate)
        raise ResourceError(f"no further process can be started: {error.strerror}; see ulimit -u") from error
    if pid == 0:
        try:
            os.close(gate)
            _leave_behind(signals)
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(outputs[0], 1)
            os.dup2(outputs[1], 2)
            variables.pop(DETACHED, None)
            if os.read(ready, 1):
                _write_mark(mark)
                os.execve(program, args, variables)
        except OSError as error:
            os.write(2, f"salt-vla: {command[0]} cannot be started in {folder}: {error}\n".encode())
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    os.close(ready)
    return Held(identity(pid), gate)


def _leave_behind(signals: Iterable[int]) -> None:
    """Of a child: its parent's session, handlers and blocked signals. What is ignored stays so (SIGHUP),
    except what Python itself ignores."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _write_mark(mark: Path) -> None:
    descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(descriptor, json.dumps([os.getpid(), state_and_ticks(os.getpid())[1]]).encode())
    os.close(descriptor)


def began(process: ProcessId, mark: Path) -> bool:
    """Whether a process of `start_held` began its command, now that its parent is gone."""
    with suppress(FileNotFoundError, ValueError):
        return bool(json.loads(mark.read_bytes()) == [process.pid, process.ticks])
    return False


@contextmanager
def end_of(process: ProcessId) -> Iterator[Callable[[float], bool]]:
    """Yields what waits at most so many seconds, and says whether the process has ended. It need not be a
    child; a child that has ended is left for `wait`."""
    if not hasattr(os, "pidfd_open"):
        yield lambda seconds: _ends_within(process, seconds)
        return
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield lambda seconds: True
        return
    try:
        if process.is_alive() or state_and_ticks(process.pid) in ((end, process.ticks) for end in ENDED):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            yield lambda seconds: bool(poll.poll(1000 * seconds))
        else:
            yield lambda seconds: True  # Another process has that number now.
    finally:
        os.close(descriptor)


def _ends_within(process: ProcessId, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < until:
        time.sleep(0.1)
    return not process.is_alive()


def parents() -> dict[int, int]:
    """The parent of every process of this machine, by its pid."""
    proc = Path("/proc/self/stat")
    if not proc.exists():
        return {each.pid: each.info["ppid"] or 0 for each in psutil.process_iter(["ppid"])}
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and (fields := stat_fields(int(name))):
            found[int(name)] = int(fields[1])
    return found


def descendants(process: ProcessId) -> list[ProcessId]:
    """The processes below it that live, without those that shall outlive it and what is below them."""
    if not process.is_alive():
        return []
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found, waiting = [], children.get(process.pid, [])
    while waiting:
        pid = waiting.pop()
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if DETACHED not in psutil.Process(pid).environ():
                found.append(identity(pid))
                waiting += children.get(pid, [])
    return [each for each in found if each.is_alive()]


def of_folder(processes: Iterable[ProcessId], folder: Path) -> list[ProcessId]:
    """Those that were started for what is supervised there. Below the supervisor of a queue's runner may be
    a job, too, that has lost its own supervisor."""
    found = []
    for each in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if psutil.Process(each.pid).environ().get(SUPERVISED) == str(folder.resolve()):
                found.append(each)
    return found


def adopt_orphans() -> None:
    """From now on whatever processes below this one lose their parent are this one's children (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def end_all(processes: Sequence[ProcessId], grace_seconds: float = 0.0) -> int:
    """Kill those that still live after so many seconds, and wait until they are gone; how many there were."""
    _wait_for(processes, grace_seconds)
    killed = sum(process.send(signal.SIGKILL) for process in processes)
    _wait_for(processes, SECONDS_TO_DIE)  # What they hold of a GPU is free only then.
    return killed


def _wait_for(processes: Sequence[ProcessId], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        time.sleep(0.02)


def reap_orphans(but: ProcessId | None = None) -> None:
    """Wait for the children that have ended, except one."""
    for pid, parent in parents().items():
        is_ours = parent == os.getpid() and (but is None or pid != but.pid)
        if is_ours and state_and_ticks(pid)[0] in ENDED:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
