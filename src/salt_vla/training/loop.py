"""The loop: from a run directory to a finished run, and from any interruption back to the same curve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from salt_vla.batches import Batch, Batches
from salt_vla.config import TrainConfig, differing_fields, from_json, to_json
from salt_vla.errors import RunError
from salt_vla.interrupts import StopFlag, Stopped, stop_on_signals
from salt_vla.loader import Loading, load_from
from salt_vla.models.loading import read_tensors, step_directories, write_tensors
from salt_vla.progress import progress
from salt_vla.rundir import RunDirectory, Status, write_atomically, write_text
from salt_vla.targets import TargetProvider, TargetSpace, Task, mean_per_position
from salt_vla.training.checkpoint import (
    CheckpointWriter,
    corrupt_records_until,
    restore_latest,
    sweep_unfinished,
)
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.runtime import resolve_device, resolve_precision
from salt_vla.training.skipped import SkippedRecords, Tally
from salt_vla.training.step import train_step, validate

STATISTICS_CLIPS = 1024


def fit(
    run: RunDirectory,
    config: TrainConfig,
    train: Batches,
    validation: Batches,
    provider: TargetProvider,
    stop_at: int | None = None,
    note: str = "",
) -> Status:
    """Train until `stop_at` (default: all of `config.steps`), resuming from the run's last checkpoint; `note`
    goes into the log.

    `stop_at` cuts a run short without touching its schedules. Raises `Stopped` after SIGINT or SIGTERM, with
    a checkpoint written. What is wrong with the settings is said before the run is touched.
    """
    last_step = min(stop_at or config.steps, config.steps)
    config = settle(run, config)
    learner = build_learner(config, provider.dim, config.runtime.device)
    status = run.claim(last_step)
    try:
        config, task = prepare(run, config, train, provider)
        sweep_unfinished(run.checkpoints)
        provider.begin(learner.encoder)
        step = restore_latest(learner, task, run.checkpoints)
        run.trim_metrics(step)
        goes_on = 0 < step < last_step
        resumed = [*status.resumed_from, step] if goes_on else status.resumed_from
        status = replace(status, step=step, resumed_from=resumed)
        run.set_status(status)
        run.log(f"{'resumed at' if step else 'started,'} step {step}; {config.runtime}{note and f'; {note}'}")
        with stop_on_signals() as stop:
            status = _steps(run, config, train, validation, task, learner, status, last_step, stop)
    except Stopped as stopped:
        run.set_status(replace(run.status(), state="stopped", exit_reason=str(stopped)))
        raise
    except KeyboardInterrupt:
        # A second Ctrl-C does not wait for the step's end: the last checkpoint is what a resume starts from.
        run.set_status(replace(run.status(), state="stopped", exit_reason="interrupted within a step"))
        raise
    except BaseException as error:
        run.log(f"failed: {error!r}")
        run.set_status(replace(run.status(), state="failed", exit_reason=f"{type(error).__name__}: {error}"))
        raise
    status = replace(status, state="finished", exit_reason="finished")
    run.set_status(status)
    run.log(f"finished at step {status.step}")
    return status


def _steps(
    run: RunDirectory,
    config: TrainConfig,
    train: Batches,
    validation: Batches,
    task: Task,
    learner: Learner,
    status: Status,
    last_step: int,
    stop: StopFlag,
) -> Status:
    runtime = config.runtime
    start = time.monotonic() - status.seconds
    saver = CheckpointWriter(run.checkpoints, runtime.keep_checkpoints)
    skipped = SkippedRecords(run)
    tally = Tally(status.step * config.batch_size, corrupt_records_until(run.checkpoints))
    loaded = load_from(train, status.step, Loading.of(config))
    batches = skipped.watch(loaded, tally)
    figures = ""
    with progress(f"Training {run.name}", last_step, "steps", done=status.step) as advance:
        for step, batch, waited in _timed(batches, status.step, last_step):
            began = time.monotonic()
            last = step == last_step
            logged = last or step % runtime.log_every == 0
            row = train_step(learner, batch.to(runtime.device), task, config, step - 1, scored=logged)
            if logged:
                row |= {"data_wait_s": round(waited, 4), "step_s": round(time.monotonic() - began, 4)}
                run.log_metrics(row | tally.as_row())
                figures = f"loss {row['loss']:.3f}, R² over place means {row['r2_position_mean']:+.3f}"
                figures += f", {tally.corrupt} damaged records skipped" * bool(tally.corrupt)
            stopping = bool(stop)  # Asked once a step: a signal from here on waits for the next step's end.
            if runtime.validation_clips and (last or step % runtime.validate_every == 0):
                of_pass = Tally()
                held_out = validation.canonical(runtime.validation_clips, config.batch_size)
                good = skipped.watch(held_out, of_pass)
                row = validate(learner, good, task, config, step, runtime.device)
                run.log_metrics(row | of_pass.as_row())
            if last or stopping or step % runtime.checkpoint_every == 0:
                saver.save(learner, task, step, tally.corrupt)
                status = replace(status, step=step, seconds=time.monotonic() - start)
                run.set_status(status)
            advance(1, note=figures)
            if stopping and not last:
                saver.wait()
                stop.check(f"at step {step} of {last_step}")
    saver.wait()
    return status


def _timed(batches: Iterator[Batch], done: int, last_step: int) -> Iterator[tuple[int, Batch, float]]:
    """(step from 1, batch, seconds waited for it) up to `last_step`."""
    for step in range(done + 1, last_step + 1):
        began = time.monotonic()
        batch = next(batches)
        yield step, batch, time.monotonic() - began


def settle(run: RunDirectory, config: TrainConfig) -> TrainConfig:
    """Settings that the process can work with: the run's own where it has begun, else with device and
    threads chosen. Writes nothing.

    Raises `RunError` when the run directory was made with another configuration.
    """
    if not run.config_file.exists() and step_directories(run.checkpoints):
        raise RunError(
            f"{run.path} has checkpoints but no config.json that says of what; give another --name"
        )
    settled = same_config(run, config) if run.config_file.exists() else resolve_device(config)
    _apply(settled)
    return settled


def prepare(
    run: RunDirectory, config: TrainConfig, train: Batches, provider: TargetProvider
) -> tuple[TrainConfig, Task]:
    """What is measured at the first start, or read back: precision, and the statistics of the targets."""
    if run.config_file.exists():
        config = settle(run, config)
        return config, Task(provider, _stored_space(run, config))
    task = Task(provider, _measure_space(run, config, train, provider))
    trial = train[0].to(config.runtime.device)
    config = resolve_precision(config, trial, task)
    write_text(run.config_file, to_json(config))
    return config, task


def _apply(config: TrainConfig) -> None:
    torch.set_num_threads(config.runtime.threads)
    torch.backends.cudnn.benchmark = config.runtime.cudnn_benchmark
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "this run was started on a CUDA GPU and there is none now; start a new run for this machine"
        )


def same_config(run: RunDirectory, wanted: TrainConfig) -> TrainConfig:
    """The run's recorded configuration. Raises `RunError` naming each field that `wanted` sets otherwise;
    `runtime` is the record's, since it was measured."""
    stored = from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))
    differing = differing_fields(stored, replace(wanted, runtime=stored.runtime))
    if differing:
        raise RunError(
            f"run {run.name!r} was started with other settings ({'; '.join(map(str, differing))}); "
            "give the new settings another --name"
        )
    return stored


def _measure_space(
    run: RunDirectory, config: TrainConfig, train: Batches, provider: TargetProvider
) -> TargetSpace:
    """The mean of training targets per token place, over up to 1,024 clips; kept with the run."""
    device, mode = config.runtime.device, config.objective.targets
    clips = train.canonical(STATISTICS_CLIPS, config.batch_size)
    batches = (batch.to(device) for batch in SkippedRecords(run).watch(clips, Tally()))
    with torch.no_grad():
        mean = mean_per_position((provider.targets(b.frames, b.records) for b in batches), mode)
    tensors = {"position_mean": mean.cpu().contiguous()}
    write_atomically(_statistics_file(run), lambda path: write_tensors(tensors, path))
    return TargetSpace(mode, mean)


def _stored_space(run: RunDirectory, config: TrainConfig) -> TargetSpace:
    mean = read_tensors(_statistics_file(run))["position_mean"]
    return TargetSpace(config.objective.targets, mean.to(config.runtime.device))


def _statistics_file(run: RunDirectory) -> Any:
    return run.path / "target_statistics.safetensors"
