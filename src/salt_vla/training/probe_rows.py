"""The online probe's rows in a run: first of the weights that it begins with, then of those it has come to.

Knows the run directory; what a row says is the probe's business, and when one is due the loop's.
"""

from __future__ import annotations

from collections.abc import Iterator

from salt_vla.batches import Batch, Batches
from salt_vla.models.loading import read_tensors
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
    step: int,
) -> None:
    """The row of step 0, once in a run: the same probe, of the first weights, fitted to as many clips.

    These are the clips of the first steps, in the place of those before a validation. `held_out`: this
    process' share of a validation's.
    """
    world = learner.world
    if not world.agree(world.is_first and step == 0 and not _first(run)):
        return
    first = range(probe.burst)
    with progress(f"What {run.name} knows before it learns", len(first), "batches") as advance:
        clips = SkippedRecords(run).watch((train[number] for number in first), Tally())
        for number, batch in zip(first, world.in_step(clips), strict=True):
            assert batch is not None  # Every process has a share of each step.
            probe.learn(learner, batch, number - probe.burst)
            advance(1)
    for held in world.in_step(held_out):
        probe.hold(learner, held)
    log_probe(probe, run, world, step)
    probe.restore({}, world)


def log_probe(probe: OnlineProbe, run: RunDirectory, world: World, step: int) -> None:
    """The row of a validation, beside the figures of the first weights where the run has these."""
    row = probe.row(step, world, _first(run) if world.is_first else None)
    if row:
        run.log_metrics(row)


def restore_probe(probe: OnlineProbe, run: RunDirectory, step: int, world: World) -> None:
    """As it was at the checkpoint of `step`; empty where that holds nothing of it."""
    file = run.checkpoints / f"step_{step:08d}" / PROBE
    probe.restore(read_tensors(file) if file.is_file() else {}, world)


def _first(run: RunDirectory) -> dict[str, object] | None:
    return next((row for row in run.metrics("probe") if row["step"] == 0), None)
