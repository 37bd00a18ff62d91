"""In which order a clip's frames were shown, read from frozen features: for time arrow and frame order.

Every clip is an item once in each order, all of them on the clip's own side of the split. Knows clips and
orders; neither sources nor how a probe is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, Side, short_name
from salt_vla.evaluation.features import PIXELS, Pixels, Reading
from salt_vla.evaluation.probing import ProbeSet, probe_suite
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.stacked import Stacked

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

TARGET = "order"
# Where no sixteenth of the picture changes by this many grey levels (of 255), nothing moves but what
# compression adds.
STILL_LEVELS = 8.0
ROWS_AT_ONCE = 512


def score_orders(bench: Bench, suite: str, orders: Sequence[str]) -> list[Scored]:
    """Accuracy at naming which of `orders` (names in `features.ORDERS`) a held-out clip was shown in; chance
    is one over their number. A suite `<suite>/<camera>/<pooling>` each; not causal.

    Clips that move by less than `settings.min_motion` grey levels are left out on both sides. A note says how
    many of the held-out clips scored stand still: nobody can tell their order.
    """
    settings = bench.settings
    scored: list[Scored] = []
    readings = [Reading(pooling, order) for pooling in bench.poolings for order in orders]
    for camera in bench.cameras:
        sides = [side.of_camera(camera) for side in (bench.train, bench.test)]
        found = [bench.features(side, readings) for side in sides]
        moved = [motion(bench, side) for side in sides]
        kept = [each >= settings.min_motion for each in moved]
        if not all(each.any() for each in kept):
            raise DataError(
                f"{suite}: no clip of camera {camera!r} moves by {settings.min_motion:g} grey levels on one "
                f"side of the split; lower min_motion (the most there is: {min(m.max() for m in moved):.1f})"
            )
        for pooling in bench.poolings:
            train, test = (
                _items(
                    {name: [found[i][Reading(pooling, o)][name] for o in orders] for name in bench.encoders},
                    orders,
                    kept[i],
                    sides[i].episodes,
                )
                for i in range(2)
            )
            name = f"{suite}/{short_name(camera)}/{pooling}"
            rows = probe_suite(
                name, train, test, settings.seed, settings.probe, settings.protocol, device=settings.device
            )
            note = motion_note(moved[1], kept[1])
            scored += [replace(row, note="; ".join(filter(None, [row.note, note]))) for row in rows]
    return scored


def _items(
    features: Mapping[str, Sequence[np.ndarray]],
    orders: Sequence[str],
    kept: Bool[np.ndarray, " clips"],
    episodes: Int64[np.ndarray, " clips"],
) -> ProbeSet:
    """The kept clips in the first order, then in the second, …; features stay where they lie."""
    labels = np.repeat(np.array(orders, dtype=np.str_), int(kept.sum()))
    return ProbeSet(
        {name: cast("np.ndarray", Stacked(each, np.flatnonzero(kept))) for name, each in features.items()},
        {TARGET: labels},
        np.tile(episodes[kept], len(orders)),
    )


def motion(bench: Bench, side: Side) -> Float[np.ndarray, " clips"]:
    """How much moves in each clip: the largest range over time of any of 16 × 16 places' brightness, in grey
    levels of 255. Whether an encoder is scored or not changes nothing about it."""
    reading = Reading("grid")
    pixels = bench.store.features({PIXELS: Pixels(bench.geometry)}, side.views, [reading])[reading][PIXELS]
    found = np.empty(len(pixels))
    for first in range(0, len(pixels), ROWS_AT_ONCE):
        block = pixels[first : first + ROWS_AT_ONCE].reshape(-1, bench.geometry.num_frames, _places(bench), 3)
        found[first : first + len(block)] = np.ptp(block.mean(3), axis=1).max(1) * 255
    return found


def _places(bench: Bench) -> int:
    return min(16, bench.geometry.image_size) ** 2


def motion_note(moved: Float[np.ndarray, " clips"], kept: Bool[np.ndarray, " clips"]) -> str:
    """What a reader must know of the held-out clips: how many stand still, and how many were left out."""
    still = int((moved[kept] < STILL_LEVELS).sum())
    said = [f"{still} of {int(kept.sum())} held-out clips hardly move: no order of theirs can be told"]
    if not kept.all():
        said.append(f"{int((~kept).sum())} clips that move less than asked for are left out")
    return "; ".join(said if still else said[1:])
