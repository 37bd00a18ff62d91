"""What a run's own files say is taken as far as it is of its kind, and never more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from salt_vla.cli.runs import show
from salt_vla.errors import RunError
from salt_vla.operations.compare import compare
from salt_vla.operations.compare_tables import tables_of
from salt_vla.operations.dashboard.curves import per_step
from salt_vla.operations.handoff.facts import facts_of
from salt_vla.operations.noted import COST, MASKS, PROBES, noted
from salt_vla.rundir import RunDirectory

WriteRun = Callable[..., RunDirectory]
GOOD_COST = {"parameters": {"encoder": 5, "predictor": 2}, "flops_a_step": 2e12, "clips_a_step": 4}
GOOD_COST |= {"clips_an_epoch": 40, "tokens_a_clip": 8, "flops_a_clip": {"total": 5e11}}
ROW = {"encoder": "some", "suite": "a/grid", "target": "t", "metric": "r2", "value": 0.5}
ROW |= {"low": 0.4, "high": None, "note": ""}
SUITE = {"suite": "a/grid", "clip_table": "c", "step": 3, "rows": [ROW], "comparisons": []}


@pytest.mark.parametrize("name", [COST, MASKS, PROBES])
def test_a_file_that_is_none_is_empty_and_one_without_json_a_sentence(write_run: WriteRun, name: str) -> None:
    run = write_run("some")
    assert noted(run, name) == {}
    for text in ("{", "[]"):
        (run.path / name).write_text(text)
        with pytest.raises(RunError, match=f"{name} is damaged"):
            noted(run, name)


def test_what_the_program_writes_is_read_back_whole(write_run: WriteRun) -> None:
    run = write_run("some")
    held = {COST: GOOD_COST, MASKS: {"summary": ["a line"], "groups": [1]}, PROBES: {"suites": [SUITE]}}
    for name, value in held.items():
        (run.path / name).write_text(json.dumps(value))
        assert noted(run, name) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clips_a_step", "y"), ("clips_a_step", 1e308), ("clips_a_step", 0), ("clips_an_epoch", 1e-308),
        ("clips_an_epoch", -1), ("flops_a_step", float("nan")), ("flops_a_step", 10**400),
        ("flops_a_step", -1),        ("parameters", 5), ("parameters", {"encoder": "many"}),
    ],
)  # fmt: skip
def test_a_cost_that_is_none_is_left_out(write_run: WriteRun, field: str, value: Any) -> None:
    run = write_run("some")
    (run.path / COST).write_text(json.dumps(GOOD_COST | {field: value}))
    kept = {name: each for name, each in GOOD_COST.items() if name != field}
    found = noted(run, COST)
    assert {name: each for name, each in found.items() if name != field} == kept
    assert found.get(field) in (None, {})
    assert per_step(run).keys() >= {"clips"}, "of settings where the file has none"
    assert tables_of(compare(["some"]))
    show("some")


@pytest.mark.parametrize("summary", [5, None, "text", [1, {"a": 2}]])
def test_masks_without_lines_hide_no_run(
    write_run: WriteRun, summary: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run("some")
    (run.path / MASKS).write_text(json.dumps({"summary": summary}))
    assert noted(run, MASKS) == {"summary": []}
    show("some")
    assert "some" in capsys.readouterr().out


@pytest.mark.parametrize(
    "suite",
    [
        5, {"suite": {"a": 1}}, SUITE | {"clip_table": 5},
        SUITE | {"rows": 5}, SUITE | {"rows": [5, {"value": "x"}]},
        SUITE | {"rows": [ROW | {"suite": {}}, ROW | {"low": [1]}, ROW | {"value": float("nan")}]},
        SUITE | {"rows": None, "comparisons": None},
    ],
)  # fmt: skip
def test_a_probe_that_is_none_is_left_out_and_the_others_stay(write_run: WriteRun, suite: Any) -> None:
    run = write_run("some")
    (run.path / PROBES).write_text(
        json.dumps({"suites": [suite, SUITE | {"comparisons": None, "step": "x"}]})
    )
    facts = facts_of(run)
    assert (facts.problem, [row["value"] for row in facts.probes]) == ("", [0.5])
    tables = [table for table in tables_of(compare(["some"])) if table.part == "Probes"]
    assert [table.rows for table in tables] == [(("t (r2)", "0.5"),)]
