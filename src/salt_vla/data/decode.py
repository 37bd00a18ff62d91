"""Frames of a video file by number. The one place that opens video; knows neither clips nor views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import UInt8

DECODER_FAMILY = "pyav"


def read_frames(
    path: Path, indices: Sequence[int], fps: float
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Frames number `indices` (any order, repeats allowed) of a constant-rate file, as RGB.

    Seeks to the key frame before the first and decodes forward once. Frame n is the one shown at n ÷ fps
    seconds. Raises `DataError` naming the file for anything that cannot be read.
    """
    if not path.is_file():
        raise DataError(f"video {path} is missing; restore it or index the data set again")
    if not indices:
        raise DataError(f"video {path}: no frames were asked for")
    try:
        found = _decode_range(path, min(indices), max(indices), fps, set(indices))
    except (av.FFmpegError, EOFError) as error:
        raise DataError(f"video {path} cannot be decoded: {error}") from error
    missing = sorted(set(indices) - found.keys())
    if missing:
        raise DataError(f"video {path} ends before frame {missing[0]}: it is truncated or the index is of another file")
    return np.stack([found[index] for index in indices])


def _decode_range(path: Path, first: int, last: int, fps: float, wanted: set[int]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path} holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        base = stream.time_base
        if base is None:
            raise DataError(f"video {path} states no time base")
        container.seek(max(int(first / fps / base), 0), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DataError(f"video {path} has frames without timestamps")
            number = round(float(frame.pts * base) * fps)
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= last:
                break
    return found
