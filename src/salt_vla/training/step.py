"""One training step, and one validation pass: from a batch to a loss and to explained variance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.models import gather_tokens, patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import objective
from salt_vla.targets import TargetProvider, TargetSpace, nearest_context
from salt_vla.training.learner import Learner, set_rates

BASELINES = ("channel_mean", "position_mean", "copy_nearest")


@dataclass
class ExplainedVariance:
    """R² of predictions against three baseline predictors, gathered over groups and batches.

    R² = 1 − Σ(prediction − target)² ÷ Σ(baseline − target)², as `objectives.explained_variance`, in sums so
    that batches can be added up. Baselines: the training mean per channel, the training mean per token place
    and channel, and a copy of the nearest visible token's own target.
    """

    residual: float = 0.0
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BASELINES, 0.0))

    def add(self, predicted: Tensor, targets: Tensor, baselines: dict[str, Tensor]) -> None:
        self.residual += (predicted - targets).square().sum().item()
        for name, baseline in baselines.items():
            self.totals[name] += (baseline - targets).square().sum().item()

    def as_row(self) -> dict[str, float]:
        return {
            f"r2_{name}": 1 - self.residual / total if total else float("nan")
            for name, total in self.totals.items()
        }


@dataclass(frozen=True)
class Task:
    """What is being learned: where targets come from and how they are compared."""

    provider: TargetProvider
    space: TargetSpace


def forward(
    learner: Learner, batch: Batch, task: Task, config: TrainConfig, score: ExplainedVariance | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch: encode each group's context, predict its targets, compare."""
    with torch.no_grad():
        scored = task.space.scored(task.provider.targets(batch.frames, batch.records))
    tubelets = patchify(normalise_pixels(batch.frames), config.geometry)
    predicted, targets = [], []
    with torch.autocast(tubelets.device.type, torch.bfloat16, enabled=config.runtime.precision == "bfloat16"):
        for number, group in enumerate(batch.masks):
            context = learner.encoder.encode_tubelets(tubelets, group.context_ids, group.context_valid)
            predicted.append(
                learner.predictor(context, group.context_ids, group.target_ids, number, group.context_valid)
            )
            targets.append(task.space.trained(scored, group.target_ids))
    if score is not None:
        _score(score, [z.detach() for z in predicted], scored, batch, task, config)
    return objective(predicted, targets, config.objective)


@torch.no_grad()
def _score(
    score: ExplainedVariance,
    predicted: list[Tensor],
    scored: Tensor,
    batch: Batch,
    task: Task,
    config: TrainConfig,
) -> None:
    for z, group in zip(predicted, batch.masks, strict=True):
        ids = group.target_ids
        copied = nearest_context(group.context_ids, ids, config.geometry, group.context_valid)
        baselines = {
            "channel_mean": task.space.channel_mean,
            "position_mean": task.space.position_mean[ids],
            "copy_nearest": gather_tokens(scored, copied),
        }
        score.add(task.space.to_scored(z, ids), gather_tokens(scored, ids), baselines)


def train_step(
    learner: Learner, batch: Batch, task: Task, config: TrainConfig, step: int, scored: bool = True
) -> dict[str, Any]:
    """Update number `step` (from 0). Returns the step's metrics, with R² where `scored`.

    Raises `RunError`, and leaves the parameters as they were, when the loss or its gradient is not finite.
    """
    torch.manual_seed(((config.seed << 32) + step) % 2**64)  # Stochastic depth depends on the step alone.
    lr, weight_decay = set_rates(learner, config, step)
    learner.optimizer.zero_grad(set_to_none=True)
    score = ExplainedVariance() if scored else None
    losses: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    for micro in batch.micro_batches(config.grad_accum_steps):
        loss, named = forward(learner, micro, task, config, score)
        (loss / config.grad_accum_steps).backward()
        losses.append(loss.detach())
        parts.append(named)
    total = torch.stack(losses).mean().item()
    parameters = [p for _, p in learner.named_parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip).item()
    for name, value in (("loss", total), ("gradient's norm", norm)):
        if not math.isfinite(value):
            raise RunError(
                f"the {name} is {value} at step {step + 1}; lower optimizer.lr or look at the targets"
            )
    learner.optimizer.step()
    extra = {
        name: torch.stack([p[name] for p in parts]).mean().item() for name in parts[0] if len(parts[0]) > 1
    }
    rates = {"lr": lr, "weight_decay": weight_decay, "grad_norm": norm}
    r2 = {} if score is None else score.as_row()
    return {"kind": "train", "step": step + 1, "loss": total, **extra, **r2, **rates}


@torch.no_grad()
def validate(
    learner: Learner, batches: Iterable[Batch], task: Task, config: TrainConfig, step: int, device: str
) -> dict[str, Any]:
    """Loss and R² on held-out clips (view 0, masks that are the same at every validation)."""
    learner.train(False)
    score = ExplainedVariance()
    loss_sum, clips = 0.0, 0
    for batch in batches:
        loss, _ = forward(learner, batch.to(device), task, config, score)
        loss_sum += loss.item() * len(batch.keys)
        clips += len(batch.keys)
    learner.train()
    return {"kind": "val", "step": step, "loss": loss_sum / clips, "clips": clips, **score.as_row()}
