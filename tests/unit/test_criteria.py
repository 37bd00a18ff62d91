"""What would count, as a condition: read as it is written, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from salt_vla.config import Criterion, Recipe, TrainConfig, parse_criterion
from salt_vla.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "field", "sign", "number", "of_parent"),
    [
        ("val.r2_position_mean > 0", "val", "r2_position_mean", ">", 0.0, False),
        ("val.r2_position_mean > parent", "val", "r2_position_mean", ">", 0.0, True),
        ("  val.loss   <= 0.5 ", "val", "loss", "<=", 0.5, False),
        ("probe.action >= parent + 0.02", "probe", "action", ">=", 0.02, True),
        ("probe.action >= parent - .02", "probe", "action", ">=", -0.02, True),
        ("train.loss < -1e-3", "train", "loss", "<", -1e-3, False),
    ],
)
def test_a_condition_is_read_as_written(text, kind, field, sign, number, of_parent):
    assert parse_criterion(text) == Criterion(kind, field, sign, number, of_parent)


@pytest.mark.parametrize(
    "text",
    [
        *("", "better", "val.loss", "val.loss <", "val.loss = 1", "loss < 1", "val.loss < grandparent"),
        *("val.loss < parent + x", "val.loss < parent * 2", "val.loss < 1 2", "val.loss < 1e999"),
        *("val.loss < parent +", "val.loss < nan", "__import__('os') > 1", "val.a.b > 1"),
    ],
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ConfigError, match="criterion"):
        parse_criterion(text)


def test_a_condition_may_ask_for_the_same_steps():
    read = parse_criterion("val.loss < parent - 0.1 at the same steps")
    assert read == Criterion("val", "loss", "<", -0.1, True, same_steps=True)
    assert not parse_criterion("val.loss < parent").same_steps
    with pytest.raises(ConfigError, match="criterion"):
        parse_criterion("val.loss < 1 at the same steps")


def test_a_condition_holds_or_not():
    above = parse_criterion("val.r2 > parent + 0.1")
    assert above.holds(0.51, parent=0.4) and not above.holds(0.49, parent=0.4)
    assert not parse_criterion("val.r2 > 0").holds(0.0)
    assert parse_criterion("val.r2 >= 0").holds(0.0)
    assert parse_criterion("val.loss < 1").holds(0.5, parent=-7.0), "a number is not moved by a parent"
    assert not parse_criterion("val.r2 > 0").holds(float("nan"))


def test_a_recipe_with_no_such_condition_cannot_be_made():
    with pytest.raises(ConfigError, match="criterion 'R² is good'"):
        Recipe("a", "b", TrainConfig(), criterion="R² is good")
