"""What a step's predictions are worth: sums that can be added up over groups, batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.models import gather_tokens
from salt_vla.targets import Task, nearest_context

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


@dataclass
class Scores:
    """Everything that is said of predictions, gathered over the (micro-)batches of a step or a pass."""

    explained: ExplainedVariance = field(default_factory=ExplainedVariance)

    @torch.no_grad()
    def add(
        self,
        predicted: list[Tensor],
        contexts: list[Tensor],
        scored: Tensor,
        batch: Batch,
        task: Task,
        config: TrainConfig,
    ) -> None:
        """`scored`: the targets of all tokens in the space of R²; the rest as `Networks` gives it."""
        for z, group in zip(predicted, batch.masks, strict=True):
            ids = group.target_ids
            copied = nearest_context(group.context_ids, ids, config.geometry, group.context_valid)
            baselines = {
                "channel_mean": task.space.channel_mean,
                "position_mean": task.space.position_mean[ids],
                "copy_nearest": gather_tokens(scored, copied),
            }
            self.explained.add(task.space.to_scored(z.detach(), ids), gather_tokens(scored, ids), baselines)

    def as_row(self) -> dict[str, float]:
        return self.explained.as_row()
