"""Every objective is a run like any other: begun, interrupted, resumed to the same bits, refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.registry import LOSSES

Command = Callable[..., list[object]]
PAGE = (Path(__file__).parents[2] / "docs" / "objective.md").read_text()
MOVING = {
    "target__provider": "ema",
    "target__momentum": "0.9,1.0",
    "encoder__drop_path": 0.2,
    "encoder__depth": 2,
}
FULL = {
    "objective__loss": "smooth_l1",
    "objective__statistics": "running",
    "objective__variance_weight": 0.1,
    "objective__covariance_weight": 0.1,
    "objective__regularised": "both",
    "objective__contrastive_weight": 0.1,
    "grad_accum_steps": 2,
}


@pytest.mark.parametrize("settings", [MOVING, FULL], ids=["moving average", "every term"])
def test_a_run_in_two_parts_is_bitwise_the_run_in_one(
    salt: Any, student: Command, curve: Any, weights: Any, settings: dict[str, Any]
) -> None:
    salt.ok(*student("whole", "--max-steps", 8, **settings))
    salt.ok(*student("parts", "--max-steps", 4, **settings))
    salt.ok(*student("parts", "--max-steps", 8, **settings))
    whole, parts = salt.at("whole"), salt.at("parts")
    assert parts.status().resumed_from == [4]
    assert curve(whole) == curve(parts) and len(curve(whole)) == 10
    assert weights(whole) == weights(parts)
    assert "task.safetensors" in weights(whole)


@pytest.mark.parametrize(("before", "after"), [("measured", "running"), ("running", "measured")])
def test_statistics_cannot_change_on_the_way(salt: Any, student: Command, before: str, after: str) -> None:
    """Even where somebody allows it: the checkpoint holds the others."""
    salt.ok(*student("run", "--max-steps", 2, objective__statistics=before))
    allowed = ("--allow-change", "objective.statistics")
    sentence = salt(*student("run", *allowed, "--max-steps", 4, objective__statistics=after)).sentence
    assert "has other statistics of its targets than objective.statistics" in sentence
    salt.ok(*student("run", "--max-steps", 4, objective__statistics=before))


def test_every_term_has_its_column(salt: Any, student: Command) -> None:
    salt.ok(*student("run", "--max-steps", 2, **FULL))
    row = salt.at("run").metrics("train")[-1]
    parts = row["regression"] + 0.1 * row["contrastive"]
    for where in ("", "_encoder"):
        parts += 0.1 * row[f"variance{where}"] + 0.1 * row[f"covariance{where}"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert row["contrastive_chance"] > 3
    assert {"prediction_std", "target_std", "prediction_rank", "encoder_rank"} <= row.keys()
    table = PAGE.partition("## All columns")[2]
    explained = {
        name for line in table.splitlines() if line.startswith("| `") for name in line.split("`")[1::2]
    }
    for line in salt.at("run").metrics():
        assert line.keys() <= explained, line.keys() - explained


def test_every_regression_is_in_the_table_of_the_docs() -> None:
    for name in LOSSES:
        assert f"\n| `{name}` |" in PAGE


def test_an_unknown_loss_is_refused_before_anything_is_written(salt: Any, student: Command) -> None:
    sentence = salt(*student("run", objective__loss="cosin")).sentence
    assert (
        sentence == "objective.loss 'cosin' is unknown; did you mean cosine? known: cosine, power, smooth_l1"
    )
    assert salt.files() == []
