"""The process beside a run that puts what the run says into its log and passes it on, so that the end of the
run, of its terminal or of the disk's space takes none of the others with it. A program of its own for the
sake of a quick start: it imports nothing of this package.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path

AT_ONCE = 1 << 16  # bytes read
MOST_EARLY = 1 << 20  # bytes that are kept until the log's folder is there
MOST_WAITING = 1 << 24  # bytes that are kept for a terminal or a program that does not take them
LAST_SECONDS = 60.0  # in which it must take the rest, when the run is over
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # There may be space again later.
DRAIN_SECONDS = 2.0
LOOK_SECONDS = 0.5


class Copy:
    """A second place of the log: all that is appended to `source` behind its first `begin` bytes, whoever
    appends it. A successor goes on where this one ends."""

    def __init__(self, path: str, source: Path, begin: int) -> None:
        self.source = source
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.read_fd = -1
        self.offset = begin + os.fstat(self.fd).st_size

    def follow(self) -> None:
        try:
            if self.read_fd < 0:
                self.read_fd = os.open(self.source, os.O_RDONLY)
            while data := os.pread(self.read_fd, AT_ONCE, self.offset):
                self.offset += len(data)
                self.add(data)
        except OSError:
            return  # Not there yet.

    def add(self, data: bytes) -> None:
        write_all(self.fd, data)


class Log:
    """Appended to once its folder is there. What does not fit is counted, and said when there is room."""

    def __init__(self, path: Path, copy: Copy | None) -> None:
        self.path, self.copy = path, copy
        self.fd = -1
        self.early = bytearray()
        self.lost, self.why = 0, ""

    def open(self) -> bool:
        if self.fd < 0 and self.path.parent.is_dir():
            try:
                self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            except OSError as error:
                self.why = str(error.strerror)
                return False
            early, self.early = bytes(self.early), bytearray()
            self._append(early)
        return self.fd >= 0

    def write(self, data: bytes) -> None:
        if self.open():
            self._append(data)
        else:
            room = MOST_EARLY - len(self.early)
            self.early += data[:room]
            self.lost += max(0, len(data) - room)

    def _append(self, data: bytes) -> None:
        if self.lost and data:
            note = f"\n[{self.lost} bytes of the log are missing here: {self.why or 'there was no folder'}]\n"
            if write_all(self.fd, note.encode())[0] == len(note.encode()):
                self.lost = 0
        wrote, why = (0, self.why) if self.lost else write_all(self.fd, data)
        if wrote < len(data):
            self.lost, self.why = self.lost + len(data) - wrote, why
        if self.copy is not None:
            self.copy.follow()
            self.copy.add(data[wrote:])

    def is_file(self, fd: int) -> bool:
        """Whether what is written there is in the log already."""
        return self.fd >= 0 and os.path.samestat(os.fstat(fd), os.fstat(self.fd))

    def close(self) -> None:
        if self.open():
            self._append(b"\n" if self.lost else b"")
        elif self.copy is not None:
            self.copy.add(bytes(self.early))


class Sink:
    """Where the run's output went before: a terminal, a pipe, a file. It may take its time, or be gone."""

    def __init__(self, fd: int) -> None:
        self.fd = _never_waiting(fd)
        self.waiting = bytearray()
        self.dropped = 0
        self.has_bars = os.isatty(fd) and os.environ.get("TERM", "dumb") != "dumb"
        self.at_line_start = True

    def take(self, data: bytes) -> None:
        if self.fd < 0:
            return
        if len(self.waiting) > MOST_WAITING:
            self.dropped += len(data)
            return
        if self.dropped:
            self.waiting += f"\n[{self.dropped} bytes are missing here; the log has them]\n".encode()
            self.dropped = 0
        if self.has_bars and self.at_line_start:
            self.waiting += b"\r\x1b[K"  # A bar may stand in this line; it is drawn again below.
        self.at_line_start = data.endswith(b"\n")
        self.waiting += data

    def push(self) -> None:
        """What it takes at once."""
        try:
            wrote = os.write(self.fd, self.waiting[: select.PIPE_BUF])
        except BlockingIOError:
            return
        except OSError as error:
            wrote = len(self.waiting)
            self.fd = self.fd if error.errno in FULL else -1
        del self.waiting[:wrote]

    def flush(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        poll = select.poll()
        if self.fd >= 0:
            poll.register(self.fd, select.POLLOUT)
        while self.waiting and self.fd >= 0 and (left := until - time.monotonic()) > 0:
            if poll.poll(1000 * left):
                self.push()


def _never_waiting(fd: int) -> int:
    """The same terminal or pipe, opened once more: to be asked not to wait is a property of an opening, which
    others share. Where that cannot be, pieces are so small that a pipe which has room takes them whole."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        try:
            again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return fd
        os.close(fd)
        return again
    return fd


def write_all(fd: int, data: bytes) -> tuple[int, str]:
    """How many bytes could be written, and why no more."""
    done = 0
    while done < len(data):
        try:
            done += os.write(fd, data[done:])
        except OSError as error:
            return done, str(error.strerror)
    return done, ""


class Companion:
    """Reads the run's streams until nobody can write to them any more, and its control until the run ends."""

    def __init__(self, log: Log, streams: dict[int, Sink], control: int, pid: int) -> None:
        self.log, self.streams, self.control, self.pid = log, streams, control, pid
        self.sinks = list(streams.values())
        self.words = bytearray()
        self.has_last_words = False
        for fd in streams:
            os.set_blocking(fd, False)

    def work(self) -> None:
        while self.streams or self.control >= 0:
            poll = select.poll()
            for fd in (*self.streams, self.control):
                if fd >= 0:
                    poll.register(fd, select.POLLIN)
            for sink in self.sinks:
                if sink.waiting and sink.fd >= 0:
                    poll.register(sink.fd, select.POLLOUT)
            looks = self.log.copy is not None or self.log.early
            ready = {fd for fd, _ in poll.poll(1000 * LOOK_SECONDS if looks else None)}
            for fd in ready & set(self.streams):
                self._read(fd)
            for sink in self.sinks:
                if sink.fd in ready:
                    sink.push()
            if self.control in ready:
                self._hear()
            if looks and self.log.open() and self.log.copy is not None:
                self.log.copy.follow()
        self.log.close()
        for sink in self.sinks:
            sink.flush(LAST_SECONDS)

    def _read(self, fd: int) -> bool:
        """Whether there was something."""
        try:
            data = os.read(fd, AT_ONCE)
        except BlockingIOError:
            return False
        sink = self.streams[fd]
        if not data:
            del self.streams[fd]
            return False
        self.log.write(data)
        if sink.fd >= 0 and self.log.is_file(sink.fd):
            sink.fd = -1
        sink.take(data)
        return True

    def _drain(self) -> None:
        for fd in list(self.streams):
            while self._read(fd):
                pass
        for sink in self.sinks:
            sink.flush(DRAIN_SECONDS)

    def _hear(self) -> None:
        """A line of the control is the run's last word, which is answered; its end is that of the run."""
        try:
            heard = os.read(self.control, AT_ONCE)
        except ConnectionResetError:
            heard = b""
        self.words += heard
        if heard and not heard.endswith(b"\n"):
            return
        self._drain()
        words = bytes(self.words)
        if not heard and not words and not self.has_last_words:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            words = f"{when} process {self.pid} is gone without a word: killed, or crashed\n".encode()
        if words and words != b"\n":
            self.log.write(words)
        self.has_last_words = True
        self.words.clear()
        if heard:
            os.write(self.control, b"k")
        else:
            os.close(self.control)
            self.control = -1


def main() -> None:
    """One argument: JSON with `log` and its size at the `begin`, `copy` (or ""), `pid`, `control` and
    `streams` [[read from, pass on to], …], the last two descriptors that were handed down."""
    asked = json.loads(sys.argv[1])
    if os.fork():
        os._exit(0)  # Nobody's child: who looks after the run's children need not know this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # It ends when there is nothing left to hear.
    log = Path(asked["log"])
    copy = Copy(asked["copy"], log, asked["begin"]) if asked["copy"] else None
    streams = {fd: Sink(to) for fd, to in asked["streams"]}
    Companion(Log(log, copy), streams, asked["control"], asked["pid"]).work()


if __name__ == "__main__":
    main()
