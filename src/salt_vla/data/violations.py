"""Pairs of films of which one could happen and the other could not, equal up to the moment that makes it so.

Owns how two worlds become pairs; what is in them is drawn by `violations_rendered.py` and cut from films by
`violations_filmed.py`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8


@dataclass(frozen=True)
class World:
    """A film as it goes if nothing happens. `cover`: where its object, the one that a violation befalls, can
    be seen; an object behind another covers nothing."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    cover: Bool[np.ndarray, "frames height width"]


@dataclass(frozen=True)
class ViolationPair:
    """Two films that are equal, bit by bit, before `frame`, and from then on wherever `region` is False.

    `frame`: the first that shows what cannot be. `scene`: what pairs that look alike have in common, and what
    intervals resample. `run`: 1, or 2 for the pair whose films go the other way round.
    """

    condition: str
    scene: str
    run: int
    possible: UInt8[np.ndarray, "frames height width 3"]
    impossible: UInt8[np.ndarray, "frames height width 3"]
    frame: int
    region: Bool[np.ndarray, "frames height width"]

    @property
    def name(self) -> str:
        return f"{self.condition}/{self.scene}/{self.run}"

    def film(self, possible: bool) -> UInt8[np.ndarray, "frames height width 3"]:
        return self.possible if possible else self.impossible


def switched(
    condition: str, scene: str, worlds: Sequence[World], at: int, both_ways: bool = True
) -> Iterator[ViolationPair]:
    """Pairs from two worlds: the possible film stays in one, the impossible film changes over at frame `at`.

    `both_ways`: also from the second world to the first. What comes after the change is then once the
    possible film and once the impossible one, so that nothing but what came before can tell them apart. Where
    no pixel changes there is no pair.
    """
    first, second = worlds
    if first.frames.shape != second.frames.shape or not 0 < at < len(first.frames):
        raise DataError(
            f"{condition}: worlds of {first.frames.shape} and {second.frames.shape} cannot change over at "
            f"frame {at}"
        )
    differs = (first.frames[at:] != second.frames[at:]).any((1, 2, 3))
    if not differs.any():
        return
    frame = at + int(np.argmax(differs))
    region = first.cover | second.cover
    region[:frame] = False
    for run, (stays, goes) in enumerate([(first, second), (second, first)][: 1 + both_ways], start=1):
        impossible = np.concatenate([stays.frames[:at], goes.frames[at:]])
        yield ViolationPair(condition, scene, run, stays.frames, impossible, frame, region)
