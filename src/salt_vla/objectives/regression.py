"""The regressions of predictions on targets, each an entry of `registry.LOSSES`, and explained variance.

An entry is a function (predictions, targets, settings) → scalar of lists with one tensor (batch, target, dim)
a mask group, targets in the objective's own space already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from salt_vla.config import ObjectiveConfig
from salt_vla.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float


def normalise(latents: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """Layer-normalise each token without affine, in float32 (V-JEPA's and SALT's targets)."""
    latents = latents.float()
    return F.layer_norm(latents, latents.shape[-1:])


def mean_over_groups(
    predicted: Sequence[Float[Tensor, "batch target dim"]],
    targets: Sequence[Float[Tensor, "batch target dim"]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Mean over mask groups of `loss` (predictions, targets), both in float32.

    Raises `ConfigError` where the lists or their shapes do not match: shapes that broadcast too.
    """
    if len(predicted) != len(targets) or not predicted:
        raise ConfigError(
            f"need one target per prediction, got {len(predicted)} and {len(targets)} mask groups"
        )
    losses = []
    for z, h in zip(predicted, targets, strict=True):
        if z.shape != h.shape:
            raise ConfigError(f"predictions are {tuple(z.shape)} but targets are {tuple(h.shape)}")
        losses.append(loss(z.float(), h.float()))
    return torch.stack(losses).mean()


def latent_regression(
    predicted: Sequence[Float[Tensor, "batch target dim"]],
    targets: Sequence[Float[Tensor, "batch target dim"]],
    power: float = 1.0,
    normalise_targets: bool = True,
) -> Float[Tensor, ""]:
    """Mean over mask groups of mean |z − LN(h)|^p / p (V-JEPA; p = 1 in SALT, equation 2).

    One entry a mask group. `normalise_targets=False` takes h as it is. Computed in float32.
    """

    def loss(z: Tensor, h: Tensor) -> Tensor:
        error = (z - (normalise(h) if normalise_targets else h)).abs()
        return (error if power == 1.0 else error**power).mean() / power

    return mean_over_groups(predicted, targets, loss)


def power(predicted: Sequence[Tensor], targets: Sequence[Tensor], config: ObjectiveConfig) -> Tensor:
    """Mean |z − t|^p ÷ p with p = `objective.power`: L1 for 1, half the MSE for 2."""
    return latent_regression(predicted, targets, config.power, normalise_targets=False)


def smooth_l1(predicted: Sequence[Tensor], targets: Sequence[Tensor], config: ObjectiveConfig) -> Tensor:
    """Mean of e² ÷ 2 where |e| < 1 and of |e| − ½ elsewhere, e = z − t (Girshick 2015, equation 3)."""
    return mean_over_groups(predicted, targets, F.smooth_l1_loss)


def cosine(predicted: Sequence[Tensor], targets: Sequence[Tensor], config: ObjectiveConfig) -> Tensor:
    """Mean over tokens of 1 − cos(z, t). The length of predictions is free, so R² beside it means little."""
    return mean_over_groups(predicted, targets, lambda z, t: 1 - F.cosine_similarity(z, t, dim=-1).mean())


def explained_variance(predicted: Tensor, targets: Tensor, baseline: Tensor) -> Float[Tensor, ""]:
    """R² = 1 − Σ(predicted − targets)² ÷ Σ(baseline − targets)², with `baseline` broadcast.

    0: as good as the baseline predictor; 1: perfect; below 0: worse than the baseline. NaN where the baseline
    is itself perfect, since then nothing was left to explain.
    """
    targets = targets.double()
    residual = (predicted.double() - targets).square().sum()
    total = (baseline.double().expand_as(targets) - targets).square().sum()
    return torch.where(total > 0, 1 - residual / total, torch.full_like(total, torch.nan))
