"""What was recorded beside the video: actions, states and tasks of clips, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64


@dataclass(frozen=True)
class ClipSignals:
    """Signals of clips, one row for every *file* frame from a clip's first to its last frame.

    `span` = (num_frames − 1) · stride + 1; `fps` is the file's frame rate; `episodes` are unique over the
    data set.
    """

    clip_ids: tuple[str, ...]
    episodes: Int64[np.ndarray, " clips"]
    tasks: tuple[str, ...]
    fps: float
    signals: dict[str, Float32[np.ndarray, "clips span dims"]]


@dataclass(frozen=True)
class Recordings:
    """Signals of whole episodes: name → episode → one row for every file frame. Truth values are 0 and 1.

    `columns` names a signal's numbers where the data set does; `fps` is the file's frame rate.
    """

    fps: float
    columns: dict[str, tuple[str, ...]]
    signals: dict[str, dict[int, Float32[np.ndarray, "frames dims"]]]
