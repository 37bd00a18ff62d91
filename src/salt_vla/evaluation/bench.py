"""What a suite works with: encoders, clips on both sides of the split, their features and signals.

Knows no suite, and not where data sets or encoders come from: those are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salt_vla.config import DataConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.signals import ClipSignals
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import POOLINGS, Pixels, Reading, TokenModel
from salt_vla.evaluation.results import CONSTANT, PIXELS
from salt_vla.geometry import ClipGeometry
from salt_vla.registry import SIGNALS, resolve

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

PROTOCOLS = ("held-out", "vjepa2-max")


@dataclass(frozen=True)
class EvalSettings:
    """What a person chooses of an evaluation besides encoders, suites and data.

    `protocol`: `held-out` chooses everything within training clips and reads held-out clips once;
    `vjepa2-max` is the reference's, which reports its best head on the very clips that are scored.
    `fraction`: of the training episodes that probes learn from. `horizon`: file frames after a clip's end
    that robot suites predict.
    """

    seed: int = 0
    probe: str = "linear"
    protocol: str = "held-out"
    poolings: tuple[str, ...] = POOLINGS
    fraction: float = 1.0
    horizon: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0 … {2**32 - 1}, not {self.seed}")
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}; known: {', '.join(PROTOCOLS)}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction of training episodes must lie in (0, 1], not {self.fraction}")
        if self.horizon < 1:
            raise ConfigError(f"horizon must be 1 frame or more, not {self.horizon}")


@dataclass(frozen=True)
class Side:
    """The clips of one side of the split, those that can be read, and their views."""

    clips: ClipTable
    views: ClipViews

    def only(self, clip_ids: Sequence[str]) -> Side:
        """These clips of it, in its order."""
        clips = self.clips.only(clip_ids)
        return Side(clips, replace(self.views, clip_ids=clips.clip_ids))

    def of_camera(self, camera: str) -> Side:
        return self.only(self.clips.select(camera=camera).clip_ids)


@dataclass(frozen=True)
class Bench:
    """One evaluation. `encoders` are those still to be scored, by the names that tables give them; `pixels`
    is among them, `constant` is added by probes."""

    encoders: Mapping[str, TokenModel]
    train: Side
    test: Side
    data: DataConfig
    geometry: ClipGeometry
    settings: EvalSettings
    store: FeatureStore

    def __post_init__(self) -> None:
        for name, model in self.encoders.items():
            if name == CONSTANT or (name == PIXELS and not isinstance(model, Pixels)):
                raise ConfigError(f"{name!r} is the name of a baseline; give the encoder another name")
            if model.geometry != self.geometry:
                raise ConfigError(f"encoder {name!r} takes clips of {model.geometry}, not {self.geometry}")

    @property
    def cameras(self) -> list[str]:
        """In the table's order; one empty name where the data set has none."""
        return list(dict.fromkeys(self.train.clips.rows["camera"].to_pylist()))

    def features(
        self, side: Side, readings: Sequence[Reading]
    ) -> dict[Reading, dict[str, Float[np.ndarray, " clips *dims"]]]:
        """Of every encoder, from the store; one pass over the clips for all that is missing."""
        return self.store.features(self.encoders, side.views, readings)

    def signals(self, side: Side) -> ClipSignals:
        """What was recorded beside the clips. Raises `DataError` where nothing was."""
        clips = side.clips
        sources = set(clips.rows["source"].to_pylist())
        if not sources <= SIGNALS.keys() or len(clips.roots) != 1:
            raise DataError(
                f"{clips.name} ({', '.join(sorted(sources))}): probes read recorded signals, which need one "
                f"data set of: {', '.join(SIGNALS)}"
            )
        found: ClipSignals = resolve(SIGNALS, min(sources))(clips, self.geometry.num_frames, self.data.view)
        return found


OpenViews = Callable[[ClipTable], ClipViews]


def short_name(camera: str) -> str:
    """`observation.images.front` → `front`."""
    return camera.rsplit(".", 1)[-1]
