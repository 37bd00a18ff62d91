"""Settings that change with a run's consent: told as a table, allowed by name, or in a branch of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

Command = Callable[..., list[object]]


def test_a_changed_setting_is_a_table_and_allowed_by_name_alone(
    salt: Any, pixels: Command, curve: Any
) -> None:
    salt.ok(*pixels("run", "--max-steps", 2))
    run = salt.at("run")
    changed = {"optimizer__lr": 1e-4, "optimizer__grad_clip": 1.5}
    refused = salt(*pixels("run", "--max-steps", 4, **changed))
    assert "--allow-change optimizer.lr --allow-change optimizer.grad_clip" in refused.sentence
    rows = [line.split() for line in refused.err.splitlines()[:4]]
    assert rows[0] == ["field", "before", "now"]
    assert rows[2:] == [["optimizer.lr", "0.003", "0.0001"], ["optimizer.grad_clip", "1.0", "1.5"]]
    half = ("--allow-change", "optimizer.lr")
    assert "optimizer.grad_clip" in salt(*pixels("run", "--max-steps", 4, *half, **changed)).sentence
    salt.ok(*pixels("run", "--max-steps", 4, *half, "--allow-change", "optimizer.grad_clip", **changed))
    assert json.loads(run.config_file.read_text())["optimizer"]["lr"] == 1e-4
    (line,) = (run.path / "config_changes.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 2 and record["config_hash"][0] != record["config_hash"][1]
    assert {row["field"]: row["after"] for row in record["changed"]} == {
        "optimizer.lr": 1e-4,
        "optimizer.grad_clip": 1.5,
    }
    hashes = {
        path.parent.name: json.loads(path.read_text())["config_hash"]
        for path in run.checkpoints.glob("step_*/state.json")
    }
    assert hashes["step_00000004"] == record["config_hash"][1]
    # From here on the changed settings are the run's own.
    salt.ok(*pixels("run", "--max-steps", 5, **changed))
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4, 5]


def test_a_section_can_be_allowed_and_a_typo_cannot(salt: Any, pixels: Command) -> None:
    salt.ok(*pixels("run", "--max-steps", 2))
    allowed = ("--allow-change", "optimizer")
    salt.ok(*pixels("run", "--max-steps", 3, *allowed, optimizer__lr=1e-4, optimizer__grad_clip=2.0))
    said = salt(*pixels("run", "--max-steps", 4, "--allow-change", "optimizer.lrr")).sentence
    assert "there is no such field; did you mean optimizer.lr" in said


def test_what_decides_nothing_may_change_and_is_written_down(
    salt: Any, pixels: Command, curve: Any, weights: Any
) -> None:
    salt.ok(*pixels("whole", "--max-steps", 6))
    salt.ok(*pixels("run", "--max-steps", 4))
    salt.ok(*pixels("run", "--max-steps", 6, runtime__keep_checkpoints=5))
    run = salt.at("run")
    assert curve(run) == curve(salt.at("whole"))
    assert json.loads(run.config_file.read_text())["runtime"]["keep_checkpoints"] == 5
    record = json.loads((run.path / "config_changes.jsonl").read_text())
    assert record["changed"] == [{"field": "runtime.keep_checkpoints", "before": 2, "after": 5}]
    assert "from step 4 on runtime.keep_checkpoints is 5, not 2" in run.log_file.read_text()


COOLDOWN = {"optimizer__schedule": "cooldown", "steps": 40, "runtime__keep_every": 4}


@pytest.fixture
def long(salt: Any, student: Command) -> Any:
    salt.ok(*student("long", "--max-steps", 10, **COOLDOWN))
    return salt.at("long")


def test_a_branch_goes_on_from_another_runs_checkpoint(
    salt: Any, student: Command, long: Any, curve: Any
) -> None:
    short = COOLDOWN | {"steps": 12, "optimizer__cooldown_steps": 4}
    salt.ok(*student("short", "--branch", "long@8", **short))
    run = salt.at("short")
    shown = salt.json("runs", "show", "short")
    assert (shown["state"], shown["step"]) == ("finished", 12)
    assert (shown["branched_from"], shown["resumed_from"]) == ("long@8", [8])
    rows = {row["step"]: row for row in run.metrics("train")}
    before = {row["step"]: row for row in long.metrics("train")}
    assert {step: row for step, row in rows.items() if step <= 8} == {s: before[s] for s in range(1, 9)}
    # The rate of step 9 is still the peak, so up to it both runs are one; then it falls to its end.
    assert rows[9]["loss"] == before[9]["loss"] and rows[9]["lr"] == before[9]["lr"] == 3e-3
    rates = [rows[step]["lr"] for step in (9, 10, 11, 12)]
    assert rates == sorted(rates, reverse=True) and rates[3] == pytest.approx(
        3e-3 / 4 + json.loads(run.config_file.read_text())["optimizer"]["lr_final"] * 3 / 4
    )
    assert rows[11]["loss"] != before[10]["loss"]
    record = json.loads((run.path / "branch.json").read_text())
    assert (record["run"], record["step"]) == ("long", 8)
    assert record["changed"]["steps"] == [40, 12]
    # The same command again is a resume, not another branch.
    salt.ok(*student("short", "--branch", "long@8", **short))
    assert salt.json("runs", "show", "short")["step"] == 12


def test_a_branch_to_the_same_settings_is_the_run_itself(
    salt: Any, student: Command, long: Any, curve: Any
) -> None:
    salt.ok(*student("twin", "--branch", "long@8", "--max-steps", 10, **COOLDOWN))
    assert curve(salt.at("twin")) == curve(long)


@pytest.mark.parametrize(
    ("source", "settings", "named"),
    [
        ("long@8", {"steps": 12, "batch_size": 2}, "not other batch_size"),
        ("long@7", {"steps": 12}, "keeps no checkpoint of step 7, only of 4, 8"),
        ("long@8", {"steps": 8}, "needs steps=9 or more"),
        ("long", {}, "not of the form RUN@STEP"),
        ("nobody@8", {}, "there is no run"),
    ],
)
def test_a_branch_that_cannot_be_is_a_sentence(
    salt: Any, student: Command, long: Any, source: str, settings: dict[str, Any], named: str
) -> None:
    said = salt(*student("short", "--branch", source, **COOLDOWN | settings)).sentence
    assert named in said
    assert not salt.at("short").path.exists()


def test_a_run_is_branched_once(salt: Any, student: Command, long: Any) -> None:
    settings = COOLDOWN | {"steps": 12}
    salt.ok(*student("short", "--branch", "long@8", "--max-steps", 9, **settings))
    said = salt(*student("short", "--branch", "long@4", **settings)).sentence
    assert "was branched from long@8, not from long@4" in said
    assert "begun on its own" in salt(*student("long", "--branch", "short@9", **settings)).sentence


def test_a_branch_can_go_on_apart(salt: Any, student: Command, long: Any) -> None:
    """Its folder is there before it, with the launch and a log; also one that was cut off before it was whole
    is made again, and what somebody else has begun is left alone."""
    settings = COOLDOWN | {"steps": 12}
    run = salt.at("short")
    for step, begun in ((8, "launch.json"), (4, "branch.json")):
        run.path.mkdir(parents=True)
        if begun == "branch.json":
            (run.path / "checkpoints" / "step_00000009").mkdir(parents=True)
        (run.path / begun).write_text(json.dumps({"run": "long", "step": step}))
        (run.path / "log.txt").write_text("said before\n")
        salt.ok(*student("short", "--branch", f"long@{step}", "--max-steps", step + 1, **settings))
        assert run.status().resumed_from == [step] and (run.path / begun).is_file()
        log = run.log_file.read_text()
        assert log.startswith("said before\n") and f"branched from long at step {step}" in log
        assert not list(run.path.parent.glob(".branching*"))
        shutil.rmtree(run.path)
    (run.path / "checkpoints").mkdir(parents=True)
    assert "begun on its own" in salt(*student("short", "--branch", "long@8", **settings)).sentence
