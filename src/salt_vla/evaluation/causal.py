"""Causal windows: clips that end at chosen moments of an episode, and a reader that cannot reach past them.

Knows clip tables and films; neither what was recorded at those moments nor who encodes the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.sampling import frame_offsets
from salt_vla.data.view_lock import ViewReader, view_hash
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Side
from salt_vla.evaluation.feature_store import ClipViews
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import Int64

# An episode's number of frames → the moments asked about, in frames from its first.
Moments = Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class Windows:
    """One side's windows, a clip each. `moments`: the frame each ends at, counted from its episode's first;
    `lengths`: frames of that episode."""

    side: Side
    moments: Int64[np.ndarray, " windows"]
    lengths: Int64[np.ndarray, " windows"]
    episodes: Int64[np.ndarray, " windows"]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.moments)


class CausalReader(ViewReader):
    """Pixels of windows. `last`: of every clip the last frame of its file that may be shown.

    Frames are counted back from that one, so that no setting of the view can ask for a later one; what would
    lie before the episode's first frame is that frame again, as a robot sees it that has just begun.
    """

    def __init__(
        self, table: ClipTable, config: ViewConfig, geometry: ClipGeometry, last: dict[str, int]
    ) -> None:
        super().__init__(table, config, geometry)
        self.last = last

    def frames_of(self, clip: Clip, view: int) -> tuple[int, ...]:
        if view:
            raise DataError("causal windows have one view, 0: others are shifted in time")
        back = frames_back(self.config, self.geometry.num_frames, clip.fps)
        return tuple(max(self.last[clip.clip_id] - steps, clip.episode_first_frame) for steps in back)


def frames_back(view: ViewConfig, num_frames: int, fps: float) -> tuple[int, ...]:
    """How many file frames before its last one each frame of a clip lies: not negative, 0 for the last."""
    if view.sampling == "uniform":
        raise DataError(
            "data.view.sampling 'uniform' spreads a clip over the whole video, so no moment of it can be "
            "asked about without seeing what follows; use stride or fps"
        )
    offsets = frame_offsets(view, num_frames, fps, 0)
    return tuple(offsets[-1] - offset for offset in offsets)


def every(stride: int, ahead: int = 0) -> Moments:
    """Every `stride` frames, the last of each stretch of as many (of a shorter episode its last), and `ahead`
    frames after each of these where the episode has them."""

    def moments(frames: int) -> list[int]:
        chosen = range(stride - 1, frames, stride) or range(frames - 1, frames)
        return sorted({moment + step for moment in chosen for step in (0, ahead) if moment + step < frames})

    return moments


def open_windows(side: Side, view: ViewConfig, geometry: ClipGeometry, moments: Moments) -> Windows | None:
    """The windows of a side's episodes, as each camera filmed them; None where no moment is left."""
    clips, ends = [], []
    for episode in _episodes(side.clips):
        span = frames_back(view, geometry.num_frames, episode.fps)[0]
        for moment in moments(episode.episode_frames):
            first = episode.episode_first_frame + moment - span
            name = f"{episode.dataset}/{episode.episode:06d}/{episode.camera}/until-{moment:06d}"
            clips.append(replace(episode, clip_id=name, first_frame=first))
            ends.append(moment)
    if not clips:
        return None
    table = ClipTable.from_clips(clips, side.clips.root)
    last = {clip.clip_id: clip.episode_first_frame + end for clip, end in zip(clips, ends, strict=True)}
    reader = CausalReader(table, view, geometry, last)
    pixels = f"causal-1 {table.hash} {table.files_hash} {view_hash(view, geometry)}"
    return Windows(
        Side(table, ClipViews(table.clip_ids, reader, pixels, " of causal windows")),
        np.array(ends, np.int64),
        np.array([clip.episode_frames for clip in clips], np.int64),
        np.array([clip.episode for clip in clips], np.int64),
        tuple(clip.label for clip in clips),
    )


def _episodes(table: ClipTable) -> Iterator[Clip]:
    """One clip of each episode and camera, in the table's order."""
    seen = set()
    for clip in table.clips():
        key = (clip.dataset, clip.episode, clip.camera)
        if key not in seen:
            seen.add(key)
            yield clip
