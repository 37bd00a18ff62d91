"""What the online probe costs a run: `python benchmarks/online_probe.py` (two minutes, idle machine).

Whole runs with and without it differ by less than a machine does from one minute to the next. So within one
process a step of training and what the probe does with that step's batch take turns, one pair after another,
as do a validation's batch and the probe's look at it; fitting and scoring are timed at the size that a run
has. What a run of the recipe pays follows from how often its plan looks. Reading data is in neither.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.masks import build_masks
from salt_vla.recipes import get_recipe
from salt_vla.targets import PixelTargets, TargetSpace, Task
from salt_vla.training.distributed import World
from salt_vla.training.flops import mean_step_flops
from salt_vla.training.learner import build_learner
from salt_vla.training.online_probe import OnlineProbe, Truths
from salt_vla.training.probe_plan import Plan, plan_probe
from salt_vla.training.step import train_step

RECIPES = ("demo_teacher",)
NUMBERS, CLASSES = 22, 12  # columns that are regressed, and classes: those of metaworld-mini


@dataclass(frozen=True)
class Measured:
    """Seconds: of a step, of a look at its batch and of fitting and scoring; of the whole run, the share that
    is the probe's."""

    step: list[float]
    look: list[float]
    read_out: float
    plan: Plan
    looks: int
    share: float


def truths(clips: int) -> Truths:
    rng = np.random.default_rng(0)
    numbers = {"numbers": rng.normal(size=(clips, 1, NUMBERS)).astype(np.float32)}
    classes = {"label": rng.integers(0, CLASSES, clips)}
    return Truths({str(row): row for row in range(clips)}, np.arange(clips) // 8, numbers, classes)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(config: TrainConfig, pairs: int) -> Measured:
    held = config.runtime.validation_clips
    masks, provider = build_masks(config.masks, config.geometry), PixelTargets(config.geometry)
    plan = plan_probe(config, held, mean_step_flops(config, provider.dim, masks).total)
    if plan is None:
        raise SystemExit("so short a run has no online probe by itself")
    known = truths(max(plan.clips, held))
    probe = OnlineProbe(known, known, plan, config)
    learner = build_learner(config, provider.dim, "cpu")
    task = Task(provider, TargetSpace("normalised", torch.zeros(config.geometry.num_tokens, provider.dim)))
    size, shape = config.geometry.image_size, (config.batch_size, config.geometry.num_frames)
    frames = torch.randint(0, 256, (*shape, size, size, 3)).byte()
    steps, looks = [], []
    for number in range(pairs + 2):
        at = plan.every - probe.burst + number % probe.burst
        keys = [(str((number * len(frames) + row) % plan.clips), 0) for row in range(len(frames))]
        batch = Batch(keys, frames, None, masks.sample(len(frames), seed=0, step=number))
        turn = [
            (steps, lambda: train_step(learner, batch, task, config, 0, scored=False)),  # noqa: B023
            (looks, lambda: probe.learn(learner, batch, at)),  # noqa: B023
        ]
        for kept, work in turn[:: 1 if number % 2 else -1]:
            kept.append(timed(work))
    while len(probe._of_burst(plan.every)) < probe.burst:
        probe._window.append(replace(probe._window[-1], step=plan.every - 1))
    for start in range(0, held, config.batch_size):
        keys = [(str(row), 0) for row in range(start, min(start + config.batch_size, held))]
        probe.hold(learner, Batch(keys, frames[: len(keys)], None, []))
    read_out = timed(lambda: probe.row(plan.every, World()))
    times = 1 + sum(plan.is_due(step) for step in range(1, config.steps + 1))
    step, look = statistics.median(steps[2:]), statistics.median(looks[2:])
    cost = times * (look * (plan.clips + held) / config.batch_size + read_out)
    return Measured(steps[2:], looks[2:], read_out, plan, times, cost / (cost + step * config.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    options = parser.parse_args()
    columns = ("run", "step, ms", "look at its batch ÷ step", "fit and score, ms", "looks", "clips", "share")
    table = Table(*columns, title="the online probe; promise: < 3 % of a run")
    for name in options.recipes:
        config = get_recipe(name).config
        config = replace(config, runtime=replace(config.runtime, device="cpu", precision="float32"))
        found = measure(config, options.pairs)
        ratios = [look / step for look, step in zip(found.look, found.step, strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        table.add_row(
            name,
            f"{1000 * statistics.median(found.step):.0f}",
            f"{middle:.3f} [{low:.3f}, {high:.3f}]",
            f"{1000 * found.read_out:.0f}",
            f"{found.looks} in {config.steps} steps",
            f"{found.plan.clips} + {config.runtime.validation_clips}",
            f"{found.share:.2%}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
