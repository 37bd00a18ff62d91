"""Which configuration a run goes on with, and what is measured at its first start or read back.

Changed settings are told field by field, and refused unless they are free or allowed by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_vla.batches import Batch, Batches
from salt_vla.config import TrainConfig, config_hash, differing_fields, from_json, to_json
from salt_vla.config.files import Difference
from salt_vla.errors import ConfigError, RunError
from salt_vla.loader import load_from
from salt_vla.models.loading import read_tensors, step_directories, write_tensors
from salt_vla.rundir import RunDirectory, root, write_atomically, write_text
from salt_vla.targets import (
    RunningSpace,
    TargetProvider,
    TargetSpace,
    Task,
    has_running_statistics,
    mean_per_position,
)
from salt_vla.training.runtime import apply_runtime, resolve_device, resolve_precision
from salt_vla.training.skipped import SkippedRecords, Tally

STATISTICS_CLIPS = 1024
STATISTICS = "target_statistics.safetensors"
CHANGES = "config_changes.jsonl"
# Measured at the first start: where a resume says `auto` or 0, it means the run's own.
MEASURED = {"device": "auto", "precision": "auto", "threads": 0}


def settle(run: RunDirectory, config: TrainConfig, allowed: Sequence[str] = ()) -> TrainConfig:
    """Settings that the process can work with: those of `config`, with what was measured at the run's first
    start, or with device and threads chosen where it has not begun. Writes nothing.

    Raises `RunError` when the run was started with other settings, unless they are free or below one of
    `allowed` (names of fields or sections).
    """
    _require_fields(allowed)
    if not run.config_file.exists() and step_directories(run.checkpoints):
        raise RunError(
            f"{run.path} has checkpoints but no config.json that says of what; give another --name"
        )
    exists = run.config_file.exists()
    settled = same_config(run, config, allowed) if exists else resolve_device(config)
    apply_runtime(settled)
    return settled


def same_config(run: RunDirectory, wanted: TrainConfig, allowed: Sequence[str] = ()) -> TrainConfig:
    """`wanted` as the run goes on with it. Raises `RunError` with a table of the fields in which it differs
    from the record, beyond those that are free, allowed, or left to be measured."""
    stored = stored_config(run)
    wanted = as_measured(wanted, stored)
    rows = refused(stored, wanted, allowed)
    if rows:
        raise RunError(
            f"run {run.name!r} was started with other settings ({'; '.join(map(str, rows))}); give the "
            f"new settings another --name, or allow them: {' '.join(_flag(row) for row in rows)}\n"
            f"{as_table(rows)}"
        )
    require_same_statistics(run, stored, wanted)
    return wanted


def require_same_statistics(run: RunDirectory, stored: TrainConfig, wanted: TrainConfig) -> None:
    """Raises `RunError` where the statistics of the targets that `run` has are not those that are wanted:
    theirs is another space, or they are of other targets."""
    if _statistics_of(stored) != _statistics_of(wanted):
        raise RunError(
            f"run {run.name!r} has other statistics of its targets than objective.statistics, "
            "objective.targets and target.provider now ask for, and no checkpoint holds those; give the "
            "new settings another --name"
        )


def _statistics_of(config: TrainConfig) -> tuple[bool, bool, str]:
    """What makes them comparable: centring is no space of its own, since R² is scored before it."""
    return has_running_statistics(config), config.objective.targets == "raw", config.target.provider


def refused(stored: TrainConfig, wanted: TrainConfig, allowed: Sequence[str]) -> list[Difference]:
    """The differences that are neither free nor below one of the names `allowed`."""
    return [row for row in differing_fields(stored, wanted) if not row.free and not _allows(allowed, row)]


def _flag(row: Difference) -> str:
    return f"--allow-change {row.field}"


def last_step_of(run: RunDirectory, steps: int, stop_at: int | None) -> int:
    """The step after which to stop: the last, or `stop_at`, but none that is done already. Raises `RunError`
    where more than `steps` are done."""
    done = max((step for step, _ in step_directories(run.checkpoints)), default=0)
    if done > steps:
        raise RunError(
            f"run {run.name!r} has done {done} steps already, more than steps={steps}; ask for more, or "
            f"begin another run from an earlier checkpoint: --branch {run.name}@STEP"
        )
    return max(min(stop_at or steps, steps), done)


def stored_config(run: RunDirectory) -> TrainConfig:
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))


def as_measured(wanted: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """`wanted`, with what it leaves to be measured as it was for `stored`."""
    open_fields = {
        name: getattr(stored.runtime, name)
        for name, left_open in MEASURED.items()
        if getattr(wanted.runtime, name) == left_open
    }
    return replace(wanted, runtime=replace(wanted.runtime, **open_fields))


def _allows(allowed: Sequence[str], row: Difference) -> bool:
    return any(row.field == name or row.field.startswith(f"{name}.") for name in allowed)


def _require_fields(names: Sequence[str]) -> None:
    known = _names(TrainConfig())
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else "docs/recipes.md lists them"
            raise ConfigError(f"--allow-change {name}: there is no such field; {meant}")


def _names(config: Any, prefix: str = "") -> list[str]:
    """Of all fields and sections."""
    names = []
    for f in fields(config):
        value = getattr(config, f.name)
        names.append(f"{prefix}{f.name}")
        names += _names(value, f"{prefix}{f.name}.") if is_dataclass(value) else []
    return names


def as_table(rows: Sequence[Difference]) -> str:
    """Lines of three columns, in plain text."""
    cells = [("field", "before", "now"), *((row.field, f"{row.before}", f"{row.after}") for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def start_of(run: RunDirectory, config: TrainConfig, last_step: int | None = None) -> Path | None:
    """Where the encoder's first weights lie, if there are any and no checkpoint (up to `last_step`) says how
    it went on."""
    steps = [step for step, _ in step_directories(run.checkpoints) if last_step is None or step <= last_step]
    return root() / config.start_from if config.start_from and not steps else None


def prepare(
    run: RunDirectory,
    config: TrainConfig,
    train: Batches,
    provider: TargetProvider,
    allowed: Sequence[str] = (),
) -> tuple[TrainConfig, Task]:
    """What is measured at the first start, or read back: precision, and the statistics of the targets."""
    if run.config_file.exists():
        config = settle(run, config, allowed)
        return config, stored_task(run, config, provider)
    task = Task(provider, _first_space(run, config, train, provider))
    trial = next(load_from(train, 0)).to(config.runtime.device)
    config = resolve_precision(config, trial, task, run.log)
    if config.optimizer.parameters == "bfloat16":
        run.log("warning: parameters in bfloat16 lose most updates (docs/decisions/0003)")
    write_text(run.config_file, to_json(config))
    return config, task


def record_changes(run: RunDirectory, config: TrainConfig, step: int) -> None:
    """`config.json` says what is computed from `step` on; `config_changes.jsonl`, what was before. To be
    written once the checkpoint has been found to fit."""
    stored = stored_config(run)
    rows = differing_fields(stored, config)
    if not rows:
        return
    change = {
        "step": step,
        "config_hash": [config_hash(stored), config_hash(config)],
        "changed": [{"field": row.field, "before": row.before, "after": row.after} for row in rows],
    }
    with (run.path / CHANGES).open("a") as file:
        file.write(json.dumps(change, default=str) + "\n")
    for row in rows:
        run.log(f"from step {step} on {row.field} is {row.after!r}, not {row.before!r}")
    write_text(run.config_file, to_json(config))


def has_another_loss(run: RunDirectory, step: int) -> bool:
    """Whether settings that the loss depends on were changed since a checkpoint of `step` was written."""
    file = run.path / CHANGES
    changes = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    since = [change for change in changes if change["step"] >= step]
    return any(decides_the_loss(row["field"]) for change in since for row in change["changed"])


def decides_the_loss(field: str) -> bool:
    return field.startswith(("objective.", "target.", "masks."))


def trim_metrics(run: RunDirectory, step: int, goes_on: bool) -> None:
    """Drop the lines after `step`; where the run `goes_on` from there, also those that were written at `step`
    because it was cut short there: an unbroken run has none."""
    if not goes_on:
        return run.trim_metrics(step)
    stored = stored_config(run)
    every = {"train": stored.runtime.log_every, "val": stored.runtime.validate_every}

    def is_planned(row: dict[str, Any]) -> bool:
        is_cut = row["step"] == step != stored.steps and row["kind"] in every
        return not (is_cut and step % every[row["kind"]])

    return run.trim_metrics(step, is_planned)


def _first_space(
    run: RunDirectory, config: TrainConfig, train: Batches, provider: TargetProvider
) -> TargetSpace:
    """The mean of training targets per token place, over up to 1,024 clips; kept with the run. Statistics
    that follow the run begin empty."""
    if has_running_statistics(config):
        return _running_space(config, provider)
    device, mode = config.runtime.device, config.objective.targets
    clips = train.canonical(STATISTICS_CLIPS, config.batch_size)
    batches = (batch.to(device) for batch in SkippedRecords(run).watch(clips, Tally()))
    with torch.no_grad():
        mean = mean_per_position((_finite_targets(run, provider, batch) for batch in batches), mode)
    tensors = {"position_mean": mean.cpu().contiguous()}
    write_atomically(_statistics_file(run), lambda path: write_tensors(tensors, path))
    return TargetSpace(mode, mean)


def _finite_targets(run: RunDirectory, provider: TargetProvider, batch: Batch) -> Tensor:
    """Raw targets of the batch without clips that hold an infinity, which would be in every mean."""
    raw = provider.targets(batch.frames, batch.records)
    is_finite = raw.isfinite().flatten(1).all(dim=1)
    for place in (~is_finite).nonzero().flatten().tolist():
        clip, view = batch.keys[place]
        run.log(f"the targets of {clip} (view {view}) are not finite; the statistics are made without them")
    return raw[is_finite]


def _running_space(config: TrainConfig, provider: TargetProvider) -> TargetSpace:
    objective, shape = config.objective, (config.geometry.num_tokens, provider.dim)
    return RunningSpace(objective.targets, shape, objective.statistics_momentum, config.runtime.device)


def stored_task(run: RunDirectory, config: TrainConfig, provider: TargetProvider) -> Task:
    """The task as it was at the first start."""
    if has_running_statistics(config):
        return Task(provider, _running_space(config, provider))
    file = _statistics_file(run)
    mean = read_tensors(file)["position_mean"]
    shape = (config.geometry.num_tokens, provider.dim)
    if mean.shape != shape:
        raise RunError(
            f"{file} holds statistics of targets of {tuple(mean.shape)} tokens and channels, and they are "
            f"{shape} now; give the new settings another --name"
        )
    return Task(provider, TargetSpace(config.objective.targets, mean.to(config.runtime.device)))


def _statistics_file(run: RunDirectory) -> Path:
    return run.path / STATISTICS
