"""Encodes the films of several episodes into one H.264 file whose frames lie at exact multiples of 1/fps.

Must not know data sets or their layout.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType

FRAMES_BETWEEN_KEY_FRAMES = 16


class EpisodeVideoFile:
    """An mp4 file that grows by whole episodes; each begins with a key frame, so a seek never crosses one.

    One encoder thread and no B-frames: the same frames give the same bytes, and decode order is time order.
    """

    def __init__(self, path: Path, fps: int, image_shape: tuple[int, int], crf: int) -> None:
        self._container = av.open(str(path), mode="w")
        # No macroblock tree: with it one small file in a hundred came out in other bytes. Finer chroma: a red
        # arm on grey shows its absence.
        options = {
            "crf": str(crf),
            "preset": "slow",
            "tune": "psnr",
            "x264-params": "chroma-qp-offset=-4:no-mbtree=1",
            "g": str(FRAMES_BETWEEN_KEY_FRAMES),
            "bf": "0",
            "sc_threshold": "0",
            "forced-idr": "1",
        }
        stream = self._container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = image_shape
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._fps = fps
        self._frames = 0
        self.encoded_bytes = 0

    def append(self, film: np.ndarray) -> tuple[float, float]:
        """Encode uint8 (frames, height, width, 3); returns its begin and end, in seconds of this file."""
        first = self._frames
        for number, image in enumerate(film):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = self._frames
            frame.time_base = Fraction(1, self._fps)
            frame.pict_type = PictureType.I if number == 0 else PictureType.NONE
            self._mux(frame)
            self._frames += 1
        return first / self._fps, self._frames / self._fps

    def close(self) -> None:
        self._mux(None)
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self.encoded_bytes += packet.size
            self._container.mux(packet)
