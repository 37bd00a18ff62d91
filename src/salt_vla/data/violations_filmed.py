"""Violations made in films that exist: two stretches of one episode, recombined or with what moves taken out.

The films keep the look that an encoder was trained on, which drawn rooms do not. Knows arrays of pictures,
neither data sets nor models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import binary_dilation, binary_opening

from salt_vla.data.violations import ViolationPair, World, switched
from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8

CONDITIONS = ("rewind", "cut", "vanish", "recolour")
MOVED = 24  # grey levels from the background, in any colour, that make a pixel part of what moves
MARGIN = 2  # pixels around it that belong to it too: its edges, and what compression smeared
SMALLEST = 0.002  # share of the picture that something must cover in every frame to be called a thing


def filmed_pairs(
    scene: str,
    early: UInt8[np.ndarray, "frames size size 3"],
    late: UInt8[np.ndarray, "frames size size 3"] | None = None,
) -> Iterator[ViolationPair]:
    """Every condition's pairs of one episode that a still camera filmed, violated in the middle of `early`.

    rewind: time runs backwards from then on. cut: the film goes on at another moment, `late`, or comes from
    there. vanish: what moves is gone, replaced by the background that other frames show, or comes from
    nowhere. recolour: what moves changes its colours. A film in which nothing moves gives no pair; without a
    late stretch there is no cut.
    """
    frames = len(early)
    if frames < 4 or (late is not None and late.shape != early.shape):
        raise DataError(f"episode {scene}: two stretches of one length of 4 frames or more are needed")
    at = frames // 2
    whole = np.ones(early.shape[:3], bool)
    backwards = np.concatenate([early[:at], early[np.maximum(at - 2 - np.arange(frames - at), 0)]])
    yield from switched("rewind", scene, (World(early, whole), World(backwards, whole)), at, both_ways=False)
    if late is not None:
        yield from switched("cut", scene, (World(early, whole), World(late, whole)), at)
    known = early if late is None else np.concatenate([early, late])
    background = np.median(known, axis=0).astype(np.uint8)
    moves = moving(early, background)
    if moves.mean((1, 2)).min() < SMALLEST:
        return
    here, chosen = World(early, moves), moves[..., None]
    yield from switched("vanish", scene, (here, World(np.where(chosen, background, early), moves)), at)
    turned = np.roll(early, 1, axis=-1)
    yield from switched("recolour", scene, (here, World(np.where(chosen, turned, early), moves)), at)


def moving(
    frames: UInt8[np.ndarray, "frames size size 3"], background: UInt8[np.ndarray, "size size 3"]
) -> Bool[np.ndarray, "frames size size"]:
    """Where each frame shows something that the background does not, without specks, with a margin."""
    apart = np.abs(frames.astype(np.int16) - background).max(-1) > MOVED
    square = np.ones((1, 3, 3), bool)
    return binary_dilation(binary_opening(apart, square), square, iterations=MARGIN)
