"""Training through the command line: it learns, says what its loss is worth, and stays the run it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

R2 = {"r2_channel_mean", "r2_position_mean", "r2_copy_nearest"}
Command = Callable[..., list[object]]


def test_a_clip_table_that_the_command_wrote_is_what_training_reads(workshop: Any) -> None:
    rows = pq.read_table(workshop.table)
    assert rows.num_rows == 26
    assert set(rows["split"].to_pylist()) == {"train", "validation"}
    assert len(set(rows["clip_id"].to_pylist())) == rows.num_rows
    status = workshop.salt.at("teacher").status()
    assert (status.state, status.step, status.exit_reason) == ("finished", 6, "finished")


def test_a_data_sets_folder_does_as_well_as_its_table(
    salt: Any, workshop: Any, pixels: Command, curve: Any
) -> None:
    salt.ok(*pixels("by_table", "--max-steps", 2))
    salt.ok(*salt.train("demo_teacher", "by_folder", "--data", workshop.dataset, "--max-steps", 2))
    by_table, by_folder = (curve(salt.at(name)) for name in ("by_table", "by_folder"))
    assert [row["step"] for row in by_table] == [row["step"] for row in by_folder] == [1, 2, 2]


def test_stage_1_learns_and_its_figures_stand_beside_the_loss(salt: Any, pixels: Command) -> None:
    salt.ok(*pixels("run", "--max-steps", 30, runtime__checkpoint_every=30))
    rows = salt.at("run").metrics("train")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(rows[0].keys() >= R2 | {"loss", "lr", "weight_decay", "grad_norm"} for row in rows)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    held_out = salt.at("run").metrics("val")
    assert [row["step"] for row in held_out] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert all(row.keys() >= R2 | {"loss", "clips"} for row in held_out)
    assert all(math.isfinite(row[name]) and row[name] < 1 for row in [*rows, *held_out] for name in R2)
    assert held_out[-1]["r2_channel_mean"] > held_out[0]["r2_channel_mean"]


def test_a_student_learns_from_its_teachers_cache(salt: Any, student: Command, workshop: Any) -> None:
    salt.ok(*student("run", "--max-steps", 30, runtime__checkpoint_every=30))
    run = salt.at("run")
    losses = [row["loss"] for row in run.metrics("train")]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert run.metrics("val")[-1].keys() >= R2
    pinned = json.loads((run.path / "cache_provenance.json").read_text())
    shown = workshop.salt.json("cache", "show", workshop.cache)
    assert pinned == shown["provenance"] | {"encoding": "float16"}
    assert "held-out clips: the data set's validation split" in run.log_file.read_text()


def test_a_teacher_in_the_loop_gives_what_its_cache_gives(
    salt: Any, student: Command, workshop: Any, curve: Any
) -> None:
    """float16 in the cache is the only difference."""
    views = {"data__view__num_views": 1, "objective__targets": "normalised"}
    salt.ok(*student("cached", "--max-steps", 3, **views))
    source = {"target__provider": "teacher", "target__source": workshop.teacher}
    teacher_in_loop = salt.train(
        *("demo_student", "in_loop", "--data", workshop.table, "--seed", 1, "--max-steps", 3),
        **views,
        **source,
    )
    salt.ok(*teacher_in_loop)
    for cached, in_loop in zip(curve(salt.at("cached")), curve(salt.at("in_loop")), strict=True):
        assert cached["loss"] == pytest.approx(in_loop["loss"], rel=1e-2)


def test_without_a_cache_of_validation_clips_every_tenth_episode_is_held_out(
    salt: Any, workshop: Any, tmp_path: Path
) -> None:
    only_train = tmp_path / "latents"
    shutil.copytree(workshop.cache, only_train, ignore=shutil.ignore_patterns("validation"))
    arguments = ("--data", workshop.table, "--cache", only_train, "--max-steps", 2)
    salt.ok(*salt.train("demo_student", "run", *arguments))
    run = salt.at("run")
    assert "held-out clips: every 10th episode of the training split" in run.log_file.read_text()
    assert run.metrics("val")[-1]["clips"] > 0


def test_workers_change_nothing_but_the_speed(
    salt: Any, workshop: Any, student: Command, curve: Any, weights: Any
) -> None:
    """Read by the main process, and by a worker that decodes for itself."""
    salt.ok(*student("none", "--max-steps", 3, data__num_workers=0, data__store_views="false"))
    answer = salt.run(*student("one", "--max-steps", 3, data__num_workers=1, data__store_views="false"))
    assert answer.code == 0, answer.err
    assert curve(salt.at("none")) == curve(salt.at("one"))
    assert weights(salt.at("none")) == weights(salt.at("one"))


def test_micro_batches_make_the_same_step(salt: Any, student: Command) -> None:
    salt.ok(*student("whole", "--max-steps", 2))
    salt.ok(*student("parts", "--max-steps", 2, grad_accum_steps=2))
    for whole, parts in zip(salt.at("whole").metrics(), salt.at("parts").metrics(), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_the_seed_decides_and_decides_alone(salt: Any, pixels: Command, curve: Any) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        salt.ok(*pixels(name, "--seed", seed, "--max-steps", 2))
    a, b, c = (curve(salt.at(name)) for name in "abc")
    assert a == b
    assert all(mine["loss"] != other["loss"] for mine, other in zip(a, c, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer__lr": 1e-4}, "optimizer.lr: 0.003, not 0.0001"),
        ({"batch_size": 2}, "batch_size: 4, not 2"),
        ({"encoder__depth": 2}, "encoder.depth: 1, not 2"),
    ],
)
def test_other_settings_under_the_same_name_are_refused_by_field(
    salt: Any, pixels: Command, change: dict[str, Any], named: str
) -> None:
    salt.ok(*pixels("run", "--max-steps", 2))
    before = {path: path.read_bytes() for path in salt.at("run").path.rglob("*") if path.is_file()}
    said = salt(*pixels("run", "--max-steps", 4, **change)).sentence
    assert named in said and "another --name" in said
    assert before == {path: path.read_bytes() for path in salt.at("run").path.rglob("*") if path.is_file()}
    assert salt.at("run").status().state == "finished"


def test_another_seed_or_cache_under_the_same_name_is_refused(
    salt: Any, student: Command, workshop: Any, tmp_path: Path
) -> None:
    salt.ok(*student("run", "--max-steps", 2))
    assert "seed: 1, not 2" in salt(*student("run", "--seed", 2)).sentence
    elsewhere = tmp_path / "copy"
    shutil.copytree(workshop.cache, elsewhere)
    assert "target.source" in salt(*student("run", "--cache", elsewhere)).sentence


def test_what_was_measured_at_the_first_start_is_the_records(salt: Any, pixels: Command) -> None:
    """Precision and threads that are left open mean the run's own; others would compute other bits."""
    salt.ok(*pixels("run", "--max-steps", 2))
    before = salt.at("run").config_file.read_bytes()
    left_open = {"runtime__precision": "auto", "runtime__threads": 0, "runtime__device": "auto"}
    salt.ok(*pixels("run", "--max-steps", 3, **left_open))
    assert salt.at("run").config_file.read_bytes() == before
    assert salt.at("run").status().resumed_from == [2]
    said = salt(*pixels("run", "--max-steps", 4, runtime__precision="bfloat16")).sentence
    assert "runtime.precision: 'float32', not 'bfloat16'" in said


def test_what_is_measured_is_written_down(salt: Any, pixels: Command) -> None:
    salt.ok(*pixels("run", "--max-steps", 1, runtime__precision="auto", runtime__device="auto"))
    runtime = json.loads(salt.at("run").config_file.read_text())["runtime"]
    assert runtime["precision"] in ("float32", "bfloat16")
    assert runtime["device"] in ("cpu", "cuda")
