"""Charts: real pictures, decoded and looked at; what cannot be drawn is refused in words."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from salt_vla.errors import DataError
from salt_vla.reports import canvas
from salt_vla.reports.canvas import DARK, LIGHT, Theme
from salt_vla.reports.figures import curves, probe_bars

WIDTH = round(canvas.CHART_WIDTH * canvas.CHART_DPI)


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def pixels_of(image: NDArray[np.uint8], colour: str, tolerance: int = 12) -> NDArray[np.bool_]:
    """Where the picture has a colour, give or take anti-aliasing."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return (np.abs(image.astype(int) - wanted) <= tolerance).all(axis=-1)


def metrics(with_r2: bool = True, start: float = -0.5) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(0, 101, 10):
        rows.append({"kind": "train", "step": step, "loss": 1 - step / 200, "lr": 1e-3, "grad_norm": 0.5})
        if step % 20 == 0:
            row: dict[str, Any] = {"kind": "val", "step": step, "loss": 1.1 - step / 200}
            if with_r2:
                row |= {"r2_channel_mean": step / 150, "r2_position_mean": start + step / 200}
                row |= {"r2_copy_nearest": start / 2 + step / 300}
            rows.append(row)
    return rows


def scores(**values: float) -> list[dict[str, Any]]:
    return [
        {
            "encoder": encoder,
            "suite": "held_out",
            "target": target,
            "metric": "r2",
            "value": value,
            "low": value - 0.05,
            "high": value + 0.05,
            "seed": 0,
        }
        for target in ("action_mean", "hand_velocity")
        for encoder, value in values.items()
    ]


def test_curves_are_a_picture_of_the_size_said() -> None:
    image = decoded(curves(metrics(), "student"))
    assert image.shape[1] == WIDTH and 700 < image.shape[0] < 1100
    assert pixels_of(image, LIGHT.paper).mean() > 0.8, "mostly paper"


def test_the_three_baselines_are_drawn_in_three_colours_below_the_loss() -> None:
    image = decoded(curves(metrics()))
    lower = image[image.shape[0] // 2 :]
    for colour in LIGHT.series[:3]:
        assert pixels_of(lower, colour).sum() > 300
    assert not pixels_of(image[: image.shape[0] // 3], LIGHT.series[1]).any(), "the loss has one colour"


def test_the_zero_line_of_r2_goes_across_the_panel() -> None:
    image = decoded(curves(metrics()))
    dark = pixels_of(image, LIGHT.ink, tolerance=40).sum(axis=1)
    assert dark.max() > 0.6 * WIDTH
    assert dark.argmax() > image.shape[0] / 2


def test_a_run_without_r2_has_one_panel() -> None:
    with_r2, without = decoded(curves(metrics())), decoded(curves(metrics(with_r2=False)))
    assert without.shape[0] < 0.7 * with_r2.shape[0]


def test_r2_of_training_batches_alone_is_drawn() -> None:
    rows = [row | {"r2_channel_mean": 0.3} for row in metrics(with_r2=False) if row["kind"] == "train"]
    assert decoded(curves(rows)).shape[0] == decoded(curves(metrics())).shape[0]


def test_rows_that_are_not_numbers_or_of_another_kind_are_passed_over() -> None:
    noise: list[dict[str, Any]] = [
        {"kind": "val", "step": 55, "loss": None, "r2_channel_mean": math.nan, "r2_position_mean": None},
        {"kind": "probe", "step": 50, "loss": 1e9, "r2_channel_mean": 5.0},
        {"kind": "train", "step": 53, "loss": math.inf},
    ]
    assert curves(metrics() + noise) == curves(metrics())


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert curves(metrics()[::-1]) == curves(metrics())


def test_one_hopeless_point_does_not_flatten_the_curve() -> None:
    rows = metrics()
    rows[1]["r2_copy_nearest"] = -400.0
    image = decoded(curves(rows))
    lower = image[image.shape[0] // 2 :]
    heights = np.flatnonzero(pixels_of(lower, LIGHT.series[0]).any(axis=1))
    assert np.ptp(heights) > 80, "the channel-mean curve still rises over a good part of the panel"


def test_nothing_to_draw_is_said_and_not_drawn() -> None:
    with pytest.raises(DataError, match="no loss to draw for teacher"):
        curves([{"kind": "probe", "step": 1}], "teacher")
    with pytest.raises(DataError, match="no train or val row"):
        curves([])


@pytest.mark.parametrize(("dark", "colours"), [(False, LIGHT), (True, DARK)], ids=["light", "dark"])
def test_charts_sit_on_the_paper_of_their_page(dark: bool, colours: Theme) -> None:
    for png in (curves(metrics(), dark=dark), probe_bars(scores(student=0.5, random=0.4), dark=dark)):
        image = decoded(png)
        assert pixels_of(image, colours.paper, 1)[[0, 0, -1, -1], [0, -1, 0, -1]].all()
        assert pixels_of(image, colours.series[0]).sum() > 100


def test_the_same_rows_give_the_same_bytes() -> None:
    assert curves(metrics(), "a") == curves(metrics(), "a")
    assert probe_bars(scores(student=0.5)) == probe_bars(scores(student=0.5))


def centres(image: NDArray[np.uint8], colour: str) -> float:
    """The mean column of a colour below the legend."""
    below = pixels_of(image, colour)
    below[: image.shape[0] // 5] = False
    return float(np.nonzero(below)[1].mean())


def test_dots_stand_in_the_order_of_their_values() -> None:
    image = decoded(probe_bars(scores(student=0.5, teacher=0.7, random=0.3, pixels=0.9)))
    student, teacher, random, pixels = (centres(image, colour) for colour in LIGHT.series[:4])
    assert random < student < teacher < pixels


def test_the_interval_is_drawn_as_long_as_it_is() -> None:
    narrow, wide = scores(student=0.5), scores(student=0.5)
    for row in wide:
        row |= {"low": 0.2, "high": 0.8}
    lengths = []
    for rows in (narrow, wide):
        image = decoded(probe_bars(rows))
        where = pixels_of(image, LIGHT.series[0])
        where[: image.shape[0] // 5] = False
        lengths.append(np.ptp(np.nonzero(where)[1]))
    assert 4 < lengths[1] / lengths[0] < 7.5


def test_every_target_has_a_row_of_its_own() -> None:
    one = decoded(probe_bars([row for row in scores(student=0.5) if row["target"] == "action_mean"]))
    two = decoded(probe_bars(scores(student=0.5)))
    assert two.shape[0] > one.shape[0] and two.shape[1] == one.shape[1] == WIDTH


def test_hopeless_values_are_drawn_at_the_edge_with_the_rest_still_readable() -> None:
    image = decoded(probe_bars(scores(student=0.5, pixels=-80.0)))
    assert centres(image, LIGHT.series[3]) < centres(image, LIGHT.series[0])
    dots = np.nonzero(pixels_of(image, LIGHT.series[0]))[1]
    assert dots.max() < 0.8 * WIDTH


def test_a_suite_is_chosen() -> None:
    rows = scores(student=0.5) + [row | {"suite": "new", "value": 0.1} for row in scores(student=0.5)]
    assert probe_bars(rows, suite="held_out") == probe_bars(scores(student=0.5))


def test_encoders_without_a_fixed_colour_are_drawn_too() -> None:
    image = decoded(probe_bars(scores(my_encoder=0.5, another=0.7)))
    assert pixels_of(image, LIGHT.series[0]).any() and pixels_of(image, LIGHT.series[1]).any()


def test_figures_that_are_not_numbers_are_left_out() -> None:
    rows = scores(student=0.5) + [
        row | {"value": None, "low": None, "high": None} for row in scores(random=0.3)
    ]
    image = decoded(probe_bars(rows))
    below = image[image.shape[0] // 5 :]
    assert pixels_of(below, LIGHT.series[0]).any() and not pixels_of(below, LIGHT.series[2]).any()


@pytest.mark.parametrize("suite", ["", "elsewhere"])
def test_no_rows_to_draw_is_said(suite: str) -> None:
    with pytest.raises(DataError, match="no result rows to draw"):
        probe_bars(scores(student=0.5) if suite else [], suite=suite)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_letters_and_lines_can_be_told_from_the_paper(colours: Theme) -> None:
    assert contrast(colours.ink, colours.paper) > 7
    assert contrast(colours.quiet, colours.paper) > 4.5
    assert all(contrast(colour, colours.paper) > 3 for colour in colours.series)


def test_sheet_letters_can_be_read_on_either_page() -> None:
    assert min(contrast(canvas.NEUTRAL, LIGHT.paper), contrast(canvas.NEUTRAL, DARK.paper)) > 3.7
