"""Held-out clips that look like a training clip, picture by picture: the same film, encoded anew?

Knows the small pictures that the row `pixels` is made of; neither files nor encoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from salt_vla.evaluation.bench import Bench, Side, short_name
from salt_vla.evaluation.features import PIXEL_SIDE, Pixels, Reading
from salt_vla.evaluation.settings import POOLINGS

if TYPE_CHECKING:
    from jaxtyping import Float

ALIKE = 10.0  # grey levels of 255, anywhere at any time; docs/evaluation.md says what lies on either side
MOVES = 2 * ALIKE  # Less than this and a clip is like any other of its camera in which nothing happens.
AT_ONCE = 4096


def look_alikes(
    train: Float[np.ndarray, "clips pixels"], test: Float[np.ndarray, "others pixels"], frames: int
) -> list[tuple[int, int]]:
    """(row of `test`, row of `train`) of clips that differ by `ALIKE` at most in every sixteenth (each way)
    of every frame, from their pixel features (colours in 0 … 1). Clips in which nothing changes by `MOVES`
    are like one another anyway, and left out. Each is held against the one that is nearest."""
    mine = _grey(test, frames)
    nearest, least = np.zeros(len(mine), np.int64), np.full(len(mine), np.inf, np.float32)
    flat = mine.reshape(len(mine), -1)
    for start in range(0, len(train), AT_ONCE):
        block = _grey(train[start : start + AT_ONCE], frames).reshape(-1, flat.shape[1])
        apart = (block**2).sum(1) - 2 * flat @ block.T  # and |flat|², which is the same for all
        closest = apart.argmin(1)
        distance = apart[np.arange(len(flat)), closest]
        nearest = np.where(distance < least, start + closest, nearest)
        least = np.minimum(distance, least)
    moving = np.flatnonzero(np.ptp(mine, axis=1).max(1) >= MOVES)
    others = nearest[moving].tolist()
    apart = [
        np.abs(mine[row] - _grey(train[other][None], frames)[0]).max()
        for row, other in zip(moving, others, strict=True)
    ]
    alike = zip(moving.tolist(), others, apart, strict=True)
    return [(row, other) for row, other, most in alike if most <= ALIKE]


def _grey(rows: Float[np.ndarray, "clips pixels"], frames: int) -> Float[np.ndarray, "clips frames places"]:
    return 255 * np.asarray(rows, np.float32).reshape(len(rows), frames, -1, 3).mean(-1)


def note_copies(bench: Bench) -> None:
    """Add a sentence to the bench's notes for each camera with such clips, where a suite has just had the
    pixels of whole clips read; nothing is decoded for it."""
    for camera in bench.cameras:
        sides = [side.of_camera(camera) for side in (bench.train, bench.test)]
        train, test = (_pixels_of(bench, side) for side in sides)
        if train is None or test is None:
            continue
        found = look_alikes(train, test, bench.geometry.num_frames)
        if found:
            (row, other), names = found[0], [side.clips.clip_ids for side in sides]
            where = f" of camera {short_name(camera)}" * bool(camera)
            bench.notes.append(
                f"{len(found)} of {len(test)} held-out clips{where} look like a training clip (the first: "
                f"{names[1][row]!r} like {names[0][other]!r}): the same film, encoded anew? If so, these "
                "figures are too good; leave one of the two out"
            )


def _pixels_of(bench: Bench, side: Side) -> Float[np.ndarray, "clips pixels"] | None:
    size = bench.geometry.image_size
    if size < PIXEL_SIDE:
        return None
    readings = [Reading(pooling) for pooling in POOLINGS]
    kept = (bench.store.kept(Pixels(bench.geometry), side.views, reading) for reading in readings)
    return next((rows for rows in kept if rows is not None), None)
