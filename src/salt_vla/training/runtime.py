"""Choosing how to compute: device, threads and precision, measured once and recorded with the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.errors import ConfigError, RunError
from salt_vla.rundir import num_cores, void
from salt_vla.targets import Task
from salt_vla.training.learner import build_learner
from salt_vla.training.step import train_step

MIN_SPEEDUP = 1.1  # bfloat16 costs digits; it has to pay.
TRIAL_STEPS = 5
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def resolve_device(config: TrainConfig) -> TrainConfig:
    """Fill in device and thread count; `auto` means CUDA where there is one. Raises `ConfigError` for a
    device that is not there."""
    runtime = config.runtime
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds shapes and no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")  # Then backends, for pages.
        raise ConfigError(f"runtime.device {device!r} cannot be used here ({reason}); try auto") from error
    threads = runtime.threads or num_cores()
    return replace(config, runtime=replace(runtime, device=device, threads=threads))


def apply_runtime(config: TrainConfig) -> None:
    """Set what torch computes with. Raises `RunError` for a run of a GPU where there is none."""
    runtime = config.runtime
    torch.set_num_threads(runtime.threads)
    torch.backends.cudnn.benchmark = runtime.cudnn_benchmark
    torch.set_float32_matmul_precision("high" if runtime.allow_tf32 else "highest")
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Else cuBLAS refuses.
    torch.use_deterministic_algorithms(runtime.deterministic)
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "this run was started on a CUDA GPU and there is none now; start a new run for this machine"
        )


def resolve_precision(
    config: TrainConfig, batch: Batch, task: Task, say: Callable[[str], None] = void
) -> TrainConfig:
    """Time a few steps in float32 and under bfloat16 autocast, and keep the faster: measured, not guessed.
    `say` is told what was measured.

    The trial uses networks of its own, so the run's first step is what it would have been.
    """
    if config.runtime.precision != "auto":
        return config
    trials = {name: _with_precision(config, name) for name in PRECISIONS}
    if config.optimizer.parameters == "bfloat16":
        return trials["bfloat16"]
    learners = {name: build_learner(config, task.provider.dim, config.runtime.device) for name in PRECISIONS}
    task.begin(learners["float32"].encoder)
    seconds = dict.fromkeys(PRECISIONS, float("inf"))
    # In turn, and the best of several: a neighbour that comes and goes must not decide.
    for _ in range(TRIAL_STEPS):
        for name in PRECISIONS:
            started = time.perf_counter()
            train_step(learners[name], batch, task, trials[name], 0, scored=False)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    chosen: Precision = "bfloat16" if seconds["bfloat16"] * MIN_SPEEDUP < seconds["float32"] else "float32"
    measured = ", ".join(f"{name} {1000 * each:.1f} ms" for name, each in seconds.items())
    say(f"precision {chosen}: a step takes {measured} (bfloat16 has to be {MIN_SPEEDUP} times as fast)")
    return trials[chosen]


def _with_precision(config: TrainConfig, name: Precision) -> TrainConfig:
    return replace(config, runtime=replace(config.runtime, precision=name))
