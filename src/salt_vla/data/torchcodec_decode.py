"""Frames through torchcodec, where it gives PyAV's to the last bit; knows nothing of views.

It is asked for the picture at the middle of a slot, and the time of its answer is checked. What it cannot
give so, and whatever FFmpeg complains of meanwhile, is left to PyAV (`decode.py`), which has the last word.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salt_vla.data.golden import GOLDEN_CLIPS, golden_path
from salt_vla.data.video_file import MAX_PIXELS, Deadline, refuse_unreadable
from salt_vla.errors import ConfigError
from salt_vla.rundir import DECODER, wanted_decoder

if TYPE_CHECKING:
    from jaxtyping import UInt8

CHOICES = ("auto", "pyav", "torchcodec")
AT_ONCE = 8  # pictures that torchcodec decodes in one call, all in memory together
# For others, for odd sizes and for turned pictures its conversion to RGB differs from PyAV's.
PIXEL_FORMATS = {"yuv420p", "yuvj420p"}
# Codec → its golden clip, and the byte whose change PyAV's decoder notices (VP9's notices next to none).
EXAMINED: dict[str, tuple[str, int | None]] = {
    "vp9": ("vp9.webm", None),
    "h264": ("h264.mp4", 1650),
    "av1": ("av1.mp4", 3004),
}
LOG_ERROR = 16  # AV_LOG_ERROR, FFmpeg's log.h: what is as bad or worse has a smaller number

ReadFrames = Callable[[Path, Sequence[int], float], np.ndarray]


class NotForTorchcodec(Exception):
    """These frames have to be read through PyAV."""


class _Complaints:
    """Counts what torchcodec's FFmpeg logs as errors. torchcodec gives pictures that were patched up from
    older ones without a word; the log is the only place that tells."""

    def __init__(self) -> None:
        self.count = 0
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._callback = callback(self._hear)  # kept: FFmpeg holds no reference to it
        self.is_listening = False
        for library in _loaded("libavutil"):
            ctypes.CDLL(library).av_log_set_callback(self._callback)
            self.is_listening = True

    def _hear(self, source: int, level: int, text: bytes, arguments: int) -> None:
        self.count += 0 <= level <= LOG_ERROR


def _loaded(name: str) -> set[str]:
    """Files of a shared library in this process, but for those that PyAV brought along."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return {path for path in paths if Path(path).name.startswith(name) and "av.libs" not in path}


@lru_cache(maxsize=1)
def _complaints() -> _Complaints:
    return _Complaints()


def trusted_codecs(read_through_pyav: ReadFrames) -> frozenset[str]:
    """Codecs that this process reads through torchcodec: the decoder wanted, or `auto` (the default), which
    means wherever it passes its examination. Raises `ConfigError` for another choice, or where torchcodec is
    chosen and passes none."""
    choice = wanted_decoder()
    if choice not in CHOICES:
        raise ConfigError(f"{DECODER} is {choice!r}; choose one of {', '.join(CHOICES)}")
    if choice == "pyav":
        return frozenset()
    codecs, trouble = examine(read_through_pyav)
    if trouble and choice == "torchcodec":
        raise ConfigError(f"{DECODER} is torchcodec, but {trouble}; unset it to read through PyAV")
    return codecs


@lru_cache(maxsize=1)
def examine(read_through_pyav: ReadFrames) -> tuple[frozenset[str], str]:
    """(codecs whose golden clip torchcodec reads as PyAV does, and whose damage it notices; or why none)."""
    if importlib.util.find_spec("torchcodec") is None:
        return frozenset(), "it is not installed (pip install 'salt-vla[fast-decode]')"
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return frozenset(), f"it does not load (it needs FFmpeg's libraries): {reason}"
    if not _complaints().is_listening:
        return frozenset(), "FFmpeg's log cannot be heard on this system, so damage would go unnoticed"
    passed = frozenset(codec for codec in EXAMINED if _passes(codec, read_through_pyav))
    return passed, "" if passed else "its frames of the golden clips are not PyAV's"


def _passes(codec: str, read_through_pyav: ReadFrames) -> bool:
    name, damaged_at = EXAMINED[codec]
    path, fps, only = golden_path(name), GOLDEN_CLIPS[name], frozenset([codec])
    try:
        pictures = dict(_pictures(path, range(24), fps, only, None))
    except NotForTorchcodec:
        return False
    expected = read_through_pyav(path, range(24), fps)
    if not np.array_equal(np.stack([pictures[number] for number in range(24)]), expected):
        return False
    if damaged_at is None:
        return True
    content = bytearray(path.read_bytes())
    content[damaged_at] ^= 0x10
    try:
        list(_pictures(bytes(content), range(24), fps, only, None))
    except NotForTorchcodec:
        return True
    return False


def stream(
    path: Path, numbers: Sequence[int], fps: float, codecs: frozenset[str], deadline: Deadline | None = None
) -> Iterator[tuple[int, UInt8[np.ndarray, "height width 3"]]]:
    """(number, picture) of the wanted frames of a constant-rate file, ascending. Raises `NotForTorchcodec` at
    the first that it cannot vouch for, and `DataError` for what is no readable file."""
    refuse_unreadable(path)
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] != b"\x1a\x45\xdf\xa3" and head[4:8] != b"ftyp":  # Matroska and WebM; MP4
        raise NotForTorchcodec("a container whose times after a seek may be made up, or that has none")
    yield from _pictures(path, numbers, fps, codecs, deadline)


def _pictures(
    source: Path | bytes,
    numbers: Sequence[int],
    fps: float,
    codecs: frozenset[str],
    deadline: Deadline | None,
) -> Iterator[tuple[int, np.ndarray]]:
    try:
        before = _complaints().count
        decoder = _open(source, codecs)
        for begin in range(0, len(numbers), AT_ONCE):
            if deadline is not None and isinstance(source, Path):
                deadline.check(source)
            some = numbers[begin : begin + AT_ONCE]
            batch = decoder.get_frames_played_at([(number + 0.5) / fps for number in some])
            if _complaints().count != before:
                raise NotForTorchcodec("FFmpeg complains")
            times = batch.pts_seconds.tolist()
            for number, time, picture in zip(some, times, batch.data.numpy(), strict=True):
                if math.floor(time * fps + 0.5) != number:
                    raise NotForTorchcodec(f"at frame {number} the picture of {time} s is shown")
                yield number, picture
    except (RuntimeError, ValueError, IndexError) as error:
        raise NotForTorchcodec(str(error)) from error


def _open(source: Path | bytes, codecs: frozenset[str]) -> Any:
    """A decoder of one thread, if the file is of a kind for which both decoders agree."""
    from torchcodec.decoders import VideoDecoder

    # "exact" would read through the whole file first.
    decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    said = decoder.metadata
    height, width = said.height or 0, said.width or 0
    if (
        said.codec not in codecs
        or said.pixel_format not in PIXEL_FORMATS
        or said.rotation is not None
        or said.begin_stream_seconds_from_header  # FFmpeg's versions differ in what they take for the start
        or height % 2
        or width % 2
        or height * width > MAX_PIXELS
    ):
        raise NotForTorchcodec("a file of a kind that PyAV reads")
    return decoder
