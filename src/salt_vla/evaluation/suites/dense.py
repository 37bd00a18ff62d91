"""The suite `dense`: where hand and objects are at each time step, read from that step's own tokens.

Knows which part of a feature belongs to which step; neither films nor how a probe is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.data.sampling import frame_offsets
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.features import TOKENS, Reading
from salt_vla.evaluation.probing import ProbeSet, probe_suite
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.targets import STATE, WORLD

if TYPE_CHECKING:
    from jaxtyping import Float

    from salt_vla.data.signals import ClipSignals

# Name → signal, its width, and the columns x, y, z.
READS: tuple[str, ...] = ()
PLACES = {
    "hand": (STATE, 4, (0, 1, 2)),
    "object": (WORLD, 9, (0, 1, 2)),
    "second_object": (WORLD, 9, (3, 4, 5)),
    "goal": (WORLD, 9, (6, 7, 8)),
}
BY_STEP = ("grid", "step")


def score(bench: Bench) -> list[Scored]:
    """R² of each position (metres), every time step of every held-out clip an item; a suite
    `dense/<camera>/<pooling>` each, of the poolings that keep time. Not causal: every token of an encoder
    that attends to the whole clip has seen later frames.
    """
    settings = bench.settings
    poolings = [pooling for pooling in bench.poolings if pooling in (*BY_STEP, TOKENS)]
    if not poolings:
        raise DataError(
            f"dense reads each time step apart; it needs one of the poolings {', '.join(BY_STEP)}"
        )
    readings = [Reading(pooling) for pooling in poolings]
    steps = bench.geometry.token_grid[0]
    scored: list[Scored] = []
    for camera in bench.cameras:
        sides = [side.of_camera(camera) for side in (bench.train, bench.test)]
        signals = [bench.signals(side) for side in sides]
        offsets = frame_offsets(bench.data.view, bench.geometry.num_frames, signals[0].fps, 0)
        places = [positions(each, offsets, steps) for each in signals]
        found = [bench.features(side, readings) for side in sides]
        for reading in readings:
            train, test = (
                ProbeSet(
                    {name: by_step(found[i][reading][name], steps) for name in bench.encoders},
                    places[i],
                    np.repeat(signals[i].episodes, steps),
                )
                for i in range(2)
            )
            name = f"dense/{short_name(camera)}/{reading.pooling}"
            scored += probe_suite(
                name, train, test, settings.seed, settings.probe, settings.protocol, device=settings.device
            )
    return scored


def by_step(features: Float[np.ndarray, " clips *dims"], steps: int) -> Float[np.ndarray, " items *dims"]:
    """(clips, steps · dims) → (clips · steps, dims), or (clips, tokens, dims) → (clips · steps, tokens of a
    step, dims): time comes first in both."""
    if features.ndim == 2:
        return features.reshape(len(features) * steps, -1)
    return features.reshape(len(features) * steps, features.shape[1] // steps, features.shape[2])


def positions(
    signals: ClipSignals, offsets: Sequence[int], steps: int
) -> dict[str, Float[np.ndarray, "items 3"]]:
    """Every place of `PLACES` that the data set records, at each time step: the mean over its frames, which
    lie `offsets` file frames behind the clip's first.

    Raises `DataError` where it records none, or a position is not a number.
    """
    found: dict[str, np.ndarray] = {}
    for name, (signal, width, columns) in PLACES.items():
        if signal not in signals.signals or signals.signals[signal].shape[2] != width:
            continue
        values = signals.signals[signal]
        at_frames = values[:, list(offsets)][..., list(columns)].astype(np.float64)
        bad = ~np.isfinite(at_frames).all((1, 2))
        if bad.any():
            clip = signals.clip_ids[int(np.argmax(bad))]
            raise DataError(f"feature {signal!r} of clip {clip} holds a value that is not a number")
        found[name] = at_frames.reshape(len(values) * steps, -1, 3).mean(1)
    if not found:
        raise DataError(
            f"dense needs positions as metaworld-mini records them: {STATE!r} of 4 columns or {WORLD!r} of "
            f"9; this data set has {', '.join(signals.signals) or 'none'}"
        )
    return found
