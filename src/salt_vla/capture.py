"""All that this process and its children say, native crashes too, into a log as well: from `start` on
standard output and error are pipes to a companion process. Knows nothing of what is said.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from salt_vla import companion

OUT, ERR = 1, 2
SECONDS_TO_DRAIN = 10.0
SHORT_LIFE = 5.0  # seconds
MOST_SHORT_LIVES = 3  # of companions, in a row; then output goes where it went before


class _Capture:
    """The pipes, what was there before, and the companion, which is started again when it is killed: this
    process holds the pipes' other ends too, so that no write to them ever fails or is lost."""

    def __init__(self, log: Path, copy: Path | None, mark: str) -> None:
        self.mark = mark
        self.log, self.copy = log.absolute(), copy
        self.begin = self.log.stat().st_size if self.log.is_file() else 0
        self.pid = os.getpid()
        self.before = [_duplicate(fd) for fd in (OUT, ERR)]
        # One pipe where both go to one place, so that their order is kept.
        pipes = [os.pipe() for _ in range(1 if _are_same(*self.before) else 2)]
        self.read_ends, write_ends = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
        self.control = self._start_companion()
        for fd, end in zip((OUT, ERR), (write_ends[0], write_ends[-1]), strict=True):
            os.dup2(end, fd)
        for end in write_ends:
            os.close(end)
        self.drained = threading.Event()
        self.is_over = False
        self.words = ""
        threading.Thread(target=self._watch, name="capture", daemon=True).start()

    def _start_companion(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        sinks: Sequence[int] = self.before[-len(self.read_ends) :]
        asked = {
            "log": str(self.log),
            "copy": str(self.copy or ""),
            "begin": self.begin,
            "pid": self.pid,
            "control": theirs.fileno(),
            "streams": list(zip(self.read_ends, sinks, strict=True)),
        }
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", companion.__file__, json.dumps(asked)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.before[1],
                pass_fds=(*self.read_ends, *sinks, theirs.fileno()),
                start_new_session=True,
                env=os.environ | ({self.mark: "1"} if self.mark else {}),
            )
            process.wait()  # It goes on as nobody's child.
        return ours

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        short_lives, began = 0, time.monotonic()
        while True:
            with suppress(ConnectionResetError):
                if self.control.recv(1):
                    self.drained.set()
                    continue
            if self.is_over:
                return
            is_short = time.monotonic() - began < SHORT_LIFE
            short_lives, began = (short_lives + 1 if is_short else 0), time.monotonic()
            if short_lives >= MOST_SHORT_LIVES:
                self._give_back()
                return
            self.control = self._start_companion()

    def _give_back(self) -> None:
        for fd, before in zip((OUT, ERR), self.before, strict=True):
            os.dup2(before, fd)

    def finish(self) -> None:
        """Let the companion write what is left, and end with the last words."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        with suppress(OSError):
            self.control.sendall(self.words.replace("\n", " ").encode() + b"\n")
            self.drained.wait(SECONDS_TO_DRAIN)
        self.is_over = True
        self._give_back()
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        for fd in (*self.read_ends, *self.before):
            os.close(fd)


_active: _Capture | None = None


def start(log: Path, copy: Path | None = None, mark: str = "") -> None:
    """From now on what this process says is appended to `log` too, once that one's folder is there, and to
    `copy`, which also gets what others append to `log`. Until `finish`, or the process' end, which calls it.
    `mark`: a variable that is set in the companion's environment, for those who look what belongs to whom.

    Does nothing where somebody has put other streams in the place of standard output and error. The stacks of
    all threads follow when this process or a Python child of it crashes (SIGSEGV, SIGABRT, SIGBUS, SIGFPE,
    SIGILL)."""
    global _active
    finish()
    if not (_is_own(sys.stdout, OUT) and _is_own(sys.stderr, ERR)):
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            stream.reconfigure(line_buffering=True)
    _active = _Capture(log, copy, mark)
    faulthandler.enable(ERR)
    os.environ["PYTHONFAULTHANDLER"] = "1"


def last_words(text: str) -> None:
    """What the log, but no terminal, ends with."""
    if _active is not None:
        _active.words = text


def say_at_once() -> None:
    """The last words now, for a process that is about to end without its `finish`."""
    if _active is not None:
        with suppress(OSError):
            _active.control.sendall(_active.words.replace("\n", " ").encode() + b"\n")


@atexit.register
def finish() -> None:
    """What is said from now on goes where it went before."""
    global _active
    ending, _active = _active, None
    if ending is not None and ending.pid == os.getpid():
        ending.finish()


def terminal() -> TextIO | None:
    """The terminal that standard error went to before, to draw on; None where there was none."""
    if _active is None or not os.isatty(_active.before[1]):
        return None
    return open(_active.before[1], "w", closefd=False)


def note(line: str) -> None:
    """A line for the log alone, for what the terminal shows in another way."""
    if _active is not None and _active.log.parent.is_dir():
        with suppress(OSError), _active.log.open("a") as file:  # A full disk: it is told of what was said.
            file.write(line + "\n")


def _is_own(stream: Any, fd: int) -> bool:
    if stream is None:
        return True
    try:
        return bool(stream.fileno() == fd)
    except (AttributeError, OSError, ValueError):
        return False


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _are_same(first: int, second: int) -> bool:
    return os.path.samestat(os.fstat(first), os.fstat(second))
