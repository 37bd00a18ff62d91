"""A text file that others append to, read from where the last look ended.

Knows bytes and lines, not what they mean.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK = 64 * 1024
REMEMBERED = 64  # bytes before the place: still there, unless another file took this one's


class Appended:
    """Begins again where the file is another one, or no longer what was read of it (a resume trims metrics, a
    log may be rotated). `beginnings` counts those, `bytes_read` all that was read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.bytes_read = self.beginnings = 0
        self._inode, self._place, self._before = -1, 0, b""

    def poll(self) -> list[bytes]:
        """The whole lines that came since the last call, without their ends; after a new beginning all of
        them. A line that is still being written is for the next time."""
        try:
            file = self.file.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return []
        with file:
            if not self._is_as_before(file.fileno()):
                self._inode, self._place, self._before = os.fstat(file.fileno()).st_ino, 0, b""
                self.beginnings += 1
            file.seek(self._place)
            fresh = file.read()
        whole = fresh.rfind(b"\n") + 1
        self.bytes_read += len(fresh)
        self._place += whole
        self._before = (self._before + fresh[:whole])[-REMEMBERED:]
        return fresh[:whole].split(b"\n")[:-1]

    def _is_as_before(self, descriptor: int) -> bool:
        if os.fstat(descriptor).st_ino != self._inode:
            return False
        size = len(self._before)
        return os.pread(descriptor, size, self._place - size) == self._before

    def skip_to_last(self, lines: int) -> None:
        """Let the next look begin with the last `lines` whole lines that are there now."""
        try:
            file = self.file.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            about = os.fstat(file.fileno())
            start, found, block = about.st_size, 0, b""
            while start and found <= lines:
                size = min(start, BLOCK)
                start -= size
                block = os.pread(file.fileno(), size, start)
                found += block.count(b"\n")
            place = 0
            for _ in range(found - lines):  # Those too many are in the block that was read last.
                place = block.index(b"\n", place) + 1
            self._inode, self._place, self._before = about.st_ino, start + place, b""
            self.beginnings += 1
