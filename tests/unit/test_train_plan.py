"""`train --plan` and `--find-batch`: sums that add up, for people and programs; nothing starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salt_vla.cli import main
from salt_vla.config import TargetConfig, TrainConfig
from salt_vla.errors import ConfigError
from salt_vla.jobs.train_plan import ASSUMED_TFLOPS, describe, plan_training, scaled
from salt_vla.masks import build_masks
from salt_vla.recipes import get_recipe
from salt_vla.training.flops import mean_step_flops
from salt_vla.training.memory import checkpoint_bytes

STUDENT = get_recipe("salt_vitb").config


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*args: object) -> str:
        assert main(["train", *map(str, args)]) == 0
        return capsys.readouterr().out

    return ask


def small(**changes: Any) -> TrainConfig:
    return replace(STUDENT, batch_size=32, grad_accum_steps=1, steps=1000, **changes)


def test_clips_work_and_data_follow_from_one_another() -> None:
    plan = plan_training(small(), gpus=4, tflops=100.0)
    assert (plan.per_gpu, plan.micro_batch) == (8, 8)
    assert plan.exaflops == pytest.approx(plan.flops.total * 32 * 1000 / 1e18)
    assert plan.clips_per_second == pytest.approx(4 * 100e12 / plan.flops.total)
    said = plan.as_json()
    assert plan.clips_per_second is not None
    assert said["bytes_per_second"] == pytest.approx(plan.clips_per_second * plan.bytes_a_clip)
    assert said["hours"] * 3600 * plan.clips_per_second == pytest.approx(said["clips"]) == 32_000
    assert plan.bytes_a_clip == STUDENT.geometry.clip_bytes + 2 * 1568 * 768
    masks = build_masks(STUDENT.masks, STUDENT.geometry)
    assert plan.flops.total == pytest.approx(mean_step_flops(small(), 768, masks).total, rel=0.1)


def test_ddp_and_fsdp_are_both_planned_and_differ_by_what_is_sharded() -> None:
    plan = plan_training(small(), gpus=8)
    ddp, fsdp = plan.memory["ddp"], plan.memory["fsdp"]
    assert ddp.parts["moments"] == 8 * fsdp.parts["moments"]
    assert ddp.parts["activations"] == fsdp.parts["activations"]
    assert ddp.total > fsdp.total
    assert set(plan_training(small()).memory) == {"ddp"}


def test_checkpoints_are_counted_by_the_rules_that_keep_them() -> None:
    plan = plan_training(small(runtime=replace(STUDENT.runtime, keep_checkpoints=3, keep_every=100)))
    assert plan.checkpoints == 3 + 10 + 2 and plan.checkpoint_bytes == checkpoint_bytes(STUDENT, 768)
    assert plan.as_json()["disk_bytes"] == 15 * plan.checkpoint_bytes


@pytest.mark.parametrize(
    ("changes", "gpus", "said"),
    [
        ({"batch_size": 30}, 4, "batch_size 30 is no multiple of 4 GPUs × 1 micro-batches"),
        ({"optimizer": replace(STUDENT.optimizer, warmup_steps=500)}, 1, "the warm-up takes 50.0% of"),
        ({"optimizer": replace(STUDENT.optimizer, warmup_steps=0)}, 1, "the warm-up takes 0.0% of"),
        ({"runtime": replace(STUDENT.runtime, memory_limit="3GB")}, 1, "beyond the limit of 3GB"),
        ({"runtime": replace(STUDENT.runtime, keep_every=1)}, 1, "checkpoints take"),
        ({"target": TargetConfig("teacher", "x")}, 1, "the teacher that runs in the loop is in no figure"),
    ],
)
def test_what_looks_wrong_is_said(changes: dict[str, Any], gpus: int, said: str) -> None:
    sound = replace(small(), optimizer=replace(STUDENT.optimizer, warmup_steps=20))
    assert plan_training(sound).warnings == []
    warnings = plan_training(replace(sound, **changes), gpus).warnings
    assert len(warnings) == 1 and said in warnings[0]


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus must be at least 1 and --tflops positive, not 0 and"):
        plan_training(small(), gpus=0)
    with pytest.raises(ConfigError, match="--tflops positive"):
        plan_training(small(), tflops=0.0)


def test_a_rate_is_assumed_of_gpus_that_are_asked_for_or_here_and_of_no_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*of: Any, has_gpu: bool = False) -> tuple[str, int, float | None]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        plan = plan_training(small(), *of)
        return plan.device, plan.gpus, plan.tflops

    assert planned() == ("cpu", 1, None)
    assert planned(has_gpu=True) == planned(1) == ("cuda", 1, ASSUMED_TFLOPS)
    assert planned(None, 50.0) == ("cuda", 1, 50.0)
    processor = replace(STUDENT.runtime, device="cpu")
    assert plan_training(small(runtime=processor), 1).seconds is None
    assert plan_training(small(runtime=processor), None, 0.05).seconds is not None


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0.0, "0 FLOP"),
        (7.0, "7 FLOP"),
        (763_400_000.0, "763 MFLOP"),
        (999_600.0, "1 MFLOP"),
        (9.77e12, "9.77 TFLOP"),
        (2.5e22, "25,000 EFLOP"),
    ],
)
def test_units_fit_their_figures(number: float, said: str) -> None:
    assert scaled(number, "FLOP") == said


def test_no_figure_of_a_small_run_is_rounded_to_nothing() -> None:
    demo = get_recipe("demo_teacher").config
    rows = {row["field"]: row["value"] for row in describe(plan_training(demo))}
    for name in ("work a clip", "work a step", "work in all", "checkpoints", "of one clip more"):
        assert float(rows[name].split(" × ")[-1].split()[0]) >= 1, rows[name]


def test_every_recipe_can_be_planned_and_told() -> None:
    for name in ("vitl_extreme", "vjepa2_vitl", "demo_teacher", "baseline_tiny"):
        rows = describe(plan_training(get_recipe(name).config, gpus=2))
        assert {"memory a GPU, ddp", "memory a GPU, fsdp", "work a clip", "/dev/shm"} <= {
            row["field"] for row in rows
        }, name


def test_the_command_plans_and_starts_nothing(answer: Any, root: Path) -> None:
    told = answer("salt_vitb", "batch_size=64", "grad_accum_steps=8", "--plan", "--gpus", 2)
    assert "64 = 2 × 32, 4 clips at once" in told and "EFLOP" in told
    plan = json.loads(answer("salt_vitb", "--batch-size", 64, "--plan", "--tflops", 50, "--json"))
    assert plan["batch_size"] == 64 and plan["assumed_tflops_per_gpu"] == 50
    assert plan["memory"]["ddp"]["total"] == pytest.approx(
        sum(v for k, v in plan["memory"]["ddp"].items() if k not in ("total", "of_clip"))
    )
    assert list(root.iterdir()) == []


def test_the_command_finds_the_largest_batch_below_a_limit(
    answer: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("runtime.device=cpu", "runtime.precision=float32", "--batch-size", "64")
    ask = ("salt_vitb", *settings, "--find-batch")
    found = json.loads(answer(*ask, "--memory-limit", "25GB", "--json"))
    assert found["limit"] == 25 * 10**9 and 4 < found["largest_batch_size"] < 64
    assert 64 % found["grad_accum_steps"] == 0 and found["grad_accum_steps"] > 1
    told = answer(*ask, "--memory-limit", "25GB")
    assert f"largest batch in one piece: batch_size={found['largest_batch_size']} (limit 25.00 GB)" in told
    assert f"batch_size=64: grad_accum_steps={found['grad_accum_steps']}" in told
    assert main(["train", *ask, "--memory-limit", "1GB"]) == 2
    assert "a step of 1 clip, 1 at once, needs about process" in capsys.readouterr().err
    assert list(root.iterdir()) == []


def test_a_limit_is_kept_when_the_run_would_begin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo_teacher", "runtime.device=cpu", "--memory-limit", "500MB"]) == 2
    assert "runtime.memory_limit allows 500MB: lower batch_size" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_out_is_not_called_too_large(answer: Any) -> None:
    ask = ("demo_student", "--batch-size", 16, "--find-batch", "--gpus", 3, "--memory-limit", "2GB")
    told = answer(*ask)
    assert "batch_size=16 is no multiple of 3 GPUs" in told and "does not fit" not in told
    found = json.loads(answer(*ask, "--json"))
    assert found["grad_accum_steps"] == 0 and "no multiple of 3 GPUs" in found["pieces"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plan", "--find-batch"), "--plan and --find-batch are two questions"),
        (("--plan", "--measure", "--gpus", "2"), "--measure does steps on one device: leave out --gpus"),
        (("--find-batch", "--tflops", "3"), "--tflops would do nothing here: leave it out with --find-batch"),
        (("--plan", "--branch", "x"), "--branch would do nothing here: leave it out with --plan"),
        (("--find-batch", "--max-steps", "3"), "--max-steps would do nothing here: leave it out with --find"),
        (("--json",), "--json would do nothing here: give --plan or --find-batch with it"),
        (("--gpus", "4"), "--gpus would do nothing here: give --plan or --find-batch with it"),
        (("--measure",), "--measure would do nothing here: give --plan or --find-batch with it"),
        (("--find-batch", "--gpus", "0"), "--gpus must be at least 1, not 0"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    options: tuple[str, ...], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "demo_student", *options]) == 2
    assert said in capsys.readouterr().err and list(root.iterdir()) == []
