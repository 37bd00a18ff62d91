"""A comparison in tables: only those that have something to say, each with what a reader must know."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.config import BlockSpec, MaskConfig, OptimizerConfig, TargetConfig, TrainConfig
from salt_vla.operations.compare import compare
from salt_vla.operations.compare_tables import TextTable, label, tables_of
from salt_vla.rundir import RunDirectory

WriteRun = Callable[..., RunDirectory]
Rows = Callable[..., list[dict[str, Any]]]
CONFIG = TrainConfig(steps=100, batch_size=4)
FASTER = replace(CONFIG, optimizer=OptimizerConfig(lr=9e-4))


def _tables(*names: str, column: str = "val.r2_position_mean") -> dict[str, TextTable]:
    return {table.title: table for table in tables_of(compare(names, column))}


def test_two_runs_that_are_the_same_have_no_table_of_settings(write_run: WriteRun) -> None:
    write_run("a")
    write_run("b")
    titles = list(_tables("a", "b"))
    assert titles == [
        "What was run",
        "Held-out R² over place means",
        "Held-out loss",
        "Training loss",
        "Held-out R² over place means at equal steps",
        "Held-out R² over place means at equal clips",
        "Where seeds repeat: last held-out R² over place means",
    ]


def test_what_was_run_says_how_far_it_came_and_at_what_cost(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("a", rows_of(60), seconds=7200.0)
    (run.path / "cost.json").write_text(
        json.dumps({"clips_a_step": 4, "flops_a_step": 1e14, "clips_an_epoch": 80})
    )
    (run.path / "verdict.json").write_text('{"verdict": "refuted", "reason": "because"}')
    write_run("b", state="killed", exit_reason="killed by SIGKILL")
    rows = {row[0]: row[1:] for row in _tables("a", "b")["What was run"].rows}
    assert rows["a"] == ("finished", "60 of 100", "240", "6", "2 h", "", "refuted")
    assert rows["b"][0] == "killed: killed by SIGKILL"


def test_figures_have_their_steps_and_epochs(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("a", rows_of(100))
    (run.path / "cost.json").write_text(
        json.dumps({"clips_a_step": 4, "flops_a_step": 1e14, "clips_an_epoch": 200})
    )
    write_run("b", rows_of(100, level=0.1))
    first, second = _tables("a", "b")["Training loss"].rows
    assert first == ("a", "0.5", "0.5 @ 100", "0.725", "0.85, 0.6")
    assert second == ("b", "0.6", "0.6 @ 100", "0.825", "")


def test_settings_of_any_kind_are_text(write_run: WriteRun) -> None:
    blocks = (BlockSpec(num_blocks=2),)
    write_run("a", config=CONFIG)
    write_run("b", config=replace(CONFIG, masks=MaskConfig(blocks=blocks), start_from="weights"))
    rows = {row[0]: row[1:] for row in _tables("a", "b")["Settings that differ"].rows}
    assert rows["start_from"] == ("", "weights")
    assert json.loads(rows["masks.blocks"][1])[0]["num_blocks"] == 2


def test_what_must_not_be_ranked_is_said_where_it_is_shown(write_run: WriteRun) -> None:
    write_run("a", config=CONFIG)
    write_run("b", config=replace(CONFIG, target=TargetConfig(provider="pixels")))
    found = _tables("a", "b")
    for title, table in found.items():
        is_of_the_column = title.startswith("Held-out R² over place means")
        assert table.note.startswith("Not to be ranked: ") == is_of_the_column, title
    assert "Seed by seed: last held-out R² over place means" not in found


def test_a_column_of_ones_own_is_shown_first(write_run: WriteRun) -> None:
    rows = [{"kind": "train", "step": step, "grad_norm": 1.0 / step, "loss": 0.5} for step in (1, 2, 4)]
    write_run("a", rows)
    write_run("b", rows)
    titles = [
        title
        for title, table in _tables("a", "b", column="train.grad_norm").items()
        if table.part == "Figures"
    ]
    assert titles == ["train.grad_norm", "Training loss"]
    assert (label("train.grad_norm"), label("val.loss")) == ("train.grad_norm", "held-out loss")


def test_a_difference_that_is_apart_from_zero_is_called_so_and_no_other(
    write_run: WriteRun, rows_of: Rows
) -> None:
    for seed, (near, far) in enumerate(((0.01, 0.2), (-0.02, 0.21), (0.015, 0.19))):
        for name, config, level in (("a", CONFIG, 0.0), ("near", CONFIG, near), ("far", FASTER, far)):
            lr = (
                replace(config, optimizer=replace(config.optimizer, weight_decay=0.01))
                if name == "near"
                else config
            )
            write_run(f"{name}{seed}", rows_of(100, level=level), replace(lr, seed=seed))
    names = [f"{name}{seed}" for name in ("a", "near", "far") for seed in range(3)]
    rows = _tables(*names)["Seed by seed: last held-out R² over place means"].rows
    assert [(row[0], row[-1]) for row in rows] == [("near0 − a0", "no"), ("far0 − a0", "yes")]


def test_the_page_says_what_the_tables_say(
    write_run: WriteRun, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("a", config=CONFIG)
    write_run("b-2", config=replace(CONFIG, start_from="<script>alert(1)</script>"))
    page = tmp_path / "page.html"
    assert main(["runs", "compare", "a", "b-2", "--html", str(page)]) == 0
    said, text = capsys.readouterr().out, page.read_text()
    assert f"written: {page}" in said and "<script>alert(1)</script>" in said
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    for part in ("What was run", "Settings that differ", "Held-out loss", "cannot be claimed"):
        assert part in text, part
