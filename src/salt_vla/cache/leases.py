"""Who builds what: leases in a folder that several processes share, on one machine or on many.

Owns claims on names, the sign of life behind them and their expiry; knows nothing of shards. Claims are only
ever added, each at a place that one process alone can fill, so no race can undo what another has won.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from salt_vla.rundir import writing_to

FREE = "free"  # where the claim of a lease that was given back points
BEAT_DIGITS = 20
ATTEMPTS_TO_JOIN = 10
BEATS_A_LEASE = 4  # how often a holder shows that it is alive before others may think it is not


@dataclass(frozen=True)
class _Process:
    """What a process says of itself in its file. `started`: in clock ticks since the machine's boot."""

    beat: str
    host: str
    machine: str
    pid: int
    started: str
    seconds: float


class Leases:
    """This process's leases in `folder`; a context manager, at whose end all of them are free.

    The folder holds a file for each process, named by a random token, in which a counter is changed every
    `seconds` / 4; and for each name a row of symbolic links NAME.0, NAME.1, … to such files. The last link
    says who holds the lease; whoever finds that it is over adds the next one, which succeeds once. A lease
    is over when it was given back, when its holder's file is gone, when its holder was a process of this
    machine that is dead, or when the counter stood still for as long as the holder promised to change it,
    by this process's own monotonic clock: times of different machines are never compared.

    A forked child holds nothing. Raises `ResourceError` when the folder cannot be written.
    """

    def __init__(self, folder: Path, seconds: float = 60.0) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"a lease of {seconds} seconds; it must be a positive number")
        self.folder = folder
        self.seconds = seconds
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._join()
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._keep_beating, name="leases", daemon=True)
        self._heart.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, name: str) -> Lease | None:
        """The lease on `name`, or None: somebody else holds it, or has just been quicker.

        To be asked again and again by those who wait, since a holder's silence is noticed between two calls.
        """
        if self._closing.is_set() or os.getpid() != self._pid:
            raise RuntimeError("leases are taken by the process that opened them, and before they are closed")
        with self._lock, writing_to(self.folder):
            if not self._file.exists():
                self._join()  # Somebody has removed the folder.
            number, owner = self._last(name)
            if not self._is_over(owner):
                return None
            claim = self._claim(name, number + 1)
            try:
                claim.symlink_to(self._file.name)
            except FileNotFoundError:
                return None  # The folder has been removed this very moment.
            except FileExistsError:
                # A network file system may repeat a request that had succeeded, and call it a failure.
                if str(claim.readlink()) != self._file.name:
                    return None
            return Lease(name, number + 1, self._file.name, self)

    def holder(self, name: str) -> str:
        """Who holds the lease on `name`, in words; "" when it is free."""
        with writing_to(self.folder), suppress(FileNotFoundError):
            owner = self._last(name)[1]
            if self._is_over(owner):
                return ""
            process = _parse((self.folder / owner).read_bytes())
            return f"{process.host}, process {process.pid}" if process else "an unknown process"
        return ""

    def is_alone(self) -> bool:
        """Whether nobody else is at work in the folder, as far as can be told: by the death of a process of
        this machine, or by silence since this was asked before, or since a lease was found to be held."""
        return all(
            owner == self._file.name or process is None or self._is_over(owner)
            for owner, process in _processes(self.folder)
        )

    def close(self) -> None:
        """Give every lease back."""
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._closing.set()
        self._heart.join()
        with suppress(OSError):  # A file that cannot be removed falls silent, which frees the leases too.
            self._file.unlink()

    def _join(self) -> None:
        """Begin this process's file, under a new name."""
        self._file = self.folder / secrets.token_hex(8)
        process = _Process(
            beat="0" * BEAT_DIGITS,  # The first field, so that its place in the file is known.
            host=socket.gethostname(),
            machine=_machine(),
            pid=self._pid,
            started=_state_and_start(self._pid)[1],
            seconds=self.seconds,
        )
        # It appears whole, so that one in pieces is known to be a dead process's.
        temporary = self.folder / f".{self._file.name}"
        for attempts_left in reversed(range(ATTEMPTS_TO_JOIN)):
            with writing_to(self._file):
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    temporary.write_text(json.dumps(asdict(process)))
                    temporary.replace(self._file)
                    return
                # Somebody who has done is removing the folder, maybe while mkdir looks whether it is there.
                except (FileNotFoundError, FileExistsError):
                    if not attempts_left:
                        raise
                finally:
                    temporary.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        beat = 0
        while not self._closing.wait(self.seconds / BEATS_A_LEASE):
            beat += 1
            # Written over the old number, it needs no space on a full disk; closed at once, so that network
            # file systems send it. Where it fails the leases run out, as they should.
            with suppress(OSError), self._file.open("r+b", buffering=0) as file:
                file.seek(len('{"beat": "'))
                file.write(f"{beat:0{BEAT_DIGITS}}".encode())

    def _claim(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _last(self, name: str) -> tuple[int, str]:
        """Number and owner of the last claim on `name`; (-1, FREE) before the first."""
        number, owner = -1, FREE
        with suppress(FileNotFoundError):
            while True:
                owner = str(self._claim(name, number + 1).readlink())
                number += 1
        return number, owner

    def _is_over(self, owner: str) -> bool:
        if owner == FREE:
            return True
        now = time.monotonic()
        try:
            content = (self.folder / owner).read_bytes()
        except FileNotFoundError:
            return True
        if owner not in self._seen or self._seen[owner][0] != content:
            self._seen[owner] = (content, time.monotonic())
        process = _parse(content)
        if process is not None and process.machine == _machine() and _is_dead(process):
            return True
        return now - self._seen[owner][1] >= (process.seconds if process else self.seconds)


@dataclass(frozen=True)
class Lease:
    """The right to work on `name`, from `Leases.take`, until it is given back or lost."""

    name: str
    number: int
    owner: str
    leases: Leases

    def is_held(self) -> bool:
        """Whether it is still ours, read from the disk: to be asked just before work is published."""
        with writing_to(self.leases.folder):
            is_last = self.leases._last(self.name) == (self.number, self.owner)
            return is_last and os.getpid() == self.leases._pid and (self.leases.folder / self.owner).exists()

    def release(self) -> None:
        """Give it back, if it is still ours."""
        claim = self.leases._claim(self.name, self.number + 1)
        if os.getpid() == self.leases._pid:
            with writing_to(claim), suppress(FileExistsError, FileNotFoundError):  # Lost; all removed.
                claim.symlink_to(FREE)


def remove_leases(folder: Path) -> None:
    """Clear away a folder of leases when nothing is left to be done, even while others do the same."""
    with writing_to(folder):
        try:
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # Somebody has removed it, or still looks.
                raise


def living(folder: Path) -> list[str]:
    """Processes with a file in a folder of leases that are not known to be dead, in words.

    Only looks: a process of another machine counts as living, since its silence takes time to notice.
    """
    return [
        f"{process.host}, process {process.pid}"
        for _, process in _processes(folder)
        if process is not None and (process.machine != _machine() or not _is_dead(process))
    ]


def _processes(folder: Path) -> Iterator[tuple[str, _Process | None]]:
    """Each process's file by name and what it says: None where a crash has left it in pieces."""
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):  # It has just gone.
                if not path.is_symlink() and path.is_file():
                    yield path.name, _parse(path.read_bytes())


def _parse(content: bytes) -> _Process | None:
    """What a process's file says; None when a crash of the machine has left it in pieces."""
    try:
        process = _Process(**json.loads(content))
        is_sound = 0 < process.pid < 2**31 and isinstance(process.pid, int) and 0 < process.seconds < math.inf
    except (ValueError, TypeError):
        return None
    return process if is_sound else None


@functools.cache
def _machine() -> str:
    """Names this machine since its boot, and the processes that can see each other there.

    Where neither is known it is a random text that no other process has, so that nobody is taken for dead.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)


def _is_dead(process: _Process) -> bool:
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It lives, and belongs to another user.
    state, started = _state_and_start(process.pid)
    return state in ("Z", "X") or (bool(started) and started != process.started)


def _state_and_start(pid: int) -> tuple[str, str]:
    """A process's state and the tick of its start; empty where the system does not tell."""
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except OSError:
        return "", ""
