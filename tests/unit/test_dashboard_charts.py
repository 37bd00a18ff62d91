"""Curves as the dashboard draws them: nothing that a person would look for is lost on the way."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.operations.dashboard.charts import (
    COLOURS,
    MOST_RUNS,
    Curves,
    Look,
    figure,
    same,
    smoothed,
    thinned,
    without,
)

LOSS, R2 = "train.loss", "val.r2_position_mean"


def _run(name: str, steps: int = 10, **per_step: float) -> Curves:
    x = list(range(1, steps + 1))
    return Curves(
        name, {LOSS: (x, [1 / step for step in x]), R2: (x[::2], [0.1 * step for step in x[::2]])}, per_step
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(3, 50))
@settings(deadline=None, max_examples=60)
def test_thinning_keeps_extremes_ends_and_order(values: list[float], most: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    kept_x, kept_y = thinned(x, y, most)
    assert len(kept_y) <= max(most, 3)
    assert kept_y.min() == y.min() and kept_y.max() == y.max()
    assert kept_x[-1] == x[-1] and (np.diff(kept_x) > 0).all()
    assert (y[kept_x.astype(int)] == kept_y).all()


def test_smoothing_does_not_begin_at_zero_and_follows() -> None:
    level = np.full(50, 11.5)
    assert np.allclose(smoothed(level, 0.9), level)
    step = np.concatenate([np.zeros(100), np.ones(100)])
    out = smoothed(step, 0.9)
    assert out[99] == 0 and 0 < out[105] < 1 and out[-1] > 0.99
    # By hand: two values, the older one weighs half as much.
    assert np.allclose(smoothed(np.array([4.0, 1.0]), 0.5), [4.0, (0.5 * 4 + 1.0) / 1.5])


def test_each_column_has_a_chart_over_one_axis() -> None:
    drawn = figure([_run("a"), _run("b")], Look((LOSS, R2)))
    assert {trace["yaxis"] for trace in drawn["data"]} == {"y", "y2"}
    assert {trace["xaxis"] for trace in drawn["data"]} == {"x"}
    upper, lower = drawn["layout"]["yaxis"]["domain"], drawn["layout"]["yaxis2"]["domain"]
    assert upper[0] > lower[1] and lower[0] == 0 and upper[1] == 1
    assert drawn["layout"]["xaxis"]["anchor"] == "y2"
    # One entry a run in the legend, in one colour wherever it is drawn.
    assert [trace["name"] for trace in drawn["data"] if trace["showlegend"]] == ["a", "b"]
    colours = {(trace["name"], trace["line"]["color"]) for trace in drawn["data"]}
    assert colours == {("a", COLOURS[0]), ("b", COLOURS[1])}
    json.dumps(drawn, allow_nan=False)


@pytest.mark.parametrize(("axis", "unit"), [("step", 1), ("clips", 32), ("flops", 1.5e12)])
def test_curves_lie_over_steps_clips_or_flops(axis: str, unit: float) -> None:
    (trace,) = figure([_run("a", clips=32, flops=1.5e12)], Look((LOSS,), axis))["data"]
    assert trace["x"] == [step * unit for step in range(1, 11)]


def test_a_run_without_a_place_on_the_axis_is_left_out_and_named() -> None:
    runs, look = [_run("known", flops=1e12), _run("unknown")], Look((LOSS,), "flops")
    assert [trace["name"] for trace in figure(runs, look)["data"]] == ["known"]
    assert without(runs, look) == ["unknown"]
    assert not without(runs, Look((LOSS,)))


def test_a_smoothed_curve_lies_over_the_faint_true_one() -> None:
    raw, smooth = figure([_run("a")], Look((LOSS,), smoothing=0.9))["data"]
    assert raw["opacity"] < 1 and raw["y"] == [1 / step for step in range(1, 11)]
    assert smooth["y"] != raw["y"] and smooth["showlegend"] and not raw["showlegend"]


def test_a_single_point_is_seen() -> None:
    (trace,) = figure([_run("a", steps=1)], Look((LOSS,)))["data"]
    assert trace["mode"] == "markers"


def test_no_more_runs_than_can_be_told_apart() -> None:
    assert (
        len(figure([_run(str(n)) for n in range(40)], Look((LOSS,)))["data"])
        == MOST_RUNS
        == len(set(COLOURS))
    )


def test_zoom_stays_while_the_look_is_the_same_and_data_grows() -> None:
    look = Look((LOSS, R2))
    before, after = figure([_run("a", 10)], look), figure([_run("a", 20)], look)
    assert before["layout"]["uirevision"] == after["layout"]["uirevision"]
    for other in (Look((LOSS,)), Look((LOSS, R2), "clips"), Look((LOSS, R2), log=True)):
        assert figure([_run("a")], other)["layout"]["uirevision"] != before["layout"]["uirevision"]


@pytest.mark.parametrize("before", [None, {}, {"data": []}, {"layout": None}, "rubbish"])
def test_only_what_is_new_is_sent(before: Any) -> None:
    drawn = figure([_run("a")], Look((LOSS,)))
    assert same(json.loads(json.dumps(drawn)), drawn)
    assert not same(before, drawn)
    assert not same(figure([_run("a", 11)], Look((LOSS,))), drawn)


def test_nothing_to_draw_is_a_figure_too() -> None:
    for runs in ([], [Curves("empty", {})]):
        assert figure(runs, Look((LOSS,)))["data"] == []
