"""Real infinities, real rates that are too large, real time limits: what a run does about each."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from salt_vla.cache import CacheWriter, Record, open_cache
from salt_vla.models.loading import load_encoder

Command = Callable[..., list[object]]


def with_infinity(cache: Path, folder: Path, poisoned: int) -> set[str]:
    """A copy of the cache in which so many training clips have overflown float16; which. Ours are refused
    when they are written, so the writer is made to look away."""
    original = open_cache(cache)
    clips = set(list(original.clip_ids)[:: len(original.clip_ids) // poisoned][:poisoned])
    with (
        pytest.MonkeyPatch.context() as patch,
        CacheWriter(folder, original.manifest, original.clip_ids) as writer,
    ):
        patch.setattr(np, "isfinite", np.ones_like)
        for shard in writer.pending():
            arrays = {key: original.read(key[0], view=key[1]).copy() for key in shard.keys}
            for key, array in arrays.items():
                array[3, 5] = np.inf if key[0] in clips else array[3, 5]
            writer.write_shard(shard, [Record(key, array) for key, array in arrays.items()])
        writer.finish()
    shutil.copytree(cache / "validation", folder / "validation")
    return clips


def checkpoints(run: Any) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(run.checkpoints.glob("step_*"))]


def test_an_infinity_in_the_cache_costs_its_steps_and_no_weights(
    salt: Any, student: Command, workshop: Any, tmp_path: Path
) -> None:
    clips = with_infinity(workshop.cache, tmp_path / "poisoned", poisoned=1)
    salt.ok(*student("run", "--cache", tmp_path / "poisoned", "--max-steps", 20))
    run = salt.at("run")
    rows = run.metrics("train")
    assert [row["step"] for row in rows] == list(range(1, 21))
    bad = [row["step"] for row in rows if row["loss"] is None]
    assert 1 <= len(bad) <= 8
    assert rows[-1]["bad_steps"] == len(bad) and "rollbacks" in rows[-1]
    assert all((row["changed_share"] == 0) == (row["step"] in bad) for row in rows)
    log = run.log_file.read_text()
    assert log.count("left the weights as they were: the loss is nan") == len(bad)
    assert all(f"the targets of {clip} (view 0) are not finite" in log for clip in clips)
    assert next(iter(clips)) in log.split("left the weights", 1)[1].splitlines()[0]
    state = json.loads((run.checkpoints / "step_00000020" / "state.json").read_text())
    assert (state["bad_steps"], state["missed_updates"]) == (len(bad), len(bad))
    held_out = run.metrics("val")
    assert all(np.isfinite(row["r2_position_mean"]) for row in held_out)
    assert held_out[-1]["loss"] < held_out[0]["loss"]


def test_asked_to_stop_at_a_bad_step_it_does(
    salt: Any, student: Command, workshop: Any, tmp_path: Path
) -> None:
    with_infinity(workshop.cache, tmp_path / "poisoned", poisoned=8)
    cache = ("--cache", tmp_path / "poisoned")
    said = salt(*student("run", *cache, "--max-steps", 20, guards__on_bad_step="stop")).sentence
    assert "the loss is nan at step" in said and "lower optimizer.lr" in said
    status = salt.at("run").status()
    assert status.state == "failed" and "the loss is nan" in status.exit_reason


def test_bad_steps_in_a_row_turn_the_run_back_to_its_checkpoint_and_on_with_other_clips(
    salt: Any, student: Command, workshop: Any, tmp_path: Path, curve: Any, weights: Any
) -> None:
    """And once more in one go after a kill: a rollback is as repeatable as the rest."""
    with_infinity(workshop.cache, tmp_path / "poisoned", poisoned=8)
    settings = {"guards__rollback_after": 2, "guards__max_rollbacks": 100, "runtime__checkpoint_every": 3}
    command = ("--cache", tmp_path / "poisoned", "--max-steps", 12)
    salt.ok(*student("run", *command, **settings))
    run = salt.at("run")
    rows = run.metrics()
    steps = [(row["kind"], row["step"]) for row in rows]
    assert len(steps) == len(set(steps))
    assert [row["step"] for row in run.metrics("train")] == list(range(1, 13))
    last = run.metrics("train")[-1]
    assert last["rollbacks"] >= 1 and last["bad_steps"] >= 2 * last["rollbacks"]
    log = run.log_file.read_text()
    assert log.count("and on with other clips") == last["rollbacks"]
    state = json.loads((run.checkpoints / "step_00000012" / "state.json").read_text())
    assert state["batches_passed"] >= 2 * last["rollbacks"] and state["rollbacks"] == last["rollbacks"]
    # Never two bad steps in a row are left in the curve.
    losses = [row["loss"] for row in run.metrics("train")]
    assert not any(a is None and b is None for a, b in pairwise(losses))
    for stop in (2, 5, 7, 12):
        salt.ok(*student("parts", *command[:2], "--max-steps", stop, **settings))
    assert curve(run) == curve(salt.at("parts"))
    assert weights(run) == weights(salt.at("parts"))


def test_a_rate_that_ruins_the_weights_ends_the_run_with_a_sentence(salt: Any, student: Command) -> None:
    settings = {"optimizer__lr": 1e18, "guards__rollback_after": 2, "guards__max_rollbacks": 2}
    said = salt(*student("run", **settings)).sentence
    assert "2 bad steps in a row" in said and "after 2 return(s)" in said and "lower optimizer.lr" in said
    run = salt.at("run")
    assert run.status().state == "failed"
    steps = [(row["kind"], row["step"]) for row in run.metrics()]
    assert len(steps) == len(set(steps))


def test_a_collapse_is_said_or_ends_the_run(salt: Any, student: Command) -> None:
    alarm = {"guards__collapse_rank": 1000.0, "optimizer__warmup_steps": 4}
    salt.ok(*student("warned", "--max-steps", 6, **alarm))
    rows = salt.at("warned").metrics("train")
    assert [row["step"] for row in rows if row.get("collapse")] == [5, 6]
    assert "collapse at step 5: the predictions' effective rank" in salt.at("warned").log_file.read_text()
    assert (
        salt.at("warned").log_file.read_text().count("collapse at step") == 1
    )  # Said once, not at every line.
    said = salt(*student("stopped", "--max-steps", 6, **alarm, guards__on_collapse="stop")).sentence
    assert "collapse at step 5" in said and "objective.variance_weight" in said


def test_before_its_time_is_over_it_writes_a_checkpoint_and_says_so(
    salt: Any, pixels: Command, curve: Any
) -> None:
    """The limit counts from the start of this process, which has run for a while."""
    settings = {"runtime__checkpoint_every": 10_000, "steps": 100_000, "runtime__validate_every": 10_000}
    minutes = (time.time() - psutil.Process().create_time() + 6) / 60
    stopped = salt(*pixels("run", **settings, runtime__time_limit_minutes=minutes))
    assert stopped.code == 75
    assert "salt-vla: stopped: time limit, at step" in stopped.err
    assert "the same command goes on from there" in stopped.err
    run = salt.at("run")
    shown = salt.json("runs", "show", "run")
    assert shown["state"] == "stopped" and "time limit" in shown["exit_reason"]
    assert checkpoints(run) == [shown["step"]] and shown["step"] > 0
    # Another limit is another way of doing the same: the run goes on.
    salt.ok(*pixels("run", "--max-steps", shown["step"] + 2, **settings))
    assert [row["step"] for row in run.metrics("train")] == list(range(1, shown["step"] + 3))
    said = salt(*pixels("run", **settings, runtime__time_limit_minutes=1e-4)).sentence
    assert "leaves no time for a step" in said
    assert run.status().state == "finished"


def test_a_step_that_hangs_ends_the_run_with_its_stack_in_the_log(salt: Any, student: Command) -> None:
    """Stopped from outside in the middle of its work, as by a driver that does not answer."""
    program = """
import sys, time
import salt_vla.training.loop as loop
made = loop.train_step
def train_step(*arguments):
    if arguments[4] == 3:
        time.sleep(600)
    return made(*arguments)
loop.train_step = train_step
from salt_vla.cli import main
sys.exit(main())
"""
    command = student("run", runtime__watchdog_seconds=5, runtime__checkpoint_every=2)
    process = salt.start_python(program, *command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 70
    assert "step 4 took more than 5 s" in said
    shown = salt.json("runs", "show", "run")
    assert shown["state"] == "failed" and shown["exit_reason"].startswith("hung: step 4 took more than 5 s")
    assert "in train_step" in salt.at("run").log_file.read_text()
    salt.ok(*student("run", "--max-steps", 5, runtime__checkpoint_every=2))
    assert [row["step"] for row in salt.at("run").metrics("train")] == [1, 2, 3, 4, 5]


def test_the_best_checkpoint_is_kept_and_can_be_loaded(salt: Any, student: Command) -> None:
    settings = {"runtime__keep_checkpoints": 1, "runtime__checkpoint_every": 3}
    # At the end the rate is ruinous, so that the best is not the last.
    ruin = {"optimizer__lr_final": 3.0, "steps": 20, "runtime__keep_every": 6}
    salt.ok(*student("run", **settings, **ruin))
    run = salt.at("run")
    scores = {row["step"]: row["r2_position_mean"] for row in run.metrics("val")}
    best = max(scores, key=lambda step: scores[step])
    assert best < 20
    assert (run.checkpoints / "best").resolve().name == f"step_{best:08d}"
    assert checkpoints(run) == sorted({6, 12, 18, 20, best})
    state = json.loads((run.checkpoints / "step_00000020" / "state.json").read_text())
    assert (state["best_step"], state["best_r2"]) == (best, scores[best])
    encoder = load_encoder(run.checkpoints / "best")
    assert encoder.config == load_encoder(run.path).config


def test_the_average_of_the_weights_is_scored_saved_and_resumed(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    settings = {"optimizer__average": 0.9}
    salt.ok(*student("whole", "--max-steps", 8, **settings))
    for stop in (3, 8):
        salt.ok(*student("parts", "--max-steps", stop, **settings))
    whole, parts = salt.at("whole"), salt.at("parts")
    assert curve(whole)[-1] == curve(parts)[-1]
    row = whole.metrics("val")[-1]
    assert {"avg_loss", "avg_r2_position_mean"} <= row.keys() and row["avg_loss"] != row["loss"]
    assert weights(whole) == weights(parts)
    folder = whole.checkpoints / "step_00000008"
    plain, averaged = (load_encoder(path).state_dict() for path in (folder, folder / "average"))
    assert plain.keys() == averaged.keys()
    assert (folder / "average" / "encoder.safetensors").read_bytes() == (
        parts.checkpoints / "step_00000008" / "average" / "encoder.safetensors"
    ).read_bytes()
    assert any(not (plain[name] == averaged[name]).all() for name in plain)
    salt.ok(*student("without", "--max-steps", 8))
    losses = {name: [row["loss"] for row in salt.at(name).metrics("train")] for name in ("whole", "without")}
    assert losses["whole"] == losses["without"]  # It looks on and changes nothing.


def test_slurms_warning_is_a_polite_stop(salt: Any, pixels: Command) -> None:
    settings = {"runtime__checkpoint_every": 10_000, "steps": 100_000, "runtime__validate_every": 10_000}
    run = salt.at("run")
    process = salt.start(*pixels("run", **settings))
    while not (run.metrics_file.exists() and run.metrics("train")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 at step" in said
    assert checkpoints(run) == [run.status().step]
