"""A run says which experiment it is and, when it has finished, what that says of its hypothesis."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest


@pytest.fixture
def finished(salt: Any, pixels: Any) -> Any:
    salt.ok(*pixels("t", steps=4, optimizer__warmup_steps=1))
    return salt


def test_a_finished_run_has_its_recipe_and_a_verdict_with_figures(finished: Any) -> None:
    shown = finished.json("runs", "show", "t")
    assert shown["recipe"]["name"] == "demo_teacher" and shown["recipe"]["hypothesis"]
    assert {"steps", "encoder.depth", "optimizer.lr"} <= set(shown["recipe"]["changed"])
    verdict, r2 = shown["verdict"], shown["last_val"]["r2_position_mean"]
    assert verdict["criterion"] == "val.r2_position_mean > 0"
    assert verdict["value"] == r2 and verdict["step"] == 4
    assert verdict["verdict"] == "undecided" and "departs from demo_teacher in " in verdict["reason"]
    (listed,) = finished.json("runs", "ls")
    for part in ("name", "state", "step", "recipe", "verdict", "last_val"):
        assert listed[part] == shown[part], part


def test_people_read_it_where_they_look(finished: Any, pixels: Any) -> None:
    verdict = finished.json("runs", "show", "t")["verdict"]["verdict"]
    assert verdict in finished.ok("runs", "ls").out
    assert "demo_teacher" in finished.ok("runs", "ls").out
    again = finished.ok(*pixels("t", steps=4, optimizer__warmup_steps=1)).out
    assert f"demo_teacher's hypothesis: {verdict} (" in again


def test_a_run_cut_short_is_undecided_until_it_has_finished(salt: Any, pixels: Any) -> None:
    settings = {"steps": 4, "optimizer__warmup_steps": 1}
    short = salt.ok(*pixels("t", "--max-steps", 2, **settings)).out
    assert "hypothesis: undecided (stopped at step 2 of 4)" in short
    salt.ok(*pixels("t", **settings))
    assert "stopped" not in salt.json("runs", "show", "t")["verdict"]["reason"]


def test_a_student_is_not_held_against_another_task(finished: Any, student: Any) -> None:
    """Its parent predicts pixels: whatever the figures are, they are of something else."""
    said = finished.ok(*student("s", "--max-steps", 2)).out
    assert "demo_student's hypothesis: undecided (no condition that a program can check" in said


def test_a_refused_run_notes_nothing(salt: Any, pixels: Any) -> None:
    salt(*pixels("t", "--data", salt.root / "nowhere.parquet"))
    assert salt.files() == []


@pytest.mark.parametrize(("size", "parts"), [(4, 4), (6, 2), (1, 1), (8, 4)])
def test_batch_size_lowers_the_parts_that_do_not_divide_it(
    salt: Any, pixels: Any, size: int, parts: int
) -> None:
    salt.ok(*pixels("t", "--batch-size", size, "--max-steps", 1, grad_accum_steps=4))
    config = json.loads(salt.at("t").config_file.read_text())
    assert (config["batch_size"], config["grad_accum_steps"]) == (size, parts)


def test_no_batch_is_no_batch(salt: Any, pixels: Any) -> None:
    assert "batch_size must be at least 1, not 0" in salt(*pixels("t", "--batch-size", 0)).sentence


def test_a_damaged_note_is_a_sentence_and_hides_no_other_run(finished: Any) -> None:
    other = shutil.copytree(finished.at("t").path, finished.at("u").path)
    for name in ("recipe.json", "verdict.json"):
        file = other / name
        before = file.read_text()
        file.write_text('{"x": 1}')
        states = {row["name"]: row["state"] for row in finished.json("runs", "ls")}
        assert states == {"t": "finished", "u": "damaged"}
        assert "finished" in finished.ok("runs", "ls").out
        assert f"{file} is damaged" in finished.json("runs", "show", "u")["exit_reason"]
        file.write_text(before)
    (other / "masks.json").write_text('{"x": 1}')  # Not worth hiding the rest for.
    assert finished.json("runs", "show", "u")["state"] == "finished"
