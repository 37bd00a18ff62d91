"""What a sweep tries: read as written, refused when it cannot be, the same points after the same results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_vla.config import TrainConfig, override
from salt_vla.errors import ConfigError
from salt_vla.jobs.sweep_points import Point, num_points, propose
from salt_vla.jobs.sweep_spec import Axis, SweepSpec, keys_of, read_assignments, split_values
from salt_vla.recipes import get_recipe
from salt_vla.rundir import require_name

CONFIG = get_recipe("demo_student").config


def spec(*assignments: str, **more: Any) -> SweepSpec:
    return SweepSpec("s", "demo_student", assignments, **more)


def axes_of(*assignments: str, **more: Any) -> list[Axis]:
    return read_assignments(spec(*assignments, **more), CONFIG)[0]


def all_points(asked: SweepSpec, results: Sequence[float | None] | None = None) -> list[Point]:
    """Every point, each proposed after those before it with the results so far (by its number)."""
    axes = read_assignments(asked, CONFIG)[0]
    points: list[Point] = []
    while (point := propose(asked, axes, points, (results or [0.0] * 99)[: len(points)])) is not None:
        points.append(point)
    return points


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ('"a,b",c', ["a,b", "c"]),
        ('[{"num_blocks": 8, "x": [1, 2]}],[]', ['[{"num_blocks": 8, "x": [1, 2]}]', "[]"]),
        ('["[",2],3', ['["[",2]', "3"]),
        ("", [""]),
        (",", ["", ""]),
    ],
)
def test_commas_separate_values_but_not_within_one(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["[1,2", '"a', "1]", "{"])
def test_a_value_that_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not closed"):
        split_values(text)


@given(st.lists(st.text(alphabet="abc019._-", min_size=1), min_size=1))
def test_values_without_commas_survive_joining(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


def test_one_value_holds_for_all_and_several_make_an_axis() -> None:
    axes, fixed = read_assignments(spec("steps=10", "optimizer.lr=1e-4,3e-4", "data.table=x"), CONFIG)
    assert fixed == ("steps=10", "data.table=x")
    assert [(axis.field, axis.values) for axis in axes] == [("optimizer.lr", ("1e-4", "3e-4"))]


@pytest.mark.parametrize(
    ("assignments", "more", "message"),
    [
        (["optimizer.lr"], {}, "not of the form field=value"),
        (["steps=10"], {}, "nothing varies"),
        ([], {}, "nothing varies"),
        (["optimizer.lr=1,2", "optimizer.lr=3,4"], {}, "optimizer.lr is given twice"),
        (["optimizer.lr=1,2,1"], {}, "optimizer.lr has a value twice"),
        (["optimizer.lr=1e-3,0.001"], {}, "optimizer.lr has a value twice, '0.001'"),
        (["optimizer.lr=1,1.0"], {}, "has a value twice"),
        (["optimizer.betas=[0.9,0.95],[0.90, 0.95]"], {}, "has a value twice"),
        (["encoder.tanh_gelu=true,True"], {}, "has a value twice"),
        (["optimizer.lr=1e-4..1e-2"], {}, "a range, and a grid needs values"),
        (["optimizer.lr=1e-2..1e-4"], {"method": "random", "trials": 2}, "is no range"),
        (["optimizer.lr=log:0..1"], {"method": "random", "trials": 2}, "is no range"),
        (["masks.ratio=0.5..1.5"], {"method": "random", "trials": 2}, r"masks.ratio must lie in \(0, 1\)"),
        (["predictor.depth=1.5..3"], {"method": "random", "trials": 2}, "predictor.depth must be int"),
        (["steps=many", "seed=1,2"], {}, "steps must be int"),
        (["step=10", "seed=1,2"], {}, "did you mean steps"),
    ],
)
def test_what_cannot_be_tried_is_refused(assignments: list[str], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        axes_of(*assignments, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metric": "r2"}, "KIND.FIELD"),
        ({"method": "random"}, "--random must be at least 1 point"),
        ({"method": "optuna", "trials": -1}, "--optuna must be at least 1 point"),
        ({"max_steps": -1}, "--max-steps"),
        ({"method": "optuna", "trials": 2, "seed": -1}, "--seed must lie in 0 to 4,294,967,295"),
        ({"method": "optuna", "trials": 2, "seed": 2**32}, "--seed must lie in"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec("seed=1,2", **more)


def test_a_sweep_that_leaves_its_runs_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 84 characters; give a --name of at most 83"):
        SweepSpec("s" * 84, "demo_student", ("seed=1,2",))
    long = SweepSpec("s" * 83, "demo_student", ("seed=1,2", "data.table=a,b"))
    require_name(all_points(long)[0].run, "run")


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("masks.blocks.0.spatial_scale=0.1..0.9", "spatial_scale"),
        ("optimizer.betas.1=0.9..0.99", "betas.1"),
        ("masks.blocks.1.num_blocks=1..4", "num_blocks"),
    ],
)
def test_a_place_of_a_list_takes_a_range(assignment: str, key: str) -> None:
    axes = axes_of(assignment, **RANDOM)
    assert not axes[0].values and axes[0].low < axes[0].high
    assert list(keys_of(axes).values()) == [key]
    override(CONFIG, all_points(spec(assignment, **RANDOM))[0].assignments(axes))


def test_a_value_that_nothing_can_read_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"config\.steps must be int"):
        override(CONFIG, ["steps=" + "[" * 50_000])


@pytest.mark.parametrize("method", ["random", "optuna"])
@pytest.mark.parametrize(
    "assignment",
    [
        "optimizer.average=0.9999..0.99999",
        "optimizer.lr=1.23456e-4..1.23457e-4",
        "optimizer.lr=log:1.23456e-4..1.23457e-4",
        "masks.max_targets=12345..12349",
    ],
)
def test_narrow_ranges_have_many_points_all_within(method: str, assignment: str) -> None:
    pytest.importorskip("optuna")
    asked = spec(assignment, method=method, trials=8)
    axis = axes_of(assignment, method=method, trials=8)[0]
    points = all_points(asked)
    assert all(axis.low <= float(point.values[0]) <= axis.high for point in points)
    assert len({point.values for point in points}) >= (3 if axis.whole else 7)


def test_text_with_dots_is_no_range() -> None:
    assert axes_of("data.table=1..2,3", "seed=1,2")[0].values == ("1..2", "3")


def test_a_grid_is_every_point_once_the_last_field_fastest() -> None:
    points = all_points(spec("optimizer.lr=1e-4,3e-4,1e-3", "masks.ratio=0.75,0.9"))
    assert [point.values for point in points] == [
        *(("1e-4", "0.75"), ("1e-4", "0.9"), ("3e-4", "0.75"), ("3e-4", "0.9"), ("1e-3", "0.75")),
        ("1e-3", "0.9"),
    ]
    assert [point.run for point in points][:2] == ["s-lr1e-4-ratio0.75", "s-lr1e-4-ratio0.9"]
    assert num_points(spec("seed=1,2", "steps=1,2,3"), axes_of("seed=1,2", "steps=1,2,3")) == 6


def test_runs_are_named_by_the_shortest_ending_that_says_which_field() -> None:
    axes = axes_of("encoder.depth=1,2", "predictor.depth=1,2", "optimizer.lr=1,2", "seed=1,2")
    assert list(keys_of(axes).values()) == ["encoder.depth", "predictor.depth", "lr", "seed"]
    axes = axes_of("optimizer.weight_decay=0,1", "optimizer.weight_decay_final=0,1")
    assert list(keys_of(axes).values()) == ["weight_decay", "weight_decay_final"]


@pytest.mark.parametrize(
    "assignment",
    [
        "data.table=a b,a_b",
        "data.table=a/b,a_b,a:b",
        "target.source=,x",
        "data.table=é,è,ü",
        f"data.table={'x' * 200},{'y' * 200}",
    ],
)
def test_every_point_has_a_name_of_its_own_that_a_folder_may_have(assignment: str) -> None:
    names = [point.run for point in all_points(spec(assignment))]
    assert len(set(names)) == len(names) >= 2
    for name in names:
        require_name(name, "run")


RANDOM = {"method": "random", "trials": 12}


def test_random_points_are_a_function_of_seed_and_number() -> None:
    asked = ("optimizer.lr=log:1e-4..1e-2", "predictor.depth=1..4", "masks.ratio=0.75,0.9")
    points = all_points(spec(*asked, **RANDOM))
    assert points == all_points(spec(*asked, **RANDOM), results=[1.0] * 12), "results change nothing"
    assert points[:5] == all_points(spec(*asked, **(RANDOM | {"trials": 5}))), "more points change none"
    assert points != all_points(spec(*asked, **RANDOM, seed=1))
    assert len({point.values for point in points}) == 12


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_points_lie_in_their_ranges_and_are_configurations(method: str) -> None:
    pytest.importorskip("optuna")
    asked = spec(
        *("optimizer.lr=log:1.00004e-4..1e-2", "predictor.depth=1..4", "masks.strategy=tube,random"),
        method=method,
        trials=12,
    )
    points, axes = all_points(asked), read_assignments(asked, CONFIG)[0]
    assert len(points) == 12
    for point in points:
        config: TrainConfig = override(CONFIG, point.assignments(axes))
        assert 1.00004e-4 <= config.optimizer.lr <= 1e-2
        assert 1 <= config.predictor.depth <= 4
        assert config.masks.strategy in ("tube", "random")
        assert re.fullmatch(r"s-lr[\de.-]+-depth[1-4]-strategy(tube|random)", point.run)
    assert len({point.values[1] for point in points}) > 1


def test_a_name_says_the_very_value_of_a_range() -> None:
    asked = spec("optimizer.lr=1e-4..1e-2", **RANDOM)
    for point in all_points(asked):
        assert point.run == f"s-lr{point.values[0]}"
        assert (
            float(point.values[0])
            == override(CONFIG, point.assignments(axes_of("optimizer.lr=1,2"))).optimizer.lr
        )


def test_random_points_end_where_all_have_been_tried() -> None:
    assert len(all_points(spec("seed=1,2,3", **RANDOM))) == 3


def test_optuna_goes_on_after_a_kill_as_if_there_had_been_none() -> None:
    pytest.importorskip("optuna")
    asked = spec("optimizer.lr=log:1e-4..1e-2", "masks.ratio=0.75,0.9", method="optuna", trials=16)
    results = [None if number == 3 else -abs(number - 7.0) for number in range(16)]
    points, axes = all_points(asked, results), read_assignments(asked, CONFIG)[0]
    again = propose(asked, axes, points[:13], results[:13])
    assert again == points[13]


@pytest.mark.parametrize(("metric", "best"), [("val.r2_position_mean", "1"), ("val.loss", "0")])
def test_optuna_learns_which_way_is_better(metric: str, best: str) -> None:
    pytest.importorskip("optuna")
    asked = spec("masks.max_targets=0..100", method="optuna", trials=30, metric=metric)
    axes, points = read_assignments(asked, CONFIG)[0], []
    while (point := propose(asked, axes, points, [float(each.values[0]) for each in points])) is not None:
        points.append(point)
    late = [int(point.values[0]) for point in points[20:]]
    assert (sum(late) / 10 > 60) if best == "1" else (sum(late) / 10 < 40)
