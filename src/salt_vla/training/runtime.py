"""Choosing how to compute: device, threads and precision, measured once and recorded with the run."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.training.learner import build_learner
from salt_vla.training.step import Task, train_step

MIN_SPEEDUP = 1.1  # bfloat16 costs digits; it has to pay.
TRIAL_STEPS = 3


def resolve_device(config: TrainConfig) -> TrainConfig:
    """Fill in device and thread count; `auto` means CUDA where there is one."""
    runtime = config.runtime
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = runtime.threads or len(os.sched_getaffinity(0))
    return replace(config, runtime=replace(runtime, device=device, threads=threads))


def resolve_precision(config: TrainConfig, batch: Batch, task: Task) -> TrainConfig:
    """Time a few steps in float32 and under bfloat16 autocast, and keep the faster: measured, not guessed.

    The trial uses networks of its own, so the run's first step is what it would have been.
    """
    if config.runtime.precision != "auto":
        return config
    seconds = {name: _trial(config, batch, task, name) for name in ("float32", "bfloat16")}
    chosen = "bfloat16" if seconds["bfloat16"] * MIN_SPEEDUP < seconds["float32"] else "float32"
    return _with_precision(config, chosen)


def _with_precision(config: TrainConfig, name: str) -> TrainConfig:
    return replace(config, runtime=replace(config.runtime, precision=name))  # type: ignore[arg-type]


def _trial(config: TrainConfig, batch: Batch, task: Task, precision: str) -> float:
    config = _with_precision(config, precision)
    learner = build_learner(config, task.provider.dim, config.runtime.device)
    best = float("inf")
    for _ in range(TRIAL_STEPS):
        started = time.perf_counter()
        train_step(learner, batch, task, config, 0)
        best = min(best, time.perf_counter() - started)
    return best
