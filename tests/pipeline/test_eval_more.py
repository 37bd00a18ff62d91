"""`eval --fractions` and `--diagnose` as they are called: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ENCODERS = {"teacher", "random", "pixels"}


def test_figures_by_share_of_the_labels_are_those_of_eval(workshop: Any, tmp_path: Path) -> None:
    asked = ("eval", "teacher", "--data", workshop.table, "--poolings", "mean")
    ran = workshop.salt.ok(*asked, "--fractions", 0.5, 1, "--against", "teacher", "--out", tmp_path, "--json")
    rows = json.loads(ran.out)
    whole = [{k: v for k, v in row.items() if k != "fraction"} for row in rows if row["fraction"] == 1]
    assert whole == json.loads(workshop.salt.ok(*asked, "--json").out)
    assert {row["encoder"] for row in rows if row["fraction"] == 0.5} == ENCODERS | {"constant"}
    held = json.loads((tmp_path / "curve.json").read_text())
    assert held["rows"] == rows and held["about"]["fractions"] == [0.5, 1.0]
    pairs = {(pair["fraction"], pair["encoder"], pair["against"]) for pair in held["comparisons"]}
    assert {(share, "teacher", "random") for share in (0.5, 1)} <= pairs
    assert (tmp_path / "curve.html").is_file() and list(tmp_path.glob("curve-*-mean.png"))


def test_a_diagnosis_compares_encoders_and_their_blocks(workshop: Any, tmp_path: Path) -> None:
    asked = ("eval", "teacher", "--data", workshop.table, "--diagnose", "--out", tmp_path)
    printed = workshop.salt.ok(*asked).out
    assert "effective rank" in printed and "teacher@1" in printed
    said = json.loads((tmp_path / "diagnosis.json").read_text())
    assert {row["encoder"] for row in said["encoders"]} == ENCODERS
    assert {row["encoder"] for row in said["encoders"] if row["flops_a_clip"]} == ENCODERS - {"pixels"}
    layers = said["layers"]
    assert {layer.partition("@")[0] for layer in layers} == {"teacher", "random"}
    assert len(said["layer_cka"]) == len(layers) * (len(layers) - 1) / 2
    # The last block with its norm is the encoder itself.
    (own,) = [p["cka"] for p in said["cka"] if {p["encoder"], p["other"]} == {"teacher", "random"}]
    last = {max(layer for layer in layers if layer.startswith(name)) for name in ("teacher@", "random@")}
    (of_last,) = [p["cka"] for p in said["layer_cka"] if {p["encoder"], p["other"]} == last]
    assert of_last == pytest.approx(own)
    assert {path.name for path in tmp_path.glob("*.png")} == {"spectrum.png", "cka.png"}


def test_what_such_a_call_would_not_heed_is_a_sentence(workshop: Any, tmp_path: Path) -> None:
    asked = ("eval", "teacher", "--data", workshop.table)
    for more, named in (
        (("--diagnose", "--suite", "dense"), "--diagnose takes no --suite"),
        (("--fractions", 0.5, "--pictures", tmp_path), "--fractions takes no --pictures"),
        (("--out", "/dev/null"), "no folder to write into"),
    ):
        assert named in workshop.salt(*asked, *more).sentence
