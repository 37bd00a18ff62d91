"""One training step, and one validation pass: from a batch to a loss and to explained variance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.models import patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import objective
from salt_vla.targets import Task
from salt_vla.training.learner import Learner
from salt_vla.training.metrics import Scores
from salt_vla.training.optimizer import set_rates

if TYPE_CHECKING:
    from jaxtyping import Bool


def forward(
    learner: Learner, batch: Batch, task: Task, config: TrainConfig, step: int, scores: Scores | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch and its parts: predict each group's targets from its context, compare."""
    with torch.no_grad():
        scored = task.space.scored(task.provider.targets(batch.frames, batch.records))
    tubelets = patchify(normalise_pixels(batch.frames), config.geometry)
    kept = (
        residuals_kept(config, batch, step, len(learner.encoder.blocks))
        if learner.networks.training
        else None
    )
    with torch.autocast(tubelets.device.type, torch.bfloat16, enabled=config.runtime.precision == "bfloat16"):
        predicted, contexts = learner.call(tubelets, batch.masks, kept)
    targets = [task.space.trained(scored, group.target_ids) for group in batch.masks]
    if scores is not None:
        scores.add(predicted, contexts, scored, batch, task, config)
    return objective(predicted, targets, config.objective)


def train_step(
    learner: Learner, batch: Batch, task: Task, config: TrainConfig, step: int, scored: bool = True
) -> dict[str, Any]:
    """Update number `step` (from 0). Returns the step's metrics, with R² where `scored`.

    Raises `RunError`, and leaves the parameters as they were, when the loss or its gradient is not finite.
    """
    lr, weight_decay = set_rates(learner.optimizer, config, step)
    learner.optimizer.zero_grad(set_to_none=True)
    scores = Scores() if scored else None
    losses: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    for number, micro in enumerate(batch.micro_batches(config.grad_accum_steps), start=1):
        with learner.sharing(number == config.grad_accum_steps):
            loss, named = forward(learner, micro, task, config, step, scores)
            (loss / config.grad_accum_steps).backward()
        losses.append(loss.detach())
        parts.append(named)
    total = learner.world.mean(torch.stack(losses).mean()).item()
    norm = learner.clip_gradients(config.optimizer.grad_clip).item()
    for name, value in (("loss", total), ("gradient's norm", norm)):
        if not math.isfinite(value):
            raise RunError(
                f"the {name} is {value} at step {step + 1}; lower optimizer.lr or look at the targets"
            )
    learner.optimizer.step()
    task.after_step(learner.encoder, step)
    extra = {
        name: torch.stack([p[name] for p in parts]).mean().item() for name in parts[0] if len(parts[0]) > 1
    }
    rates = {"lr": lr, "weight_decay": weight_decay, "grad_norm": norm}
    r2 = {} if scores is None else scores.as_row()
    return {"kind": "train", "step": step + 1, "loss": total, **extra, **r2, **rates}


def residuals_kept(
    config: TrainConfig, batch: Batch, step: int, depth: int
) -> Bool[Tensor, "batch groups depth 2"] | None:
    """Which residuals stochastic depth leaves in: a function of (seed, step) for the global batch, of which
    this part takes its rows, so that neither micro-batches nor processes change anything."""
    rate = config.encoder.drop_path
    if not rate:
        return None
    drawn = np.random.default_rng([config.seed, step, depth]).random(
        (batch.global_size, len(batch.masks), depth, 2), dtype=np.float32
    )
    dropped = torch.from_numpy(drawn[batch.first_row : batch.first_row + len(batch.keys)])
    linear = torch.linspace(0, rate, depth) if depth > 1 else torch.zeros(1)
    return (dropped >= linear[:, None]).to(batch.frames.device, non_blocking=True)


@torch.no_grad()
def validate(
    learner: Learner, batches: Iterable[Batch], task: Task, config: TrainConfig, step: int, device: str
) -> dict[str, Any]:
    """Loss and R² on held-out clips (view 0, masks that are the same at every validation)."""
    learner.train(False)
    scores = Scores()
    loss_sum, clips = 0.0, 0
    for batch in batches:
        loss, _ = forward(learner, batch.to(device), task, config, step, scores)
        loss_sum += loss.item() * len(batch.keys)
        clips += len(batch.keys)
    learner.train()
    return {"kind": "val", "step": step, "loss": loss_sum / clips, "clips": clips, **scores.as_row()}
