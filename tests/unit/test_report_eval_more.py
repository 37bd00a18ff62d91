"""Curves by share of the labels, and what features are like: every form, figures that can be opened."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from salt_vla.errors import ConfigError
from salt_vla.reports.diagnosis import Diagnosis, diagnosis_tables, likeness_figure, write_diagnosis
from salt_vla.reports.evaluation import EvaluationTables, write_tables
from salt_vla.reports.forms import require_folder
from salt_vla.reports.label_curve import LabelCurve, curve_figure, curve_tables, write_curve

SUITE, SHARES = "front/grid", (0.01, 0.1, 1.0)
VALUES = {"student": 0.7, "teacher": 0.72, "random": 0.6, "pixels": 0.75, "constant": -0.01}


def curve(targets: tuple[str, ...] = ("hand_position", "task", "action_mean")) -> LabelCurve:
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for share in SHARES:
        for target in targets:
            where = {"fraction": share, "suite": SUITE, "target": target, "metric": "r2", "seed": 0}
            for encoder, best in VALUES.items():
                value = best * (1 + np.log10(share) / 3)
                bounds = {"value": value, "low": value - 0.05, "high": value + 0.04}
                rows.append(where | {"encoder": encoder} | bounds)
            for against, difference in (("random", 0.1 * share), ("teacher", -0.02)):
                pair = {"encoder": "student", "against": against, "difference": difference}
                pair |= {"low": difference - 0.03, "high": difference + 0.03, "apart": difference > 0.03}
                pairs.append(where | pair | {"p": 0.01, "p_holm": 0.02})
    return LabelCurve(["student"], rows, pairs, ["1 %: 3 windows left out"], {"data": "clips", "seed": 0})


def diagnosis() -> Diagnosis:
    row = {"dims": 128, "effective_rank": 9.5, "parameters": 8e5, "flops_a_clip": 2.4e8, "p50": 0.01}
    row |= {"p95": 0.02, "frames_per_second": 180.0, "peak_memory_gb": 0.7}
    names = ("student", "random", "pixels")
    spectra = {name: ((0.5 + place / 8) ** np.arange(1, 60)).tolist() for place, name in enumerate(names)}
    pairs = [{"encoder": a, "other": b, "cka": 0.1 * len(a + b) / 2} for a, b in pairwise(names)]
    pairs.append({"encoder": "student", "other": "pixels", "cka": -0.02})
    layers = [f"{name}@{block}" for name in names[:2] for block in (1, 2, 4)]
    blocks = [
        {"encoder": a, "other": b, "cka": 0.9 - 0.1 * i}
        for i, a in enumerate(layers)
        for b in layers[i + 1 :]
    ]
    encoders = [{"encoder": name} | row | {"spectrum": spectra[name]} for name in names]
    return Diagnosis(240, 1016, encoders, pairs, layers, blocks, ["no random init stands beside: why"])


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 5, "not blank"
        return picture.size


def test_every_target_has_a_table_of_encoders_and_differences_by_share() -> None:
    (section,) = curve_tables(curve())
    assert section.heading == SUITE and len(section.tables) == 3
    table = section.tables[1]
    assert table.columns == ("1 %", "10 %", "100 %") and "task" in table.title
    names = [name for name, _ in table.names]
    assert names == ["student", "teacher", "random init", "pixels", "constant",
                     "student − random init", "student − teacher"]  # fmt: skip
    assert [cell.figure for cell in table.cells[0]] == ["0.233", "0.467", "0.700"]
    assert table.cells[5][2].text == "▲▲ +0.100 [+0.070, +0.130]" and not table.cells[5][0].arrow


def test_an_encoder_that_one_share_lacks_has_a_dash_there() -> None:
    whole = curve(("task",))
    rows = [row for row in whole.rows if not (row["encoder"] == "pixels" and row["fraction"] == 0.1)]
    (section,) = curve_tables(LabelCurve(["student"], rows))
    assert [cell.figure for cell in section.tables[0].cells[3]] == ["0.250", "–", "0.750"]


def test_curves_are_drawn_and_written_in_every_form(tmp_path: Path) -> None:
    files = {path.name for path in write_curve(curve(), tmp_path)}
    texts = {"curve.json", "curve.csv", "curve-comparisons.csv", "curve.md", "curve.tex", "curve.html"}
    assert files == texts | {"curve-front-grid.png"} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "curve.json").read_text())["rows"] == list(curve().rows)
    with (tmp_path / "curve.csv").open() as file:
        assert [float(line["fraction"]) for line in csv.DictReader(file)][::15] == list(SHARES)
    for name in ("curve.md", "curve.tex", "curve.html"):
        assert "student − random init" in (tmp_path / name).read_text().replace("$-$", "−"), name
    assert "3 windows left out" in (tmp_path / "curve.html").read_text()
    wide, _ = size((tmp_path / "curve-front-grid.png").read_bytes())
    assert wide > 1.9 * size(curve_figure(curve(("task",)).rows, SUITE, dark=True))[0]


def test_what_features_are_like_is_written_in_every_form(tmp_path: Path) -> None:
    files = {path.name for path in write_diagnosis(diagnosis(), tmp_path)}
    texts = {"diagnosis.json", "diagnosis.md", "diagnosis.tex", "diagnosis.html", "encoders.csv", "cka.csv"}
    assert files == texts | {"spectrum.png", "cka.png"} == {path.name for path in tmp_path.iterdir()}
    with (tmp_path / "cka.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["of"] for line in lines] == ["encoders"] * 3 + ["blocks"] * 15
    for name in ("diagnosis.md", "diagnosis.tex", "diagnosis.html"):
        text = (tmp_path / name).read_text()
        assert "240 held-out clips of 1,016, evenly spread" in text and "student@4" in text, name
    for name in ("spectrum.png", "cka.png"):
        size((tmp_path / name).read_bytes())


def test_a_matrix_of_likeness_is_symmetric_with_ones_across() -> None:
    speed, alike = diagnosis_tables(diagnosis())[0].tables
    figures = [[cell.figure for cell in line] for line in alike.cells]
    assert figures == [list(column) for column in zip(*figures, strict=True)]
    assert [figures[i][i] for i in range(3)] == ["1.00"] * 3 and figures[0][2] == "−0.02"
    assert [cell.text for cell in speed.cells[0][:4]] == ["9.5", "128", "0.80", "0.24"]


def test_an_encoder_that_is_like_nothing_has_dashes(tmp_path: Path) -> None:
    whole = diagnosis()
    pairs = [pair for pair in whole.cka if "random" not in (pair["encoder"], pair["other"])]
    found = Diagnosis(9, 9, whole.encoders, pairs)
    alike = diagnosis_tables(found)[0].tables[1]
    assert [cell.figure for cell in alike.cells[1]] == ["–", "1.00", "–"]
    write_diagnosis(found, tmp_path)
    size((tmp_path / "cka.png").read_bytes())


def test_a_call_that_scored_nothing_still_writes_its_files(tmp_path: Path) -> None:
    files = write_tables(EvaluationTables(["student"], [], []), tmp_path)
    assert "student; every figure" in (tmp_path / "table.html").read_text() and len(files) == 6


def test_a_large_matrix_is_drawn_without_figures_in_it() -> None:
    names = [f"student@{block}" for block in range(20)]
    pairs = [{"encoder": a, "other": b, "cka": 0.5} for a in names for b in names if a < b]
    assert size(likeness_figure(names, pairs))[0] > size(likeness_figure(names[:3], pairs[:2]))[0]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="no folder to write into"):
        require_folder(file / below)
    require_folder(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()


def test_a_curve_says_what_its_marks_stand_for_and_how_it_was_read() -> None:
    found = curve(("task",))
    starred = [
        row | {"probe": "linear", "causal": False}
        | ({"note": "strongest penalty"} if row["encoder"] == "student" and row["fraction"] == 0.01 else {})
        for row in found.rows
    ]  # fmt: skip
    ((table,),) = (
        section.tables for section in curve_tables(LabelCurve(found.names, starred, found.comparisons))
    )
    assert "[linear probe; not causal: frames after the target's moment are seen]" in table.title
    assert table.cells[0][0].figure.endswith("*") and "* strongest penalty (student, 1 %)." in table.note
    assert "▲▲, ▼▼: and p < 0.05, corrected (Holm)" in table.note and "unmarked" in table.note
