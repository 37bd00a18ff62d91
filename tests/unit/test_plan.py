"""`plan`: what a run takes in all, from its clips to its disk, and what does not fit it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.config import TrainConfig, override
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.jobs import plan as plans
from salt_vla.jobs.plan import RunPlan, describe_run, plan_run
from salt_vla.jobs.train_trial import Measured, measured_steps
from salt_vla.recipes import get_recipe

# A stage-1 run, which needs no cache.
SOUND = (
    *("encoder.name=vit_micro", "encoder.depth=1", "encoder.geometry.num_frames=4"),
    *("encoder.geometry.image_size=32", "encoder.geometry.tubelet_size=2", "encoder.geometry.patch_size=8"),
    *("predictor.depth=1", "predictor.dim=24", "predictor.num_heads=3", "data.view.frame_stride=2"),
    *("steps=400", "batch_size=1", "optimizer.warmup_steps=10", "runtime.device=cpu"),
    *("runtime.precision=float32", "runtime.threads=1", "runtime.log_every=4", "runtime.validation_clips=4"),
    *("runtime.validate_every=20", "runtime.checkpoint_every=20", "masks.max_targets=0"),
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def table(tiny_table: ClipTable, tmp_path: Path) -> Path:
    path = tmp_path / "clips.parquet"
    tiny_table.write(path)
    return path


@pytest.fixture
def config(table: Path) -> TrainConfig:
    return sound(table)


def sound(table: Path, *more: str) -> TrainConfig:
    recipe = get_recipe("demo_teacher").config
    made = override(recipe, [*SOUND, *more])
    return replace(made, data=replace(made.data, table=str(table)))


def warned(plan: RunPlan, *but: str) -> list[str]:
    return [text for text in plan.warnings if not any(part in text for part in but)]


def test_a_sound_run_is_counted_and_warned_of_nothing(config: TrainConfig, root: Path) -> None:
    plan = plan_run(config)
    assert plan.warnings == []
    assert plan.clips.train + plan.clips.validation == 24
    assert plan.epochs == pytest.approx(400 / plan.clips.train)
    assert plan.cache_bytes == 0 and plan.measured is None and plan.measured_hours is None
    of_checkpoints = plan.step.checkpoints * plan.step.checkpoint_bytes
    assert plan.disk_bytes == of_checkpoints + plan.metrics_bytes
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimizer.warmup_steps=100", "the warm-up takes 25.0% of the steps; 1% to 5% is usual"),
        ("optimizer.schedule=cooldown", "the rate stays at"),
        ("optimizer.lr_final=1.0", "is below its start"),
        ("batch_size=64", "a batch of 64 is more than the 16 clips to learn from"),
        ("steps=4", "the run sees 25% of its 16 clips"),
        ("steps=40000", "every clip is seen 2,500 times"),
        ("runtime.validation_clips=100", "100 held-out clips are asked for and there are 8"),
        ("runtime.validation_clips=0", "nothing is held out"),
        ("runtime.validate_every=5000", "held-out clips are looked at only at the end: validate_every=5000"),
        ("runtime.checkpoint_every=5000", "an interruption costs the whole run"),
        ("runtime.log_every=300", "the curve has 1 points: runtime.log_every=300"),
        ("steps=400000", "the curve has 100,000 points: raise runtime.log_every"),
        ("masks.blocks=", "leaves"),
    ],
)
def test_what_does_not_fit_the_run_is_said(change: str, said: str, table: Path) -> None:
    if change == "masks.blocks=":
        change = "masks.strategy=random"
        plan = plan_run(sound(table, change, "masks.ratio=0.02"))
    else:
        plan = plan_run(sound(table, change))
    assert [text for text in plan.warnings if said in text], plan.warnings


def test_a_run_that_is_cut_short_never_reaches_the_end_of_its_schedule(config: TrainConfig) -> None:
    plan = plan_run(config, max_steps=100)
    (said,) = plan.warnings
    assert "the schedules are for 400 steps and the run ends at 100" in said and "steps=100" in said
    assert plan.steps == 100 and plan.epochs == pytest.approx(100 / plan.clips.train)
    assert plan_run(config, max_steps=900).warnings == []


def test_clips_that_are_not_there_are_no_reason_not_to_plan(config: TrainConfig, tmp_path: Path) -> None:
    for table in ("", str(tmp_path / "nowhere.parquet")):
        plan = plan_run(replace(config, data=replace(config.data, table=table)))
        assert plan.epochs is None and plan.clips.train == 0
        assert "how many clips there are is not known" in plan.warnings[0]
        assert not [row for row in describe_run(plan) if row["field"] == "epochs"]


def test_a_cache_that_is_still_to_be_built_is_counted(table: Path, root: Path) -> None:
    student = override(get_recipe("demo_student").config, [*SOUND, "target.source=caches/mine"])
    student = replace(student, data=replace(student.data, table=str(table)))
    plan = plan_run(student)
    keys = plan.clips.train * student.data.view.num_views + plan.clips.validation
    assert plan.cache_bytes == keys * 2 * student.geometry.num_tokens * 768
    assert "not cached yet at caches/mine: salt-vla cache build" in " ".join(plan.warnings)
    assert plan.disk_bytes > plan.cache_bytes


def test_a_disk_that_checkpoints_and_cache_would_fill_is_said(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = override(get_recipe("demo_student").config, [*SOUND, "target.source=caches/mine"])
    student = replace(student, data=replace(student.data, table=str(table)))
    free = plan_run(student).disk_bytes - 1
    real = plans.plan_training
    monkeypatch.setattr(plans, "plan_training", lambda *args: replace(real(*args), free_disk=free))
    assert [text for text in plan_run(student).warnings if "checkpoints and the cache take" in text]


# Measured


def test_steps_are_really_done_and_reckoned_with(config: TrainConfig, root: Path) -> None:
    plan = plan_run(config, measure=True)
    measured = plan.measured
    assert measured is not None and measured.steps == 20
    assert (measured.device, measured.precision) == ("cpu", "float32")
    assert 0 < measured.seconds < 60 and 10**8 < measured.bytes < measured.room
    assert plan.measured_hours == pytest.approx(400 * measured.seconds / 3600)
    rows = {row["field"]: row["value"] for row in describe_run(plan)}
    assert "20 steps on cpu, float32" in rows["measured"] and "400 steps" in rows["time then"]
    assert list(root.iterdir()) == []


def test_precision_is_chosen_as_a_run_chooses_it(config: TrainConfig) -> None:
    config = replace(config, runtime=replace(config.runtime, precision="auto"))
    assert measured_steps(config, steps=1).precision in ("float32", "bfloat16")


def test_steps_that_cannot_fit_are_not_tried(config: TrainConfig) -> None:
    with pytest.raises(ResourceError, match="a step of 20000000 clips"):
        measured_steps(replace(config, batch_size=20_000_000))


def slow(seconds: float, peak: int = 1) -> Measured:
    return Measured(20, seconds, peak, 10**9, "cpu", "float32")


@pytest.mark.parametrize(
    ("measured", "change", "said"),
    [
        (slow(900.0), "runtime.checkpoint_every=20", "checkpoints lie 5.0 h apart"),
        (slow(1e-5), "runtime.checkpoint_every=1", "of the time: raise runtime.checkpoint_every"),
        (slow(1.0, 2 * 10**9), "runtime.checkpoint_every=20", "a step took 2.0 GB, of 1.0 GB free"),
    ],
)
def test_what_only_a_measurement_shows_is_said(
    measured: Measured, change: str, said: str, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "measured_steps", lambda config: measured)
    plan = plan_run(sound(table, change), measure=True)
    assert [text for text in plan.warnings if said in text], plan.warnings


def test_only_one_device_is_measured(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="--measure does steps on one device"):
        plan_run(config, gpus=2, measure=True)


# The command


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*args: object, code: int = 0) -> str:
        assert main([str(arg) for arg in args]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return ask


def test_plan_and_train_plan_say_the_same(told: Any, table: Path, root: Path) -> None:
    options = ("demo_teacher", *SOUND, "--data", table, "--max-steps", 100, "--json")
    first, second = json.loads(told("plan", *options)), json.loads(told("train", *options, "--plan"))
    for said in (first, second):
        said.pop("free_disk")  # Others use the disk, too.
    assert first == second
    assert first["ends_at"] == 100 and first["train_clips"] == 16 and first["measured"] is None
    assert {"flops_per_step", "parameters", "memory", "hours", "disk_bytes", "epochs"} <= set(first)
    assert list(root.iterdir()) == []


def test_a_person_is_shown_every_figure_and_warning(told: Any, table: Path) -> None:
    said = " ".join(told("plan", "demo_teacher", *SOUND, "--data", table, "--batch-size", 64).split())
    for part in ("epochs", "masks, group 1", "disk in all", "parameters", "warning a batch of 64 is more"):
        assert part in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere",), "nowhere"),
        (("demo_teacher", "--max-steps", "0"), "--max-steps must be at least 1, not 0"),
        (("demo_teacher", "--gpus", "0"), "--gpus must be at least 1"),
        (("demo_teacher", "--measure", "--gpus", "2"), "--measure does steps on one device"),
        (("demo_teacher", "--data", ""), "--data is empty"),
        (("demo_teacher", "--data", "/no/such/folder"), "/no/such/folder"),
        (("demo_teacher", "--data", "/no/such.parquet"), "/no/such.parquet"),
        (("demo_teacher", "no_such=1"), "no_such"),
    ],
)
def test_bad_input_is_a_sentence(args: tuple[str, ...], said: str, told: Any) -> None:
    assert said in told("plan", *args, code=2)


def test_both_commands_refuse_data_that_a_run_would_be_refused_for(told: Any, root: Path) -> None:
    refused = [
        told("plan", "demo_teacher", "--data", "/no/such/folder", code=2),
        told("train", "demo_teacher", "--plan", "--data", "/no/such/folder", code=2),
        told("train", "demo_teacher", "--data", "/no/such/folder", code=2).splitlines()[-1] + "\n",
    ]
    assert len(set(refused)) == 1, refused


def test_no_time_is_made_up_for_a_processor(told: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("plan", "demo_teacher", *SOUND, "--data", table)
    plan = json.loads(told(*ask, "--json"))
    unknown = ("hours", "clips_per_second", "bytes_per_second", "assumed_tflops_per_gpu")
    assert plan["device"] == "cpu" and [plan[name] for name in unknown] == [None] * 4
    said = " ".join(told(*ask).split())
    assert "time not known of a processor (cpu): --measure does 20 steps" in said
    assert "clips/s" not in said and "B/s" not in said
    monkeypatch.setattr(plans, "measured_steps", lambda config: slow(1.0))
    measured = " ".join(told(*ask, "--measure").split())
    assert "time not known" not in measured and "time then" in measured


def test_every_recipe_can_be_planned(root: Path) -> None:
    for name in ("salt_vitl", "exp1_vicreg10", "vjepa2_vitl", "demo_student"):
        plan = plan_run(get_recipe(name).config, gpus=2)
        assert describe_run(plan) and plan.disk_bytes > 0 and plan.masks
