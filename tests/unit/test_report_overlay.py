"""Curves of several runs over one another: every run is drawn, and an early fall flattens none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from salt_vla.errors import DataError
from salt_vla.reports.canvas import DARK, LIGHT
from salt_vla.reports.overlay import overlay

Curves = dict[str, tuple[list[float], list[float]]]
RISING: Curves = {"a": ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0]), "b": ([0.0, 1.0, 2.0], [1.0, 0.5, 0.0])}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def drawn_in(png: bytes, colour: str) -> np.ndarray:
    """(rows, columns) of the pixels of that colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return np.argwhere((np.abs(pixels(png) - wanted) < 8).all(axis=2))


@pytest.mark.parametrize("dark", [False, True])
def test_every_run_has_a_colour_of_its_own(dark: bool) -> None:
    png = overlay(RISING, "step", "R²", dark)
    for place in range(2):
        assert len(drawn_in(png, (DARK if dark else LIGHT).series[place])) > 200
    assert len(drawn_in(png, (DARK if dark else LIGHT).series[2])) == 0
    assert png == overlay(RISING, "step", "R²", dark)


def test_more_runs_than_colours_differ_in_their_dashes() -> None:
    x = [0.0, 1.0, 2.0] * 20
    five = {f"run{n}": (sorted(x), [float(n)] * 60) for n in range(len(LIGHT.series))}
    sixth = {**five, "one more": (sorted(x), [9.0] * 60)}
    ink = [len(drawn_in(overlay(runs, "step", "loss"), LIGHT.series[0])) for runs in (five, sixth)]
    solid, dashed = ink[0], ink[1] - ink[0]
    assert 0 < dashed < 0.9 * solid


def test_an_early_fall_does_not_flatten_the_rest() -> None:
    fallen = {name: ([-1.0, *x], [-500.0, *y]) for name, (x, y) in RISING.items()}
    first = LIGHT.series[0]
    flat, tall = (drawn_in(overlay(fallen, "step", "R²", lowest=low), first) for low in (None, -1.5))
    right = [points[points[:, 1] > points[:, 1].max() * 0.6, 0] for points in (flat, tall)]
    assert np.ptp(right[1]) > 5 * np.ptp(right[0])
    hopeless: Curves = {"a": ([0.0, 1.0], [-9.0, -8.0])}
    assert overlay(hopeless, "step", "R²", lowest=-1.5) == overlay(hopeless, "step", "R²")


def test_a_run_without_points_is_left_out_and_nothing_at_all_is_an_error() -> None:
    empty: Curves = {"c": ([], [])}
    assert overlay(RISING | empty, "step", "loss") == overlay(RISING, "step", "loss")
    with pytest.raises(DataError, match="no run has a curve of loss"):
        overlay(empty, "step", "loss")
