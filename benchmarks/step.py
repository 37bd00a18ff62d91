"""Milliseconds of one training step of the demo's recipes, in float32 and under bfloat16 autocast.

Random pixels and latents, no decoding and no disk: networks, objective and optimizer alone. Run it
on an otherwise idle machine: `python benchmarks/step.py [steps]`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.masks import build_masks
from salt_vla.recipes import get_recipe
from salt_vla.targets import FrozenTargets, PixelTargets, TargetProvider, TargetSpace, Task
from salt_vla.training.learner import build_learner
from salt_vla.training.runtime import PRECISIONS
from salt_vla.training.step import train_step

TARGET_DIM = 128


class RandomLatents(FrozenTargets):
    """Latents of a teacher that never looked."""

    needs_records = False
    dim = TARGET_DIM

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        return torch.randn(len(frames), self.num_tokens, self.dim)


def milliseconds(config: TrainConfig, steps: int) -> np.ndarray:
    """Of `steps` steps, after two that are not counted."""
    geometry, batch_size = config.geometry, config.batch_size
    pixels = config.target.provider == "pixels"
    provider: TargetProvider = PixelTargets(geometry) if pixels else RandomLatents(geometry.num_tokens)
    space = TargetSpace(config.objective.targets, torch.zeros(geometry.num_tokens, provider.dim))
    learner = build_learner(config, provider.dim, "cpu")
    masks = build_masks(config.masks, geometry)
    shape = (batch_size, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    seconds = []
    for step in range(steps + 2):
        batch = Batch([("clip", 0)] * batch_size, frames, None, masks.sample(batch_size, 0, step))
        started = time.perf_counter()
        train_step(learner, batch, Task(provider, space), config, step, scored=False)
        seconds.append(time.perf_counter() - started)
    return 1000 * np.array(seconds[2:])


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    table = Table("recipe", "precision", "median ms", "min ms", title=f"{torch.get_num_threads()} threads")
    for name in ("demo_teacher", "demo_student"):
        config = get_recipe(name).config
        for precision in PRECISIONS:
            runtime = replace(config.runtime, precision=precision)
            times = milliseconds(replace(config, runtime=runtime), steps)
            table.add_row(name, precision, f"{np.median(times):.0f}", f"{times.min():.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
