"""What a suite works with: encoders, clips on both sides of the split, their features and signals.

Knows no suite, and not where data sets or encoders come from: those are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from salt_vla.config import DataConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.signals import ClipSignals, Recordings
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import TOKENS, Pixels, Reading, TokenModel
from salt_vla.evaluation.probing import load_probe
from salt_vla.evaluation.results import PIXELS, WITHOUT_ENCODER
from salt_vla.evaluation.settings import PROTOCOLS as PROTOCOLS
from salt_vla.evaluation.settings import EvalSettings as EvalSettings
from salt_vla.geometry import ClipGeometry
from salt_vla.registry import RECORDINGS, SIGNALS, Table, resolve

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


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

    @property
    def episodes(self) -> Int64[np.ndarray, " clips"]:
        """Each clip's episode (or video): its number where the data set counts them, else (and in a mixture)
        one that is the same on both sides of the split. A double holds it, as sums on disk do."""
        rows = self.clips.rows
        numbers = np.array(rows["episode"].to_pylist(), np.int64)
        if len(self.clips.roots) == 1:
            return np.where(numbers < 2**53, numbers, numbers >> 10)
        keys = zip(rows["dataset"].to_pylist(), numbers.tolist(), strict=True)
        return np.array([xxhash.xxh3_64_intdigest(repr(key).encode()) >> 11 for key in keys], np.int64)


@dataclass(frozen=True)
class Bench:
    """One evaluation. `encoders` are those still to be scored, by the names that tables give them; `pixels`
    may be among them, `constant` is added by probes. `beside`: encoders whose features are extracted in the
    same pass over the clips, and which are scored another time. `notes`: sentences of suites on what they
    left out."""

    encoders: Mapping[str, TokenModel]
    train: Side
    test: Side
    data: DataConfig
    geometry: ClipGeometry
    settings: EvalSettings
    store: FeatureStore
    notes: list[str] = field(default_factory=list)
    beside: Mapping[str, TokenModel] = field(default_factory=dict)
    recorded: dict[object, Any] = field(default_factory=dict, repr=False)  # read once for all encoders

    def __post_init__(self) -> None:
        for name, model in self.encoders.items():
            if name.partition("+")[0] in WITHOUT_ENCODER or (
                name == PIXELS and not isinstance(model, Pixels)
            ):
                raise ConfigError(f"{name!r} is the name of a baseline; give the encoder another name")
            if model.geometry != self.geometry:
                raise ConfigError(f"encoder {name!r} takes clips of {model.geometry}, not {self.geometry}")

    @property
    def cameras(self) -> list[str]:
        """In the table's order; one empty name where the data set has none."""
        return list(dict.fromkeys(self.train.clips.rows["camera"].to_pylist()))

    @property
    def poolings(self) -> tuple[str, ...]:
        """What the chosen probe can read: vectors, or all tokens."""
        reads_tokens = load_probe(self.settings.probe).reads == "tokens"
        return (TOKENS,) if reads_tokens else self.settings.poolings

    def features(
        self, side: Side, readings: Sequence[Reading]
    ) -> dict[Reading, dict[str, Float[np.ndarray, " clips *dims"]]]:
        """Of every encoder, from the store; one pass over the clips for all that is missing."""
        found = self.store.features({**self.beside, **self.encoders}, side.views, readings)
        return {
            reading: {name: array for name, array in by_name.items() if name not in self.beside}
            for reading, by_name in found.items()
        }

    def signals(self, side: Side) -> ClipSignals:
        """What was recorded beside the clips. Raises `DataError` where nothing was."""
        key = ("signals", *side.clips.clip_ids)
        if key not in self.recorded:
            reader = resolve(SIGNALS, _source(side, SIGNALS))
            self.recorded[key] = reader(side.clips, self.geometry.num_frames, self.data.view)
        found: ClipSignals = self.recorded[key]
        return found

    def recordings(self, side: Side) -> Recordings:
        """What was recorded in the clips' whole episodes. Raises `DataError` where nothing was."""
        key = ("recordings", *side.clips.clip_ids)
        if key not in self.recorded:
            self.recorded[key] = resolve(RECORDINGS, _source(side, RECORDINGS))(side.clips)
        found: Recordings = self.recorded[key]
        return found


def _source(side: Side, table: Table) -> str:
    clips = side.clips
    sources = set(clips.rows["source"].to_pylist())
    if not sources <= table.keys() or len(clips.roots) != 1:
        raise DataError(
            f"{clips.name} ({', '.join(sorted(sources))}): probes read recorded signals, which need one "
            f"data set of: {', '.join(table)}"
        )
    return min(sources)


OpenViews = Callable[[ClipTable], ClipViews]


def short_name(camera: str) -> str:
    """`observation.images.front` → `front`."""
    return camera.rsplit(".", 1)[-1]
