"""Result rows: pooling over seeds, order, names, and how a figure is written."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_vla.errors import DataError
from salt_vla.evaluation.results import Comparison
from salt_vla.evaluation.results import Row as EvaluationRow
from salt_vla.evaluation.seeds import BOTH, SeedComparison, SeedRow
from salt_vla.reports.rows import (
    EVERY_SEED,
    ONE_SEED,
    Difference,
    encoder_label,
    in_report_order,
    interval,
    metric_label,
    number,
    pool_differences,
    pool_scores,
    suites_of,
    target_label,
    told_from,
)


def score(value: float, seed: int = 0, encoder: str = "student", **more: Any) -> dict[str, Any]:
    row = {"encoder": encoder, "suite": "held_out", "target": "action_mean", "metric": "r2", "seed": seed}
    return row | {"value": value, "low": value - 0.1, "high": value + 0.1} | more


def difference(value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    row = {
        "encoder": "student",
        "against": "random",
        "suite": "held_out",
        "target": "task",
        "metric": "accuracy",
    }
    row |= {
        "difference": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "seed": seed,
        "apart": abs(value) > 0.1,
    }
    return row | more


def test_one_seed_is_taken_as_it_is() -> None:
    (pooled,) = pool_scores([score(0.5)])
    assert (pooled.value, pooled.low, pooled.high, pooled.seeds) == (0.5, 0.4, 0.6, 1)
    assert pooled.spread == ONE_SEED


def test_seeds_are_averaged_and_their_intervals_covered() -> None:
    (pooled,) = pool_scores([score(0.2, 0), score(0.4, 1), score(0.9, 2)])
    assert pooled.value == pytest.approx(0.5)
    assert (pooled.low, pooled.high) == (pytest.approx(0.1), pytest.approx(1.0))
    assert (pooled.seeds, pooled.spread) == (3, EVERY_SEED)


def test_rows_stay_apart_by_encoder_suite_target_and_metric() -> None:
    rows = [score(0.1), score(0.2, encoder="teacher"), score(0.3, suite="new"), score(0.4, target="task")]
    rows.append(score(0.5, metric="accuracy"))
    assert [pooled.value for pooled in pool_scores(rows)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_difference_is_apart_only_if_it_is_in_every_seed() -> None:
    (pooled,) = pool_differences([difference(0.3, 0), difference(0.2, 1)])
    assert pooled.apart and pooled.ahead and not pooled.behind
    (pooled,) = pool_differences([difference(0.3, 0), difference(0.05, 1)])
    assert not (pooled.apart or pooled.ahead or pooled.behind)


def test_seeds_that_disagree_in_sign_are_not_apart() -> None:
    (pooled,) = pool_differences([difference(0.5, 0), difference(-0.2, 1)])
    assert not pooled.apart and pooled.low < 0 < pooled.high


def test_a_difference_told_from_the_other_side_changes_its_sign() -> None:
    (pooled,) = pool_differences([difference(0.3)])
    told = pooled.flipped()
    assert (told.encoder, told.against) == ("random", "student")
    assert (told.difference, told.low, told.high) == (-0.3, -pooled.high, -pooled.low)
    assert told.behind and told.flipped() == pooled


def test_told_from_turns_comparisons_around_and_takes_each_once() -> None:
    both = pool_differences([difference(0.3), difference(-0.2, encoder="teacher", against="student")])
    told = told_from("student", [*both, both[0].flipped()])
    assert [(item.against, item.difference) for item in told] == [("random", 0.3), ("teacher", 0.2)]
    assert all(isinstance(item, Difference) and item.ahead for item in told)


@pytest.mark.parametrize("missing", ["encoder", "suite", "target", "metric", "seed"])
def test_a_row_without_a_field_is_refused_by_name(missing: str) -> None:
    row = score(0.5)
    del row[missing]
    with pytest.raises(DataError, match=missing):
        pool_scores([row])


def test_two_rows_of_one_seed_for_one_thing_are_refused() -> None:
    with pytest.raises(DataError, match="put what differs into the suite"):
        pool_scores([score(0.5), score(0.6)])
    joined = score(0.5, seeds=3, interval=BOTH)
    with pytest.raises(DataError, match="action_mean"):
        pool_scores([joined, score(0.6, seed=4)])


def test_rows_joined_over_seeds_by_the_evaluation_are_taken_as_they_are() -> None:
    span = {"interval": BOTH, "lowest": 0.4, "highest": 0.7, "seeds": 3}
    row = SeedRow("student", "held_out", "task", "accuracy", value=0.55, low=0.3, high=0.8, **span)
    (pooled,) = pool_scores([asdict(row)])
    assert (pooled.value, pooled.low, pooled.high, pooled.seeds, pooled.spread) == (0.55, 0.3, 0.8, 3, BOTH)
    pair = SeedComparison(
        "held_out", "task", "accuracy", "student", "random", 0.2, 0.1, 0.3, **span, apart_in=3, apart=True
    )
    (told,) = pool_differences([asdict(pair)])
    assert told.ahead and told.seeds == 3 and told.spread == BOTH


def test_rows_of_the_evaluation_are_understood() -> None:
    row = EvaluationRow(
        "student", "held_out", "task", "accuracy", 0.5, 0.4, 0.6, 1, 100, 20, note="not converged in 9 steps"
    )
    (pooled,) = pool_scores([row.as_dict()])
    assert (pooled.encoder, pooled.value, pooled.note) == ("student", 0.5, "not converged in 9 steps")
    pair = Comparison("held_out", "task", "accuracy", "student", "random", -0.2, -0.3, -0.1, 1, True)
    (told,) = pool_differences([pair.as_dict()])
    assert told.behind


def test_notes_of_several_seeds_are_said_once_each() -> None:
    (pooled,) = pool_scores([score(0.5, 0, note="a"), score(0.5, 1, note="a"), score(0.5, 2, note="b")])
    assert pooled.note == "a; b"


def test_a_value_or_interval_that_is_missing_is_not_a_number_not_an_error() -> None:
    (pooled,) = pool_scores([score(0.5) | {"value": None, "low": None, "high": None}])
    assert math.isnan(pooled.value) and math.isnan(pooled.low) and math.isnan(pooled.high)


def test_one_seed_without_an_interval_leaves_none_for_all() -> None:
    (pooled,) = pool_scores([score(0.5, 0), score(0.5, 1, low=None, high=None)])
    assert pooled.value == 0.5 and math.isnan(pooled.low) and math.isnan(pooled.high)


def test_known_encoders_come_first_and_others_as_they_came() -> None:
    names = ["zebra", "constant", "student", "apple", "student", "random"]
    assert in_report_order(names) == ["student", "random", "constant", "zebra", "apple"]


def test_suites_keep_the_order_of_their_first_row() -> None:
    assert suites_of([score(0.1, suite="b"), score(0.1, suite="a"), score(0.2, suite="b")]) == ["b", "a"]


def test_names_are_written_for_people() -> None:
    assert encoder_label("random") == "random init" and encoder_label("my_encoder") == "my_encoder"
    assert target_label("hand_velocity") == "hand velocity"
    assert metric_label("r2") == "R²" and metric_label("relative_accuracy") == "relative accuracy"


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.6881, False, "0.688"),
        (-0.83, False, "−0.830"),
        (0.058, True, "+0.058"),
        (0.0, True, "0.000"),
        (-0.0001, True, "0.000"),
        (-123.456, False, "−123.5"),
        (98765.4, False, "98,765"),
        (math.nan, True, "–"),
        (-math.inf, False, "–"),
    ],
)
def test_figures_are_written_short_and_with_a_true_minus(value: float, signed: bool, text: str) -> None:
    assert number(value, signed) == text


def test_an_interval_is_written_in_brackets_or_not_at_all() -> None:
    assert interval(-0.1, 0.25, signed=True) == "[−0.100, +0.250]"
    assert interval(math.nan, 0.25) == ""


@given(st.floats(-9, 9, allow_nan=False))
def test_a_written_figure_is_within_half_a_thousandth(value: float) -> None:
    assert abs(float(number(value).replace("−", "-")) - value) <= 0.000501
