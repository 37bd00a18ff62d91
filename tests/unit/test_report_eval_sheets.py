"""Sheets of an evaluation: what is lit, marked and framed, and where."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.reports.eval_sheets import (
    RIGHT,
    WHITE,
    WRONG,
    Gathered,
    Neighbour,
    heated,
    neighbour_sheet,
    rollout_sheet,
)
from salt_vla.reports.sheets import Layout, layout_of

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
TOKENS = GEOMETRY.num_tokens


@pytest.fixture
def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(60, 200, (4, 32, 32, 3)).astype(np.uint8)


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def tile(sheet: NDArray[np.uint8], layout: Layout, row: int, column: int) -> NDArray[np.uint8]:
    top, left = layout.corner(row, column)
    return sheet[top : top + layout.tile, left : left + layout.tile]


def patch(image: NDArray[np.uint8], row: int, column: int) -> NDArray[np.uint8]:
    """Of a tile, the pixels of one token."""
    size = len(image) // 4
    return image[row * size : (row + 1) * size, column * size : (column + 1) * size]


def test_where_most_arrives_it_is_amber_and_where_nothing_does_dark(frames: NDArray[np.uint8]) -> None:
    shares = np.zeros(TOKENS, np.float32)
    shares[16 + 4 * 2 + 3] = 1  # the second step, row 2, column 3
    sheet, layout = decoded(rollout_sheet(frames, [Gathered("e", shares)], GEOMETRY)), layout_of(GEOMETRY, 2)
    lit, dark = patch(tile(sheet, layout, 1, 1), 2, 3), patch(tile(sheet, layout, 1, 1), 0, 0)
    assert lit.mean() > 1.8 * dark.mean()
    assert lit[..., 0].mean() > 1.5 * lit[..., 2].mean(), "amber"
    assert np.ptp(dark, axis=-1).max() == 0, "grey"


def test_a_share_looks_the_same_on_every_row(frames: NDArray[np.uint8]) -> None:
    """An even share beside a token that gathers nearly everything is shown as where all are even."""
    even = np.full(TOKENS, 1 / TOKENS, np.float32)
    uneven = even.copy()
    uneven[7] = 30 / TOKENS
    rows = [Gathered("e", even), Gathered("f", uneven)]
    sheet, layout = decoded(rollout_sheet(frames, rows, GEOMETRY)), layout_of(GEOMETRY, 3)
    assert np.array_equal(tile(sheet, layout, 1, 1), tile(sheet, layout, 2, 1))
    assert not np.array_equal(tile(sheet, layout, 1, 0), tile(sheet, layout, 2, 0))


def test_the_marked_token_has_a_white_edge(frames: NDArray[np.uint8]) -> None:
    shares = np.full(TOKENS, 1 / TOKENS, np.float32)
    sheet = decoded(rollout_sheet(frames, [Gathered("e", shares, 5), Gathered("e", shares)], GEOMETRY))
    layout = layout_of(GEOMETRY, 3)
    place, unmarked = (patch(tile(sheet, layout, row, 0), 1, 1) for row in (1, 2))
    assert (place[[0, -1]] == WHITE).all() and (place[:, [0, -1]] == WHITE).all()
    inside = slice(len(place) // 4, -len(place) // 4)
    assert np.array_equal(place[inside, inside], unmarked[inside, inside])
    assert np.array_equal(tile(sheet, layout, 1, 1), tile(sheet, layout, 2, 1)), "one token alone"


def test_heat_runs_from_dark_grey_to_amber() -> None:
    film = np.full((1, 2, 2, 3), 200, np.uint8)
    none, half, full = (heated(film, np.full((1, 2, 2), heat, np.float32)) for heat in (0, 0.5, 1))
    assert none.max() == none.min() == 50
    assert none.mean() < half.mean() < full.mean()


def test_shares_of_another_clip_are_refused(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match=r"e: expected 32 shares, not \(31,\)"):
        rollout_sheet(frames, [Gathered("e", np.ones(31, np.float32))], GEOMETRY)
    with pytest.raises(DataError, match="expected uint8 frames"):
        rollout_sheet(frames[:2], [], GEOMETRY)


def test_right_and_wrong_neighbours_are_framed_and_the_film_within_is_theirs(
    frames: NDArray[np.uint8],
) -> None:
    found = [Neighbour(255 - frames, "push", 0.9, True), Neighbour(frames, "pull", 0.5, False)]
    sheet, layout = decoded(neighbour_sheet(frames, "the query", found, GEOMETRY)), layout_of(GEOMETRY, 3)
    query, right, wrong = (tile(sheet, layout, row, 1) for row in range(3))
    for framed, colour in ((right, RIGHT), (wrong, WRONG)):
        assert (framed[0] == colour).all() and (framed[:, -1] == colour).all()
    inside = slice(len(query) // 4, -len(query) // 4)
    assert np.array_equal(wrong[inside, inside], query[inside, inside])
    assert np.array_equal(right[inside, inside], 255 - query[inside, inside])


def test_a_neighbour_of_another_size_is_refused(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match="expected uint8 frames"):
        neighbour_sheet(frames, "q", [Neighbour(frames[:, :16], "l", 1.0, True)], GEOMETRY)
