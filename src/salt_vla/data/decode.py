"""Frames of a video file by number. The one place that opens video; knows neither clips nor views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from fractions import Fraction

    from av.container import InputContainer
    from av.video.stream import VideoStream
    from jaxtyping import UInt8

DECODER_FAMILY = "pyav"


def read_frames(path: Path, indices: Sequence[int], fps: float) -> UInt8[np.ndarray, "frames height width 3"]:
    """Frames number `indices` (any order, repeats allowed) of a constant-rate file, as RGB.

    Seeks to the key frame before the first and decodes forward once. Frame n is the one shown at n ÷ fps
    seconds. Raises `DataError` naming the file for anything that cannot be read.
    """
    if not indices:
        raise DataError(f"video {path}: no frames were asked for")
    wanted = set(indices)
    if min(wanted) < 0:
        raise DataError(f"video {path} has no frame {min(wanted)}: frames are numbered from 0")
    found = _decode(path, wanted, fps, from_start=False)
    if len(found) < len(wanted):
        # Some files cannot be entered in the middle: their seek lands too late, or on half a picture.
        found = _decode(path, wanted, fps, from_start=True)
    missing = sorted(wanted - found.keys())
    if missing:
        raise DataError(
            f"video {path} ends before frame {missing[0]}: it is truncated or the index is of another file"
        )
    return np.stack([found[index] for index in indices])


def frame_shape(path: Path) -> tuple[int, int]:
    """(height, width) as the file's header states it."""
    with _video(path) as (_, stream, _):
        return stream.codec_context.height, stream.codec_context.width


@contextmanager
def _video(path: Path) -> Iterator[tuple[InputContainer, VideoStream, Fraction]]:
    """The open file, its first video stream and the seconds a tick of its clock lasts.

    Whatever goes wrong within becomes a `DataError`.
    """
    if not path.is_file():
        raise DataError(f"video {path} is missing; restore it or index the data set again")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None or not stream.time_base:
                raise DataError(f"video {path} cannot be decoded: its header is damaged")
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream, stream.time_base
    except (av.FFmpegError, EOFError) as error:
        raise DataError(f"video {path} cannot be decoded: {error}") from error


def _decode(path: Path, wanted: set[int], fps: float, from_start: bool) -> dict[int, np.ndarray]:
    """The wanted frames that were met; a damaged one is passed over, or, from the start, an error."""
    found: dict[int, np.ndarray] = {}
    last = max(wanted)
    to_rgb = VideoReformatter()  # Shared: a converter for every frame costs more than its conversion.
    with _video(path) as (container, stream, tick):
        if not from_start:
            container.seek(round(min(wanted) / fps / tick), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DataError(f"video {path} has frames without timestamps")
            number = round(float(frame.pts * tick) * fps)
            if number in wanted and number not in found:
                if not frame.is_corrupt:
                    found[number] = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                elif from_start:
                    raise DataError(f"video {path} is damaged at frame {number}; restore the file")
            if number >= last:
                break
    return found
