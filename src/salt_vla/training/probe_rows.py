"""The online probe's rows in a run: first of the weights that it begins with, then of those it has come to.

Knows the run directory; what a row says is the probe's business, and when one is due the loop's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from salt_vla.batches import Batch, Batches
from salt_vla.config import TrainConfig
from salt_vla.models import patchify
from salt_vla.models.loading import read_tensors
from salt_vla.models.pixels import normalise_pixels
from salt_vla.progress import progress
from salt_vla.rundir import RunDirectory
from salt_vla.training.checkpoint import PROBE
from salt_vla.training.distributed import World
from salt_vla.training.learner import Learner
from salt_vla.training.online_probe import OnlineProbe
from salt_vla.training.skipped import SkippedRecords, Tally


def look_first(
    probe: OnlineProbe,
    run: RunDirectory,
    learner: Learner,
    train: Batches,
    held_out: Iterator[Batch],
    config: TrainConfig,
    step: int,
) -> None:
    """The row of step 0, once in a run: the same probe, of the first weights, fitted to as many clips.

    Those that the first steps will learn from are read for it, and `held_out` ones, this process' share.
    """
    world = learner.world
    if not world.agree(world.is_first and step == 0 and not _first(run)):
        return
    learner.train(False)
    steps = min(probe.steps, config.steps)
    bar = progress(f"What {run.name} knows before it learns", steps, "batches")
    with bar as advance:
        clips = (train[number] for number in range(steps))
        for batch in world.in_step(SkippedRecords(run).watch(clips, Tally())):
            assert batch is not None  # Every process has a share of each step.
            _look(probe, learner, batch, config)
            probe.learn()
            advance(1)
    for held in world.in_step(held_out):
        if held is None:
            learner.accompany(config)
        else:
            _look(probe, learner, held, config)
    learner.train()
    log_probe(probe, run, world, step)
    probe.restore({}, world, config.runtime.device)


@torch.no_grad()
def _look(probe: OnlineProbe, learner: Learner, batch: Batch, config: TrainConfig) -> None:
    """As a step does, for its first mask group alone."""
    batch = batch.to(config.runtime.device)
    lower = "bfloat16" in (config.runtime.precision, config.optimizer.parameters)
    tubelets = patchify(normalise_pixels(batch.frames), config.geometry)
    with torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=lower):
        # Processes that share out parameters compute together, as many groups as one that accompanies them.
        _, contexts = learner.call(tubelets, batch.masks if learner.is_sharded else batch.masks[:1])
    probe.see(contexts[0], batch)


def log_probe(probe: OnlineProbe, run: RunDirectory, world: World, step: int) -> None:
    """The row of a validation, beside the figures of the first weights where the run has these."""
    row = probe.row(step, world, _first(run) if world.is_first else None)
    if row:
        run.log_metrics(row)


def restore_probe(probe: OnlineProbe, run: RunDirectory, step: int, world: World, device: str) -> None:
    """As it was at the checkpoint of `step`; empty where that holds nothing of it."""
    file = run.checkpoints / f"step_{step:08d}" / PROBE
    probe.restore(read_tensors(file) if file.is_file() else {}, world, device)


def _first(run: RunDirectory) -> dict[str, object] | None:
    return next((row for row in run.metrics("probe") if row["step"] == 0), None)
