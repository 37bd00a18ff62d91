"""Which frames of a video make a clip: the arithmetic of strides, frame rates and short videos.

Knows numbers of frames only; opens no file and draws nothing at random.
"""

from __future__ import annotations

import math

from salt_vla.config import ViewConfig


def frame_offsets(view: ViewConfig, num_frames: int, fps: float, available: int) -> tuple[int, ...]:
    """File frames of a clip's `num_frames` frames, counted from the clip's first frame.

    `fps` is the file's rate; `available` the frames of the whole video or episode, which only `uniform`
    looks at: it takes the middle of each of `num_frames` equal parts. `fps` sampling takes the nearest file
    frame (halves go up), so a file slower than `target_fps` repeats frames.
    """
    steps = range(num_frames)
    if view.sampling == "uniform":
        return tuple((2 * i + 1) * available // (2 * num_frames) for i in steps)
    if view.sampling == "fps":
        return tuple(math.floor(i * fps / view.target_fps + 0.5) for i in steps)
    return tuple(i * view.frame_stride for i in steps)


def clip_span(view: ViewConfig, num_frames: int, fps: float, available: int) -> int:
    """File frames that a clip needs from its first frame on; a whole video for `uniform`."""
    if view.sampling == "uniform":
        return available
    return frame_offsets(view, num_frames, fps, available)[-1] + 1


def sampled_frames(
    view: ViewConfig, num_frames: int, fps: float, available: int, start: int, shift: int = 0
) -> tuple[int, ...]:
    """Frames of a clip that begins at frame `start` of its episode, counted from the episode's first.

    `shift` moves it in time as far as the episode lets it. Frames beyond the last (a short video whose last
    frame is held) are the last.
    """
    offsets = frame_offsets(view, num_frames, fps, available)
    first, last = start + offsets[0], start + offsets[-1]
    moved = max(min(shift, available - 1 - last), -first) if last < available else 0
    return tuple(min(start + offset + moved, available - 1) for offset in offsets)
