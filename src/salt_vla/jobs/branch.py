"""`train --branch RUN@STEP`: a new run that goes on from another run's checkpoint with other rates.

So one long run at a constant rate is cooled down to many budgets. Knows files, not what is in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from salt_vla.config import TrainConfig, differing_fields, to_json
from salt_vla.errors import RunError
from salt_vla.models.loading import step_directories
from salt_vla.rundir import RunDirectory, Status, read_json, to_json_line, writing_to
from salt_vla.training.checkpoint import STATE
from salt_vla.training.resume import (
    STATISTICS,
    as_measured,
    as_table,
    decides_the_loss,
    refused,
    require_same_statistics,
    stored_config,
)

RECORD = "branch.json"
# What a branch may change unasked: how long it is, and the rates of its steps.
MAY_CHANGE = (
    "steps",
    "optimizer.lr_start",
    "optimizer.lr",
    "optimizer.lr_final",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.weight_decay_final",
    "optimizer.schedule",
    "optimizer.cooldown_steps",
)


def branch(run: RunDirectory, config: TrainConfig, source: str, allowed: Sequence[str] = ()) -> None:
    """Make `run` out of `source` (RUN@STEP) and `config`, unless that has been done before.

    The new run appears whole, with the checkpoint, what was measured or pinned at the source's start, and
    its metrics up to the step. Raises `RunError` where there is no such checkpoint, or where settings differ
    in more than `MAY_CHANGE` and `allowed`.
    """
    origin, step, checkpoint = look_at_branch(run, source)
    if checkpoint is None:
        return
    stored = stored_config(origin)
    config = as_measured(config, stored)
    rows = refused(stored, config, (*MAY_CHANGE, *allowed))
    if rows:
        raise RunError(
            f"a branch of {origin.name!r} has the same settings but for its steps and rates, not other "
            f"{', '.join(row.field for row in rows)}\n{as_table(rows)}"
        )
    require_same_statistics(origin, stored, config)
    if config.steps <= step:
        raise RunError(f"a branch from step {step} needs steps={step + 1} or more, not {config.steps}")
    changed = {row.field: [row.before, row.after] for row in differing_fields(stored, config)}
    record = {"run": origin.name, "step": step, "changed": changed}
    with writing_to(run.path):
        _write(run, origin, checkpoint, step, to_json(config), record, list(changed))


def look_at_branch(run: RunDirectory, source: str) -> tuple[RunDirectory, int, Path | None]:
    """The run, step and checkpoint that `source` (RUN@STEP) names; no checkpoint where `run` is that branch
    already. Raises `RunError` where there is no such checkpoint, or `run` is something else."""
    origin, step = _parse(source)
    has_begun = run.config_file.exists()
    if has_begun or run.checkpoints.exists() or (run.path / RECORD).exists():
        _require_the_same(run, origin.name, step)
    return origin, step, None if has_begun else _checkpoint(origin.require(), step)


def _write(
    run: RunDirectory,
    origin: RunDirectory,
    checkpoint: Path,
    step: int,
    config: str,
    record: dict[str, object],
    changed: Sequence[str],
) -> None:
    unfinished = RunDirectory(run.path.with_name(f".branching-{run.name}"))
    shutil.rmtree(unfinished.path, ignore_errors=True)
    copied = unfinished.checkpoints / checkpoint.name
    shutil.copytree(checkpoint, copied)
    # The best so far was another run's, and no earlier checkpoint comes along to go back to.
    own: dict[str, int | float | None] = {
        "best_step": 0,
        "best_r2": None,
        "safe_step": step,
        "planned_step": step,
    }
    if any(map(decides_the_loss, changed)):
        own |= {"mean_loss": 0.0, "losses_seen": 0}
    (copied / STATE).write_text(json.dumps(read_json(copied / STATE, dict) | own))
    for file in [*origin.path.glob("*_provenance.json"), origin.path / STATISTICS]:
        if file.exists():
            shutil.copyfile(file, unfinished.path / file.name)
    rows = [row for row in origin.metrics() if row["step"] <= step]
    unfinished.metrics_file.write_text("".join(to_json_line(row) + "\n" for row in rows))
    (unfinished.path / RECORD).write_text(json.dumps(record, indent=2, default=str))
    unfinished.set_status(Status("queued", step=step, branched_from=f"{origin.name}@{step}"))
    unfinished.config_file.write_text(config)
    if run.path.exists():
        _move_into(unfinished, run)
    else:
        unfinished.path.rename(run.path)
    run.log(f"branched from {origin.name} at step {step}: {record['changed']}")


def _move_into(unfinished: RunDirectory, run: RunDirectory) -> None:
    """Into the folder that a launch has made, which has a log already: first what names the branch, last what
    makes a run of it, so that one which is cut off is made again."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # Of one that was cut off.
    order = {RECORD: 0, run.config_file.name: 2}
    for path in sorted(unfinished.path.iterdir(), key=lambda path: order.get(path.name, 1)):
        path.rename(run.path / path.name)
    unfinished.path.rmdir()


def _parse(source: str) -> tuple[RunDirectory, int]:
    name, at, step = source.rpartition("@")
    if not at or not step.isdigit():
        raise RunError(f"--branch {source!r} is not of the form RUN@STEP, such as long@400")
    return RunDirectory.named(name), int(step)


def _checkpoint(origin: RunDirectory, step: int) -> Path:
    there = dict(step_directories(origin.checkpoints))
    if step not in there:
        kept = ", ".join(map(str, there)) or "none"
        raise RunError(
            f"run {origin.name!r} keeps no checkpoint of step {step}, only of {kept}; "
            "runtime.keep_every keeps more of the next run's"
        )
    return there[step]


def _require_the_same(run: RunDirectory, origin: str, step: int) -> None:
    file = run.path / RECORD
    record = read_json(file, dict) if file.exists() else {}
    if (record.get("run"), record.get("step")) != (origin, step):
        before = f"branched from {record['run']}@{record['step']}" if record else "begun on its own"
        raise RunError(f"run {run.name!r} was {before}, not from {origin}@{step}; give another --name")
