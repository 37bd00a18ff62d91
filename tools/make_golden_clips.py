"""Writes the golden clips (src/salt_vla/assets/golden): 24 small frames in each codec that data sets come in.

Their decoded pixels are part of every view hash, so new files under these names would refuse every cache:
encoders differ from version to version, so this is run once for a clip, and its output is committed.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES, HEIGHT, WIDTH = 24, 54, 96
CLIPS = {
    "vp9.webm": ("libvpx-vp9", 12, "yuv420p", {"g": "12", "crf": "32", "b": "0", "row-mt": "0"}),
    "h264.mp4": ("libx264", 30, "yuv420p", {"g": "12", "bf": "2", "crf": "26"}),
    "av1.mp4": ("libsvtav1", 30, "yuv420p", {"g": "12", "crf": "40", "preset": "8", "svtav1-params": "lp=1"}),
    "h264_10bit.mp4": ("libx264", 30, "yuv420p10le", {"g": "12", "bf": "2", "crf": "26"}),
}


def film() -> np.ndarray:
    """uint8 (24, 54, 96, 3): a coloured drift, a hard edge and a bright disc, all moving."""
    t, y, x = np.mgrid[:FRAMES, :HEIGHT, :WIDTH].astype(np.float64)
    channels = [
        128 + 90 * np.sin(x / 11 + t / 3),
        128 + 90 * np.cos(y / 9 - t / 4),
        128 + 90 * np.sin((x + y) / 17 + t / 5),
    ]
    frames = np.stack(channels, axis=-1)
    frames[(x + 2 * t) % 48 < 10] = (230, 40, 30)
    frames[(x - 20 - 2 * t) ** 2 + (y - 27) ** 2 < 120] = (245, 250, 235)
    return frames.astype(np.uint8)


def write(path: Path, codec: str, rate: int, pixels: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        stream.codec_context.thread_count = 1
        for number, image in enumerate(film()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, rate, pixels, options) in CLIPS.items():
        write(folder / name, codec, rate, pixels, options)


if __name__ == "__main__":
    main()
