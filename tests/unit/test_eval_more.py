"""Tables of fewer labels and of what features are like, as `eval` prints them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from salt_vla.cli.evaluate_more import print_curve, print_diagnosis, require_only
from salt_vla.errors import UserError
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.eval_more import _pairs, label_curve


def test_each_share_is_taken_once() -> None:
    with pytest.raises(UserError, match="each share once"):
        label_curve(["a"], ["probes"], "metaworld-mini", EvalSettings(), None, [0.1, 0.1])


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(0, 1\]"):
        label_curve(["a"], ["probes"], "metaworld-mini", EvalSettings(), None, [0.1, 1.5])


@pytest.mark.parametrize("prints", [print_curve, print_diagnosis])
def test_an_encoder_that_there_is_none_of_is_named(prints: Any) -> None:
    shares: tuple[Any, ...] = ([1.0],) if prints is print_curve else ()
    suites: tuple[Any, ...] = (["probes"],) if prints is print_curve else ()
    with pytest.raises(UserError, match="no_such_run"):
        prints(["no_such_run"], *suites, "metaworld-mini", EvalSettings(), None, *shares)


@pytest.mark.parametrize(
    ("option", "settings", "others", "named"),
    [
        ("--diagnose", EvalSettings(probe="knn"), {"--suite": True}, "no --probe and no --suite"),
        ("--diagnose", EvalSettings(), {"--fractions": (0.1,)}, "no --fractions"),
        ("--fractions", EvalSettings(fraction=0.5), {}, "no --fraction;"),
        ("--fractions", EvalSettings(), {"--pictures": "there"}, "no --pictures"),
    ],
)
def test_what_such_a_call_does_not_look_at_is_refused(
    option: str, settings: EvalSettings, others: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=f"{option} takes {named}"):
        require_only(option, settings, others)
    require_only(option, EvalSettings(seed=3, device="cpu"), {"--suite": False})


def test_an_encoder_that_has_collapsed_is_named_and_the_others_are_compared() -> None:
    random = np.random.default_rng(0)
    features = {
        "a": random.normal(size=(8, 3)),
        "flat": np.full((8, 3), 3.3),
        "b": random.normal(size=(8, 5)),
    }
    notes: list[str] = []
    (pair,) = _pairs(features, notes)
    assert (pair["encoder"], pair["other"]) == ("a", "b")
    assert notes == ["flat gives every clip the same features: it is like nothing, and has no CKA"]
