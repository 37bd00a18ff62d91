"""One video file, opened safely: refusals before anything large is allocated, pictures upright and in RGB.

Knows packets, pictures and clocks; which pictures anybody wants is `decode.py`'s business.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.logging import ERROR, Capture, get_level, set_level, set_skip_repeated
from av.video.reformatter import VideoReformatter

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from jaxtyping import UInt8

# What a file system that went away answers. EIO is not among them: FFmpeg says it of damaged files too.
AWAY = {errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE}
MAX_PIXELS = 8192 * 8192  # of a picture: twice an 8K film's; a header that claims more is damaged
TIME_LIMIT = 60.0  # seconds of decoding for one clip
NO_TIMESTAMPS = 0x0080  # AVFMT_NOTIMESTAMPS, FFmpeg's avformat.h: raw streams have no clock
# AVI's packets have no display times, an MPEG program stream's only some (ISO/IEC 13818-1, 2.7.4); those that
# FFmpeg makes up are out of order with B-frames, and begin anew after a seek.
COUNTED_FORMATS = {"avi", "mpeg"}
# Their index, or every packet, holds exact times, so that a seek lands where it says. Elsewhere the times
# after a seek may be made up, and a file is read from its start.
SEEKABLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
DISPLAY_ONE = 0x10000  # 1.0 in the fixed-point entries of a display matrix


class Deadline:
    """Seconds of work that are left; the time a consumer takes between two pictures is not counted."""

    def __init__(self, seconds: float = TIME_LIMIT) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + self.seconds

    def check(self, path: Path) -> None:
        if time.monotonic() > self._end:
            raise TooSlow(f"video {path} took longer than {self.seconds:g} s to decode one clip")

    def extend(self, seconds: float) -> None:
        self._end += seconds


class TooSlow(DataError):
    """Decoding was given up: trying the same file again would take as long."""


class OutOfReach(DataError):
    """The system does not give the file: it is missing, may not be read, or its disk is away. Of what is in
    it nothing is known."""


@dataclass(frozen=True)
class Video:
    """An open file: its first video stream, and the clock that its pictures are shown by.

    `start` is the time of the first picture in ticks of `tick` seconds; a `counted` file has no clock, so
    that its pictures are numbered in the order in which they come. `complaints` grows by what FFmpeg logs as
    errors of the file (`broken_structure`: of the container) while its packets are read and decoded: much
    damage is skipped or patched up from older pictures without any other sign.
    """

    path: Path
    container: InputContainer
    stream: VideoStream
    tick: Fraction
    start: int
    counted: bool
    deadline: Deadline
    complaints: list[str] = field(default_factory=list)
    broken_structure: list[str] = field(default_factory=list)

    @property
    def is_seekable(self) -> bool:
        return not self.counted and self.container.format.name in SEEKABLE_FORMATS

    def packets(self) -> Iterator[Packet[Any]]:
        packets = self.container.demux(self.stream)
        while True:
            # Around each call: a reader that is waited for in between would hear what others cause.
            with Capture() as logged:
                packet = next(packets, None)
            if logged:
                self._heed(logged)
            if packet is None:
                return
            yield packet

    def decode(self, packet: Packet[Any]) -> list[VideoFrame]:
        with Capture() as logged:
            frames = packet.decode()
        if logged:
            self._heed(logged)
        return frames

    def seek(self, timestamp: int) -> None:
        with Capture() as logged:
            self.container.seek(timestamp, stream=self.stream)
        self._heed(logged)

    def _heed(self, logged: list[tuple[int, str, str]]) -> None:
        codec = self.stream.codec_context
        for level, speaker, text in logged:
            is_container = speaker == self.container.format.name
            # Other speakers are sound tracks, say, which nobody listens to.
            if level <= ERROR and (is_container or speaker in (codec.name, codec.codec.name)):
                (self.broken_structure if is_container else self.complaints).append(text.strip().rstrip("."))

    def seconds(self, timestamp: int) -> float:
        """Since the first picture; the division of integers is exact to the last bit."""
        return (timestamp - self.start) * self.tick.numerator / self.tick.denominator


@contextmanager
def open_video(path: Path, deadline: Deadline | None = None) -> Iterator[Video]:
    """The file, ready to be read with one thread. Whatever goes wrong within becomes a `DataError`."""
    refuse_unreadable(path)
    _hear_errors()
    # The limit reaches the decoder that looks at the first pictures too, before they have room.
    limits = {"max_pixels": str(MAX_PIXELS)}
    patience = (TIME_LIMIT, TIME_LIMIT)
    try:
        with av.open(str(path), metadata_errors="ignore", options=limits, timeout=patience) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None or not stream.time_base:
                raise DataError(f"video {path} cannot be decoded: its header is damaged, or no decoder fits")
            refuse_absurd_size(path, context.height, context.width)
            context.options = limits
            stream.thread_type = "NONE"
            context.thread_count = 1
            form = container.format
            counted = bool(form.flags & NO_TIMESTAMPS) or form.name in COUNTED_FORMATS
            yield Video(
                path,
                container,
                stream,
                stream.time_base,
                stream.start_time or 0,
                counted,
                deadline or Deadline(),
            )
    except (av.FFmpegError, EOFError) as error:
        if getattr(error, "errno", None) in AWAY:
            raise OutOfReach(f"video {path} cannot be reached: {_why(error)}") from error
        raise DataError(f"video {path} cannot be decoded: {_why(error)}") from error
    except MemoryError as error:
        raise DataError(f"video {path} cannot be decoded: it asks for more memory than there is") from error


def _hear_errors() -> None:
    """Let PyAV pass FFmpeg's errors on, all of them; who wants to see them asks the logger "libav"."""
    level = get_level()
    if level is None or level < ERROR:
        set_level(ERROR)
        logging.getLogger("libav").addHandler(logging.NullHandler())
    set_skip_repeated(False)  # else one file's error would hide the same one of the next


def is_shown(packet: Packet[Any], video: Video) -> bool:
    """Whether a packet's picture is meant to be seen: not cut off by an edit list, nor one that others are
    only predicted from (VP8's hidden frames come in packets of their own; RFC 6386, 9.1)."""
    if packet.is_discard:
        return False
    is_vp8 = video.stream.codec_context.name in ("vp8", "libvpx")
    return not is_vp8 or not packet.size or bool(bytes(packet)[0] >> 4 & 1)


def _why(error: av.FFmpegError | EOFError) -> str:
    if isinstance(error, av.error.ExitError):
        return f"reading took longer than {TIME_LIMIT:g} s"
    if isinstance(error, av.error.ArgumentError):
        return "its header claims a size or setting that no film has"
    return getattr(error, "strerror", None) or str(error)


def refuse_unreadable(path: Path) -> None:
    """A sentence for what is no regular file, or may not be read; opening a pipe would wait for ever."""
    try:
        info = path.stat()
        readable = os.access(path, os.R_OK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OutOfReach(f"video {path} is missing; restore it or index the data set again") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutOfReach(f"video {path} cannot be reached: {reason}") from error
    if stat.S_ISDIR(info.st_mode):
        raise DataError(f"video {path} is a folder, not a file; index the data set again")
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"video {path} is no regular file (a pipe, socket or device); replace it")
    if not readable:
        raise OutOfReach(f"video {path} may not be read by this user; change its permissions")
    if not info.st_size:
        raise DataError(f"video {path} is empty (0 bytes); restore it")


def refuse_absurd_size(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(
            f"video {path} says that its pictures are {width} × {height}, more than {MAX_PIXELS} pixels; "
            "its header is damaged"
        )


class Rgb:
    """Pictures to RGB as they are meant to be shown. One instance a file: making the converter costs more
    than a conversion.

    swscale converts with the file's own colour matrix and range (BT.601, limited range, where it names none),
    takes chroma from the nearest sample, and drops alpha: colours stay as stored, over no background.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._converter = VideoReformatter()
        # By the rotation: a frame's side data is looked at rarely, since it then lives until Python's cyclic
        # garbage collection.
        self._orientations: dict[int, tuple[int, bool]] = {}

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
        refuse_absurd_size(self.path, frame.height, frame.width)
        try:
            rgb = self._converter.reformat(frame, format="rgb24", threads=1)
        except ValueError as error:
            raise DataError(f"video {self.path} cannot be shown in RGB: {error}") from error
        (plane,) = rgb.planes
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        image = rows[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = orientation(frame, self.path)
        return turned(image, *self._orientations[frame.rotation])


def orientation(frame: VideoFrame, path: Path) -> tuple[int, bool]:
    """(quarter turns counter-clockwise, mirrored left-right before turning) from the display matrix.

    The matrix maps stored (x, y) to shown (a·x + c·y, b·x + d·y) with y downwards: ISO/IEC 14496-12, 6.2.2.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    entries = np.frombuffer(memoryview(matrix), np.int32)
    a, b, c, d = (round(int(entries[at]) / DISPLAY_ONE) for at in (0, 1, 3, 4))
    exact = {abs(int(entries[at])) for at in (0, 1, 3, 4)} == {0, DISPLAY_ONE}
    turns = {(1, 0): 0, (0, -1): 1, (-1, 0): 2, (0, 1): 3}  # where the second axis is not mirrored
    mirrored = a * d - b * c < 0
    right = (-a, -b) if mirrored else (a, b)
    if not exact or abs(a * d - b * c) != 1 or right not in turns:
        raise DataError(f"video {path} is turned by no multiple of 90°; write it anew, upright")
    return turns[right], mirrored


def turned(image: np.ndarray, quarters: int, mirrored: bool) -> np.ndarray:
    if not quarters and not mirrored:
        return image
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if mirrored else image, quarters))
