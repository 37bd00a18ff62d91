"""Sheets of an evaluation: what an encoder's attention gathers of a clip, and which clips it holds for alike.

Film strips as in `sheets.py`; knows pictures and numbers, no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.reports.patches import FloatArray, FramesArray, check_frames, enlarge
from salt_vla.reports.sheets import AMBER, Strip, film_sheet, tubelet_starts

RIGHT, WRONG = np.array([11, 102, 168], np.uint8), np.array([222, 101, 26], np.uint8)
REACH = 4.0  # times an even share, and its inverse: the ends of the colours
WHITE = np.array([255, 255, 255], np.uint8)


@dataclass(frozen=True)
class Gathered:
    """One row of the sheet: the share (tokens,) of every token in what an encoder gives, summing to 1; `of`:
    the token that gathered it, marked on the sheet, or None for the mean over all of them."""

    label: str
    shares: FloatArray
    of: int | None = None


@dataclass(frozen=True)
class Neighbour:
    """A clip that was found: its film, how near it is, and whether it is right."""

    frames: FramesArray
    label: str
    cosine: float
    right: bool


def rollout_sheet(frames: FramesArray, rows: Sequence[Gathered], geometry: ClipGeometry) -> bytes:
    """The clip, then a row each of `rows`: dark where a quarter of an even share arrives or less, amber from
    four times one on. The scale is logarithmic and the same for all; a label says how far a row reaches.
    """
    check_frames(frames, geometry)
    film = tubelet_starts(frames, geometry)
    strips = [Strip("the clip", film)]
    for row in rows:
        if row.shares.shape != (geometry.num_tokens,):
            raise DataError(f"{row.label}: expected {geometry.num_tokens} shares, not {row.shares.shape}")
        even = row.shares * geometry.num_tokens
        others = even if row.of is None else np.delete(even, row.of)
        low, high = float(others.min()), float(others.max())
        heat = 0.5 + 0.5 * np.log(np.maximum(even, 1e-6)) / np.log(REACH)
        shades = np.clip(heat, 0, 1).astype(np.float32).reshape(geometry.token_grid)
        painted = heated(film, enlarge(shades, geometry.patch_size))
        if row.of is not None:
            _mark(painted, row.of, geometry)
        reach = f"{low:.2f} to {high:.2f} × an even share"
        strips.append(Strip(f"{row.label}: {reach}", painted))
    return film_sheet(strips, geometry)


def neighbour_sheet(
    query: FramesArray, label: str, found: Sequence[Neighbour], geometry: ClipGeometry
) -> bytes:
    """The clip that asked, then its neighbours, nearest first, framed and marked as right or wrong."""
    strips = [Strip(label, tubelet_starts(query, geometry))]
    for number, each in enumerate(found, 1):
        check_frames(each.frames, geometry)
        mark = "✓" if each.right else "✗"
        said = f"{mark} {number}. cosine {each.cosine:.3f}: {each.label}"
        tiles = _framed(tubelet_starts(each.frames, geometry), RIGHT if each.right else WRONG)
        strips.append(Strip(said, tiles))
    return film_sheet(strips, geometry)


def heated(frames: FramesArray, heat: FloatArray) -> FramesArray:
    """Grey film, dark where `heat` (frames, rows, columns) is 0, in amber light where it is 1."""
    grey = frames.mean(-1, keepdims=True, dtype=np.float32)
    glow = 0.3 * grey + 0.8 * AMBER
    share = heat[..., None]
    return np.clip((1 - share) * 0.25 * grey + share * glow, 0, 255).astype(np.uint8)


def _mark(frames: FramesArray, token: int, geometry: ClipGeometry) -> None:
    """A white edge round the token's place."""
    step, row, column = np.unravel_index(token, geometry.token_grid)
    size = geometry.patch_size
    place = frames[step, row * size : (row + 1) * size, column * size : (column + 1) * size]
    place[[0, -1]] = WHITE
    place[:, [0, -1]] = WHITE


def _framed(frames: FramesArray, colour: NDArray[np.uint8]) -> FramesArray:
    wide = max(2, frames.shape[1] // 40)
    framed = frames.copy()
    framed[:, :wide] = framed[:, -wide:] = colour
    framed[:, :, :wide] = framed[:, :, -wide:] = colour
    return framed
