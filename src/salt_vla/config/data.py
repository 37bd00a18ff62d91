"""Settings of what is learned from: views of clips, the data, and the targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from salt_vla.config.checks import ADDED_LATER, FREE, require, require_at_least, require_choices


@dataclass(frozen=True)
class ViewConfig:
    """What decides a clip's pixels besides its table row. View 0 is the canonical one (whole frame, no
    shift); views 1, 2, … are random resized crops and time shifts drawn from (clip id, view number).

    `sampling` says which frames are a clip's: every `frame_stride`-th frame of the file (`stride`), the
    frames nearest to `target_fps` pictures a second (`fps`), or frames spread evenly over the whole video
    or episode (`uniform`). A video shorter than a clip is left out (`short` = `skip`) or its last frame is
    held (`hold`). `crop_scale` is the range of the crop's share of the area; `max_shift` the largest time
    shift in file frames, cut to what the episode has.
    """

    frame_stride: int = 4
    num_views: int = 1
    crop_scale: tuple[float, float] = (1.0, 1.0)
    max_shift: int = 0
    sampling: Literal["stride", "fps", "uniform"] = field(default="stride", metadata=ADDED_LATER)
    target_fps: float = field(default=0.0, metadata=ADDED_LATER)
    short: Literal["skip", "hold"] = field(default="skip", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_choices(self, "data.view")
        require_at_least(1, self, "data.view.", "frame_stride", "num_views")
        require_at_least(0, self, "data.view.", "target_fps")
        require(
            self.sampling != "fps" or 0 < self.target_fps < math.inf,
            f"data.view.sampling 'fps' needs data.view.target_fps above 0, not {self.target_fps}",
        )
        require_at_least(0, self, "data.view.", "max_shift")
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"data.view.crop_scale must be (low, high) within (0, 1], not {self.crop_scale}",
        )


@dataclass(frozen=True)
class PhotometricConfig:
    """Changes of colour and light of the student's pixels alone, one draw a clip; targets never see them.

    Each is the largest relative change: brightness 0.2 scales by a factor drawn from 0.8 … 1.2. 0: none.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value < 1, f"data.photometric.{name} must lie in [0, 1), not {value}")

    def __bool__(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation)


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from. `table` is a clip table (Parquet); `store_views` keeps decoded views on disk,
    so that small data sets are decoded once and not at every step. `on_corrupt_record`: another clip of the
    batch takes the place of a damaged record, which is counted (`skip`), or the run ends there (`stop`).
    `num_workers` loader processes have up to `prefetch` batches each in hand (0 workers: none); `masks_in`
    says whether they draw the masks (`loader`) or the training process does (`step`): the same masks.
    """

    table: str = ""
    view: ViewConfig = field(default_factory=ViewConfig)
    store_views: bool = False
    num_workers: int = field(default=0, metadata=FREE)
    on_corrupt_record: Literal["skip", "stop"] = field(default="skip", metadata=ADDED_LATER)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig, metadata=ADDED_LATER)
    prefetch: int = field(default=2, metadata=ADDED_LATER | FREE)
    masks_in: Literal["loader", "step"] = field(default="loader", metadata=ADDED_LATER | FREE)

    def __post_init__(self) -> None:
        require_choices(self, "data")
        require_at_least(0, self, "data.", "num_workers")
        require_at_least(1, self, "data.", "prefetch")


@dataclass(frozen=True)
class TargetConfig:
    """What the predictor must produce: `pixels` of the masked tubelets (stage 1), latents from a `cache`
    (SALT), latents from a frozen `teacher` run in the loop, or those of the student's own moving average
    (`ema`: V-JEPA). `source` is the cache or teacher path. `momentum` (first and last step, linear between)
    is the share of itself that the moving average keeps at each step.
    """

    provider: Literal["pixels", "cache", "teacher", "ema"] = "cache"
    source: str = ""
    momentum: tuple[float, float] = field(default=(0.99925, 0.99925), metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_choices(self, "target")
        for value in self.momentum:
            require(0 <= value <= 1, f"target.momentum must lie in [0, 1], not {self.momentum}")
