"""What a run goes on with is what it says: its own checkpoint, statistics and teacher, or a refusal that
leaves the run as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., list[object]]

# Every loss is above its running mean by this factor sooner or later, and then the run goes back.
BACK = {"guards__spike_factor": 1.0001, "guards__rollback_after": 1, "guards__max_rollbacks": 1}
BLIND = {"runtime__validation_clips": 0, "runtime__checkpoint_every": 100}


def backs(run: Any) -> list[str]:
    return [line for line in run.log_file.read_text().splitlines() if "back to step" in line]


def test_a_branch_goes_back_to_its_origin_and_never_before(salt: Any, student: Command) -> None:
    """Its checkpoint was written at a stop, so the source itself would have gone back further."""
    rate = {"optimizer__schedule": "cooldown"}
    salt.ok(*student("long", "--max-steps", 22, **BLIND, **rate))
    allowed = ("--branch", "long@22", "--allow-change", "guards")
    salt(*student("branch", *allowed, steps=60, **BLIND, **BACK, **rate))
    assert [line.partition("; ")[2] for line in backs(salt.at("branch"))] == [
        "back to step 22, and on with other clips"
    ]
    rows = salt.at("branch").metrics("train")
    assert rows[:22] == salt.at("long").metrics("train")


def test_back_at_the_first_step_a_run_has_its_first_weights_again(
    salt: Any, student: Command, workshop: Any, curve: Any
) -> None:
    """Also where a stop has left a checkpoint behind that step."""
    settings = BLIND | BACK | {"start_from": workshop.teacher, "steps": 25}
    salt(*student("whole", **settings))
    salt.ok(*student("parts", "--max-steps", 10, **settings))
    salt(*student("parts", **settings))
    assert "back to step 0" in backs(salt.at("whole"))[0]
    assert curve(salt.at("whole")) == curve(salt.at("parts"))


def test_where_a_run_was_cut_does_not_show_once_it_goes_on(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    settings = {"runtime__log_every": 4, "runtime__validate_every": 8, "steps": 10}
    salt.ok(*student("whole", **settings))
    salt.ok(*student("parts", "--max-steps", 6, **settings))
    run = salt.at("parts")
    assert [(row["kind"], row["step"]) for row in run.metrics()][-2:] == [("train", 6), ("val", 6)]
    salt.ok(*student("parts", "--max-steps", 6, **settings))  # Which leaves nothing to do, and all as it is.
    assert [row["step"] for row in run.metrics()] == [4, 6, 6]
    salt.ok(*student("parts", **settings))
    assert curve(run) == curve(salt.at("whole")) and weights(run) == weights(salt.at("whole"))


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "predictor.dim": ({"predictor__dim": 48}, "does not fit this run's configuration"),
    "optimizer.parameters": (
        {"optimizer__parameters": "bfloat16"},
        "torch.float32, optimizer.parameters asks for torch.bfloat16",
    ),
    "optimizer.average": ({"optimizer__average": 0.9}, "holds no average of the weights"),
    "objective.targets": ({"objective__targets": "raw"}, "has other statistics of its targets"),
}


@pytest.fixture
def begun(salt: Any, student: Command) -> Any:
    salt.ok(*student("run", "--max-steps", 2))
    return salt.at("run")


def test_an_allowed_change_that_cannot_be_leaves_the_run_as_it_was(
    salt: Any, student: Command, begun: Any
) -> None:
    before = begun.config_file.read_bytes()
    for field, (setting, named) in CANNOT.items():
        said = salt(*student("run", "--max-steps", 4, "--allow-change", field, **setting)).sentence
        assert named in said, field
        assert begun.config_file.read_bytes() == before, field
        assert not (begun.path / "config_changes.jsonl").exists(), field
    salt.ok(*student("run", "--max-steps", 3))
    branch = ("--branch", "run@2", "--allow-change", "objective.targets")
    assert CANNOT["objective.targets"][1] in salt(*student("b", *branch, objective__targets="raw")).sentence


def test_a_run_that_gave_up_goes_on_from_weights_that_were_good(salt: Any, student: Command) -> None:
    """The second update ruins them, and the checkpoint that is written then is the damage itself."""
    cure = "lower optimizer.lr"
    ruin = {"optimizer__lr": 1e9, "steps": 12}
    assert cure in salt(*student("run", **ruin)).sentence
    salt.ok(*student("run", "--allow-change", "optimizer.lr", steps=12))
    rows = salt.at("run").metrics("train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["loss"] is not None for row in rows)


def test_another_loss_is_not_taken_for_a_spike(salt: Any, student: Command, curve: Any) -> None:
    """Neither by a resume, nor by the one after a kill, nor by a branch."""
    salt.ok(*student("run", "--max-steps", 22))
    allowed, more = ("--allow-change", "objective"), {"objective__contrastive_weight": 1.0}
    salt.ok(*student("branch", "--branch", "run@22", *allowed, "--max-steps", 24, **more))
    salt.ok(*student("run", "--max-steps", 23, *allowed, **more))
    run = salt.at("run")
    shutil.rmtree(run.checkpoints / "step_00000023")
    salt.ok(*student("run", "--max-steps", 24, **more))
    rows = run.metrics("train")
    assert rows[-1]["loss"] > 4 * rows[21]["loss"] and "bad_steps" not in rows[-1]
    assert curve(salt.at("branch"))[-1] == curve(run)[-1]


def test_a_teacher_in_the_loop_stays_the_same(
    salt: Any, pixels: Command, workshop: Any, tmp_path: Path
) -> None:
    """By what it computes, not by its name: a run that is the teacher may have gone on meanwhile."""
    teacher, original = tmp_path / "teacher", workshop.teacher / "checkpoints"
    shutil.copytree(max(original.glob("step_*")), teacher)
    other = min(original.glob("step_*"))
    settings = {"target__provider": "teacher", "target__source": teacher}
    salt.ok(*pixels("run", "--max-steps", 2, **settings))
    pinned = json.loads((salt.at("run").path / "teacher_provenance.json").read_text())
    assert pinned.keys() == {"fingerprint"}
    (teacher / "encoder.safetensors").write_bytes((other / "encoder.safetensors").read_bytes())
    said = salt(*pixels("run", "--max-steps", 4, **settings))
    assert "began with another teacher: they differ in fingerprint" in said.err, said.err
    assert salt.at("run").status().step == 2


def test_a_device_without_numbers_is_a_sentence(salt: Any, student: Command) -> None:
    said = salt(*student("run", runtime__device="meta")).sentence
    assert "runtime.device 'meta' cannot be used here" in said
