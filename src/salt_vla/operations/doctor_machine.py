"""What `doctor` asks of the machine: cores, memory, limits, disk, clock, and what a logout ends."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from salt_vla.operations.doctor import Finding
from salt_vla.operations.processes import user_manager
from salt_vla.rundir import num_cores, root

SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
ENOUGH_SHARED = 2e9  # Bytes: a few batches of 16 clips of 224² a loader process.
ENOUGH_MEMORY = 4e9
ENOUGH_DISK, LEAST_DISK = 20e9, 1e9
ENOUGH_INODES = 10_000
SLOW_DISK = 50e6  # Bytes a second: a checkpoint of a ViT-B would take half a minute.
PROBE_BYTES = 32 * 2**20
ENOUGH_FILES, ENOUGH_PROCESSES = 4096, 2048
SKEW = 2.0  # Seconds between the machine's clock and its disk's.
EPOCH = 1_735_689_600  # 2025: no run was made before.


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def cores() -> Iterable[Finding]:
    """Those that this process may use, and the quota that a container may have set below them."""
    there, quota = num_cores(), cpu_quota()
    if quota is not None and quota < there:
        text = f"{there} cores are seen, but the container's quota is {quota:g}: threads will wait"
        yield Finding("cores", "warn", text, f"export OMP_NUM_THREADS={max(1, round(quota))}")
    else:
        yield Finding("cores", "ok", f"{there} cores, load {os.getloadavg()[0]:.1f}")


def cpu_quota(folder: Path = CGROUP) -> float | None:
    """Cores, by cgroup v2's `cpu.max` ("quota period" or "max period"); None without a limit."""
    file = folder / "cpu.max"
    words = file.read_text().split() if file.is_file() else []
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def memory_limit(folder: Path = CGROUP) -> int | None:
    """Bytes, by cgroup v2's `memory.max` or v1's `memory.limit_in_bytes`; None without a limit."""
    for file in (folder / "memory.max", folder / "memory" / "memory.limit_in_bytes"):
        said = file.read_text().strip() if file.is_file() else ""
        if said.isdigit() and int(said) < psutil.virtual_memory().total:
            return int(said)
    return None


def memory() -> Iterable[Finding]:
    """RAM that is free, swap, and the limit at which a container's processes are killed."""
    ram, swap, limit = psutil.virtual_memory(), psutil.swap_memory(), memory_limit()
    text = f"{_gb(ram.available)} of {_gb(ram.total)} are available, swap {_gb(swap.total)}"
    if limit is not None:
        text += f"; the container is killed above {_gb(limit)}"
    if ram.available < ENOUGH_MEMORY or (limit or ENOUGH_MEMORY) < ENOUGH_MEMORY:
        yield Finding("memory", "warn", text, "end other work; `salt-vla plan RECIPE` says what a run takes")
    else:
        yield Finding("memory", "ok", text)
    if swap.total and swap.used > swap.total / 2:
        text = f"{swap.percent:.0f}% of the swap is in use: steps will stall"
        yield Finding("memory", "warn", text, "end other work, then swapoff -a && swapon -a")


def shared_memory() -> Iterable[Finding]:
    """Loader processes hand over their batches there."""
    cure = "mount -o remount,size=8G /dev/shm (docker: --shm-size=8g), or data.num_workers=0"
    if not SHARED_MEMORY.is_dir() or not os.access(SHARED_MEMORY, os.W_OK):
        yield Finding("/dev/shm", "warn", "not there, or not writable: loaders need it", cure)
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    is_enough = usage.free >= ENOUGH_SHARED
    text = f"{_gb(usage.free)} of {_gb(usage.total)} are free"
    yield Finding("/dev/shm", "ok" if is_enough else "warn", text, "" if is_enough else cure)


def limits() -> Iterable[Finding]:
    """What the shell's limits forbid."""
    wanted = {
        "open files": (resource.RLIMIT_NOFILE, ENOUGH_FILES, "ulimit -n 65536"),
        "processes": (resource.RLIMIT_NPROC, ENOUGH_PROCESSES, "ulimit -u 16384"),
        "size of a file": (resource.RLIMIT_FSIZE, None, "ulimit -f unlimited"),
        "address space": (resource.RLIMIT_AS, None, "ulimit -v unlimited"),
    }
    said = []
    for name, (which, enough, cure) in wanted.items():
        soft, _ = resource.getrlimit(which)
        is_endless = soft == resource.RLIM_INFINITY
        if not is_endless and (enough is None or soft < enough):
            yield Finding("limits", "warn", f"{name}: {soft}" + f", {enough} are wanted" * bool(enough), cure)
        elif enough is not None:
            said.append(f"{name} {'unlimited' if is_endless else soft}")
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    said.append("core files are written" if soft else "no core files (`ulimit -c unlimited`)")
    yield Finding("limits", "ok", ", ".join(said))


def disk() -> Iterable[Finding]:
    """Where the runs are: room, and how fast what is written is really there."""
    place = root()
    while not place.exists():
        place = place.parent
    usage, system = shutil.disk_usage(place), os.statvfs(place)
    if not os.access(place, os.W_OK):
        cure = "export SALT_VLA_ROOT=/another/folder"
        yield Finding("disk", "refuse", f"{place} cannot be written", cure)
        return
    text = f"{_gb(usage.free)} of {_gb(usage.total)} are free at {place}"
    cure = "salt-vla cache prune, or export SALT_VLA_ROOT=/another/disk"
    if system.f_files and system.f_favail < ENOUGH_INODES:
        yield Finding("disk", "warn", f"only {system.f_favail} more files can be made at {place}", cure)
    if usage.free < ENOUGH_DISK:
        yield Finding("disk", "refuse" if usage.free < LEAST_DISK else "warn", text, cure)
    else:
        yield Finding("disk", "ok", text)
    if usage.free > 2 * PROBE_BYTES:
        speed = write_speed(place)
        is_slow = speed < SLOW_DISK
        text = f"{speed / 1e6:.0f} MB/s are written and flushed at {place}"
        cure = "a local disk, or a larger runtime.checkpoint_every" if is_slow else ""
        yield Finding("disk", "warn" if is_slow else "ok", text, cure)


def write_speed(folder: Path) -> float:
    """Bytes a second, flushed, of a file that has no name and is gone afterwards."""
    data = os.urandom(2**20)  # Zeros would be nothing to some file systems.
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / max(time.monotonic() - began, 1e-9)


def clock() -> Iterable[Finding]:
    """Schedules and logs are by it; the queue starts jobs by it."""
    now, cure = time.time(), "timedatectl set-ntp true"
    if now < EPOCH:
        yield Finding("clock", "refuse", f"it says {time.strftime('%Y-%m-%d')}", cure)
        return
    place = root() if root().is_dir() and os.access(root(), os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=place) as file:
        skew = os.fstat(file.fileno()).st_mtime - time.time()
    if abs(skew) > SKEW:
        yield Finding("clock", "warn", f"the disk's clock is {skew:+.0f} s off (a server's?)", cure)
    synchronised = _is_synchronised()
    known = {True: "synchronised", False: "not synchronised", None: "whether synchronised is not known"}
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {known[synchronised]}"
    yield Finding("clock", "warn" if synchronised is False else "ok", text, cure * (synchronised is False))


def _is_synchronised() -> bool | None:
    program = shutil.which("timedatectl")
    if program is None:
        return None
    command = [program, "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip())


def logout() -> Iterable[Finding]:
    """Whether what `--detach` starts outlives the user's last session."""
    manager = user_manager()
    if manager is None:
        yield Finding(
            "logout", "ok", "no service manager of the user: what is detached is a session of its own"
        )
    elif manager.lingers:
        yield Finding("logout", "ok", "the user lingers: what is detached goes on after a logout")
    else:
        text = "the user does not linger: what is detached may end with the last session"
        yield Finding("logout", "warn", text, "loginctl enable-linger")
