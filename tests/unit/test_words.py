"""Figures in words fit a terminal's line and say what they are."""

from __future__ import annotations

import pytest

from salt_vla.operations.words import SPARKS, ago, duration, number, sentence, sparkline


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3500, "58 min"), (3600, "1 h"), (32_700, "9 h 5 min"),
     (172_800, "2 d"), (190_000, "2 d 4 h")],
)  # fmt: skip
def test_a_duration_has_at_most_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_figures_are_short_and_none_is_nothing() -> None:
    assert [number(value) for value in (None, 3, 52_780, 0.123456, 1e-7, "x")] == [
        *("", "3", "52780", "0.1235", "1e-07", "x")
    ]
    assert (ago(0.5), ago(30)) == ("just now", "30 s ago")


def test_a_row_of_metrics_is_a_sentence() -> None:
    row = {"kind": "train", "step": 40, "loss": 0.61234, "r2_position_mean": 0.3, "clips_per_s": 35.0}
    assert sentence(row) == "step 40: loss 0.6123, R² over place means +0.300, 35 clips/s"
    assert (
        sentence({"kind": "val", "step": 4, "loss": None, "r2_position_mean": None})
        == "step 4: held out: loss no number"
    )
    assert "collapsed" in sentence(row | {"collapse": True})
    assert sentence({"kind": "probe", "step": 4}) == "step 4: probe: "


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == SPARKS
    assert sparkline([7, 0], 8) == SPARKS[-1] + SPARKS[0]
    assert sparkline(range(1000), 8) == SPARKS
    assert sparkline([3.0] * 20, 5) == SPARKS[4] * 5
    assert [sparkline(values, width) for values, width in (([], 9), ([1.0], 0))] == ["", ""]
