"""`eval --suite classification` on films as published: every layout and kind of probe, as a command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.evaluation import attentive, attentive_training
from salt_vla.evaluation.attentive_training import Recipe

ENCODER = "micro=random:vit_micro_patch16_32:7"
SIZES: dict[str, dict[str, object]] = {
    "ssv2": {
        "films": 13,
        "lists": {"train": range(1, 10), "validation": range(10, 13), "test": range(13, 14)},
    },
    "ucf101": {"groups": 4, "films": 1},
    "kinetics": {"classes": 6, "films": 2},
}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads learn for two steps: whether they learn well is not asked here."""
    for module in (attentive, attentive_training):
        monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(Recipe, "steps", lambda self, clips: 2)
    monkeypatch.setattr(
        Recipe, "grid", property(lambda self: [*zip(self.rates[:2], self.decays[:2], strict=True)])
    )


@pytest.fixture
def classify(salt: Any, write_layout: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """`classify(layout, *arguments)`: the layout written and indexed, and what `eval` answers."""

    def call(layout: str, *arguments: object) -> Any:
        table = tmp_path / f"{layout}.parquet"
        data = write_layout(layout, tmp_path / "data", **SIZES[layout])
        cutting = ("--num-frames", 16, "--frame-stride", 1, "--clips-per-video", 1)
        salt.ok("data", "index", data, "--out", table, *cutting)
        view = ("--data", table, "--frame-stride", 1)
        return salt("eval", ENCODER, "--suite", "classification", *view, *arguments)

    return call


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("layout", "probe", "films", "top5"),
    [
        ("ssv2", "attentive-small", 3, False),
        ("ucf101", "attentive", 4, False),
        ("kinetics", "linear", 6, True),
        ("kinetics", "knn", 6, True),
    ],
)
def test_films_as_published_are_classified_by_every_probe(
    classify: Callable[..., Any], tmp_path: Path, layout: str, probe: str, films: int, top5: bool
) -> None:
    answer = classify(layout, "--probe", probe, "--poolings", "mean", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pooling = "tokens" if probe.startswith("attentive") else "mean"
    assert {row["suite"] for row in rows} == {f"classification/{pooling}"}
    assert {row["encoder"] for row in rows} == {"micro", "random", "pixels", "constant"}
    assert {row["target"] for row in rows} == {"label", "label_top5"} - (set() if top5 else {"label_top5"})
    assert {int(row["clips"]) for row in rows} == {films}, "films are counted"
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1
        assert row["probe"] == probe and row["causal"] in ("False", "false", "")
        if probe.startswith("attentive") and row["encoder"] != "constant":
            assert "rate" in row["note"] and "of 2 rounds" in row["note"]


@pytest.mark.usefixtures("few_steps")
def test_the_reference_protocol_is_said_in_the_table(classify: Callable[..., Any], tmp_path: Path) -> None:
    answer = classify(
        "ucf101", "--probe", "attentive-small", "--protocol", "vjepa2-max", "--out", tmp_path / "out"
    )
    assert answer.code == 0, answer.err
    assert "vjepa2-max" in answer.out and "vjepa2-max" in (tmp_path / "out" / "table.html").read_text()


def test_tokens_are_asked_for_by_the_probe_and_not_as_a_pooling(classify: Callable[..., Any]) -> None:
    assert "unknown pooling 'tokens'" in classify("ucf101", "--poolings", "tokens").sentence
