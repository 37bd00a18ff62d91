"""The golden clips: 24 small frames a codec, which say whether a decoder's pixels are the ones on record.

Knows where they lie, nothing of views; `tools/make_golden_clips.py` made them.
"""

from __future__ import annotations

from pathlib import Path

# File → frames a second. Never replace a file: every view hash holds its pixels.
GOLDEN_CLIPS = {"vp9.webm": 12.0, "h264.mp4": 30.0, "av1.mp4": 30.0, "h264_10bit.mp4": 30.0}
GOLDEN_FRAMES = (0, 7, 23)  # of 24: a key frame, one between, the last


def golden_path(name: str) -> Path:
    return Path(__file__).parents[1] / "assets" / "golden" / name
