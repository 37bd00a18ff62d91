"""`train --plan` and `train --find-batch`: what a run will take, before it takes anything.

Starts no training and writes nothing; every figure is arithmetic, and says what it assumes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from typing import Any

from salt_vla.config import TrainConfig, parse_bytes
from salt_vla.errors import ConfigError
from salt_vla.jobs.resources import Fitting, existing_parent, memory_of, target_size
from salt_vla.masks import build_masks
from salt_vla.progress import duration
from salt_vla.rundir import root
from salt_vla.training.flops import Flops, mean_step_flops
from salt_vla.training.memory import (
    StepMemory,
    checkpoint_bytes,
    host_memory,
    parameters,
    shared_memory,
)

ASSUMED_TFLOPS = (
    150.0  # a GPU, sustained; `benchmarks/train_step.py` measures. Of a processor none is assumed.
)
WARM_UP = (0.01, 0.05)  # the share of the steps that recipes which work spend on it
TIME = "time"  # The row of a rate that is not known, which a measurement takes the place of.
WAYS = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainPlan:
    """A run on `gpus` devices, before it begins. Bytes, floating-point operations, clips a second;
    `tflops` is None where nothing can be assumed: of a processor."""

    gpus: int
    device: str
    batch_size: int
    per_gpu: int
    micro_batch: int
    steps: int
    parameters: dict[str, int]
    memory: dict[str, StepMemory]
    flops: Flops
    tflops: float | None
    bytes_a_clip: int
    shared_bytes: int
    host_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    free_disk: int
    warnings: list[str]

    @property
    def exaflops(self) -> float:
        return self.flops.total * self.batch_size * self.steps / 1e18

    @property
    def clips_per_second(self) -> float | None:
        """That `gpus` devices work through at the assumed rate, and that loaders must bring."""
        return None if self.tflops is None else self.gpus * self.tflops * 1e12 / self.flops.total

    @property
    def seconds(self) -> float | None:
        """Of the whole schedule, at that rate."""
        rate = self.clips_per_second
        return None if rate is None else self.steps * self.batch_size / rate

    def as_json(self) -> dict[str, Any]:
        rate, seconds = self.clips_per_second, self.seconds
        return {
            "gpus": self.gpus,
            "device": self.device,
            "batch_size": self.batch_size,
            "per_gpu": self.per_gpu,
            "micro_batch": self.micro_batch,
            "steps": self.steps,
            "clips": self.steps * self.batch_size,
            "parameters": self.parameters,
            "memory": {
                way: memory.parts | {"total": memory.total, "of_clip": memory.of_clip}
                for way, memory in self.memory.items()
            },
            "flops_per_clip": self.flops.parts | {"total": self.flops.total},
            "flops_per_step": self.flops.total * self.batch_size,
            "exaflops": self.exaflops,
            "assumed_tflops_per_gpu": self.tflops,
            "clips_per_second": rate,
            "bytes_per_second": None if rate is None else rate * self.bytes_a_clip,
            "hours": None if seconds is None else seconds / 3600,
            "shared_bytes": self.shared_bytes,
            "host_bytes": self.host_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints": self.checkpoints,
            "disk_bytes": self.checkpoint_bytes * self.checkpoints,
            "free_disk": self.free_disk,
            "warnings": self.warnings,
        }


def plan_training(config: TrainConfig, gpus: int | None = None, tflops: float | None = None) -> TrainPlan:
    """The plan, with neither `gpus` nor `tflops` for one device of this machine. Raises `ConfigError` for
    fewer than one device, or a rate that is none."""
    if (gpus is not None and gpus < 1) or not (tflops is None or 0 < tflops < math.inf):
        raise ConfigError(f"--gpus must be at least 1 and --tflops positive, not {gpus} and {tflops}")
    config = _on(config, gpus, tflops)
    gpus, device = gpus or 1, config.runtime.device
    if tflops is None and device.startswith("cuda"):
        tflops = ASSUMED_TFLOPS
    target, masks = target_size(config), build_masks(config.masks, config.geometry)
    memory = {way: memory_of(_shared_by(config, way), gpus) for way in (WAYS if gpus > 1 else WAYS[:1])}
    counted = parameters(config, target.dim)
    rows = -(-config.batch_size // gpus)
    whole = checkpoint_bytes(config, target.dim)
    kept = config.steps // config.runtime.keep_every if config.runtime.keep_every else 0
    few = replace(config, batch_size=min(config.batch_size, 64), grad_accum_steps=1)
    plan = TrainPlan(
        gpus=gpus,
        device=device,
        batch_size=config.batch_size,
        per_gpu=rows,
        micro_batch=-(-rows // config.grad_accum_steps),
        steps=config.steps,
        parameters={"encoder": counted.encoder, "predictor": counted.predictor},
        memory=memory,
        flops=mean_step_flops(few, target.dim, masks),
        tflops=tflops,
        bytes_a_clip=config.geometry.clip_bytes + target.record_bytes,
        shared_bytes=gpus * shared_memory(config, target.record_bytes, gpus),
        host_bytes=gpus * host_memory(config, target.dim, target.record_bytes, gpus),
        checkpoint_bytes=whole,
        # The last ones, the best, those for good, and the one that is being written.
        checkpoints=config.runtime.keep_checkpoints + kept + 2,
        free_disk=shutil.disk_usage(existing_parent(root())).free,
        warnings=[],
    )
    return replace(plan, warnings=_warnings(config, plan))


def _on(config: TrainConfig, gpus: int | None, tflops: float | None) -> TrainConfig:
    """With `gpus` or `tflops`, `auto` is planned as a GPU, which need not be here."""
    runtime = config.runtime
    device, precision = runtime.device, runtime.precision
    if (gpus or 1) > 1 or (device == "auto" and (gpus, tflops) != (None, None)):
        device = "cuda"
    elif device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bfloat16" if device.startswith("cuda") else "float32"
    return replace(config, runtime=replace(runtime, device=device, precision=precision))


def _shared_by(config: TrainConfig, way: Any) -> TrainConfig:
    return replace(config, runtime=replace(config.runtime, parallel=way))


def _warnings(config: TrainConfig, plan: TrainPlan) -> list[str]:
    said = []
    parts = plan.gpus * config.grad_accum_steps
    if config.batch_size % parts:
        said.append(
            f"batch_size {config.batch_size} is no multiple of {plan.gpus} GPUs × "
            f"{config.grad_accum_steps} micro-batches; training would refuse it"
        )
    share = config.optimizer.warmup_steps / config.steps
    if not WARM_UP[0] <= share <= WARM_UP[1]:
        said.append(
            f"the warm-up takes {share:.1%} of the steps; {WARM_UP[0]:.0%} to {WARM_UP[1]:.0%} is usual"
        )
    limit = config.runtime.memory_limit
    if limit:
        for way, memory in plan.memory.items():
            if memory.total > parse_bytes(limit):
                said.append(f"{way} needs {memory.total / 1e9:.1f} GB a GPU, beyond the limit of {limit}")
    disk = plan.checkpoint_bytes * plan.checkpoints
    if disk > plan.free_disk:
        said.append(
            f"checkpoints take {disk / 1e9:.1f} GB and {plan.free_disk / 1e9:.1f} GB are free at {root()}"
        )
    if config.target.provider == "teacher":
        said.append("the teacher that runs in the loop is in no figure: neither its memory nor its work")
    return said


def describe(plan: TrainPlan) -> list[dict[str, str]]:
    """Rows for a person."""
    clips, is_gpu = plan.steps * plan.batch_size, plan.device.startswith("cuda")
    counted = " + ".join(f"{name} {number / 1e6:.1f} M" for name, number in plan.parameters.items())
    here = f"{plan.device}, this machine's (--gpus or --tflops: a plan for GPUs)"
    rows = {"GPUs": str(plan.gpus)} if is_gpu else {"device": here}
    rows |= {
        "batch": f"{plan.batch_size} = {plan.gpus} × {plan.per_gpu}, {plan.micro_batch} clips at once",
        "steps": f"{plan.steps:,} ({clips:,} clips)",
        "parameters": counted,
    }
    for way, memory in plan.memory.items():
        rows[f"memory a GPU, {way}" if plan.gpus > 1 else "memory"] = str(memory)
    rows |= {
        "of one clip more": scaled(next(iter(plan.memory.values())).of_clip, "B"),
        "work a clip": scaled(plan.flops.total, "FLOP"),
        "work a step": scaled(plan.flops.total * plan.batch_size, "FLOP"),
        "work in all": scaled(plan.flops.total * clips, "FLOP"),
        **_time(plan, " a GPU" if is_gpu else ""),
        "/dev/shm": scaled(plan.shared_bytes, "B"),
        "RAM beside it": scaled(plan.host_bytes, "B"),
        "checkpoints": (
            f"{plan.checkpoints} × {scaled(plan.checkpoint_bytes, 'B')}; "
            f"{scaled(plan.free_disk, 'B')} are free"
        ),
    }
    shown = [{"field": name, "value": value} for name, value in rows.items()]
    return shown + [{"field": "warning", "value": text} for text in plan.warnings]


def _time(plan: TrainPlan, of_each: str) -> dict[str, str]:
    """At the assumed rate; a processor has none."""
    rate, seconds, data = plan.clips_per_second, plan.seconds, f"{scaled(plan.bytes_a_clip, 'B')} a clip"
    if rate is None or seconds is None:
        return {
            TIME: f"not known of a processor ({plan.device}): --measure does 20 steps on it",
            "data": data,
        }
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return {
        f"at {plan.tflops:g} TFLOP/s{of_each}": f"{shown} clips/s, {duration(seconds)} (assumed: --tflops)",
        "data then": f"{scaled(rate * plan.bytes_a_clip, 'B')}/s ({data})",
    }


def scaled(number: float, unit: str) -> str:
    """Three digits before a unit that fits: "9.77 TFLOP"."""
    number, prefixes = float(f"{number:.3g}"), iter(" kMGTPE")
    prefix = next(prefixes)
    while number >= 1000 and prefix != "E":
        number, prefix = number / 1000, next(prefixes)
    figure = f"{number:,.0f}" if number >= 1000 else f"{number:g}"
    return f"{figure} {prefix.strip()}{unit}"


def in_pieces(config: TrainConfig, found: Fitting, gpus: int) -> str:
    """What comes of the recipe's own batch, in words."""
    own = f"the recipe's batch_size={config.batch_size}"
    if found.accumulation:
        return f"{own}: grad_accum_steps={found.accumulation}"
    if config.batch_size % gpus:
        return f"{own} is no multiple of {gpus} GPUs, and cannot be shared out among them"
    return f"{own} does not fit in any number of pieces"


def describe_fitting(
    config: TrainConfig, found: Fitting, measured: tuple[int, int] | None, gpus: int = 1
) -> dict[str, Any]:
    """What `--find-batch` answers; also its JSON. `grad_accum_steps` is 0 where `pieces` says why."""
    answer: dict[str, Any] = {
        "limit": found.limit,
        "largest_batch_size": found.batch_size,
        "memory": str(found.memory),
        "of_one_clip": found.memory.of_clip,
        "grad_accum_steps": found.accumulation,
        "pieces": in_pieces(config, found, gpus),
        "memory_with_accumulation": str(found.with_accumulation),
        "batch_size": config.batch_size,
    }
    if measured is not None:
        answer |= {"measured_batch_size": measured[0], "measured_bytes": measured[1]}
    return answer
