"""What a prediction is held to: the regression loss, its optional VICReg terms, and explained variance.

Pure functions of tensors; knows neither models nor where targets come from.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def latent_regression(
    predicted: Sequence[Float[Tensor, "batch target dim"]],
    targets: Sequence[Float[Tensor, "batch target dim"]],
    power: float = 1.0,
    normalise_targets: bool = True,
) -> Float[Tensor, ""]:
    """Mean over mask groups of mean |z − LN(h)|^p / p (V-JEPA; p = 1 in SALT, equation 2).

    One entry a mask group. `normalise_targets=False` takes h as it is. Computed in float32.
    """
    if len(predicted) != len(targets) or not predicted:
        raise ConfigError(
            f"need one target per prediction, got {len(predicted)} and {len(targets)} mask groups"
        )
    losses = []
    for z, h in zip(predicted, targets, strict=True):
        if z.shape != h.shape:
            raise ConfigError(f"predictions are {tuple(z.shape)} but targets are {tuple(h.shape)}")
        error = (z.float() - (normalise(h) if normalise_targets else h.float())).abs()
        losses.append((error if power == 1.0 else error**power).mean() / power)
    return torch.stack(losses).mean()


def explained_variance(predicted: Tensor, targets: Tensor, baseline: Tensor) -> Float[Tensor, ""]:
    """R² = 1 − Σ(predicted − targets)² ÷ Σ(baseline − targets)², with `baseline` broadcast.

    0: as good as the baseline predictor; 1: perfect; below 0: worse than the baseline. NaN where the baseline
    is itself perfect, since then nothing was left to explain.
    """
    targets = targets.double()
    residual = (predicted.double() - targets).square().sum()
    total = (baseline.double().expand_as(targets) - targets).square().sum()
    return torch.where(total > 0, 1 - residual / total, torch.full_like(total, torch.nan))


def variance_term(tokens: Float[Tensor, "tokens dim"], target_std: float) -> Float[Tensor, ""]:
    """VICReg's variance: mean over channels of max(0, target_std − std over all tokens), in float32.

    The deviation is the unbiased one (n − 1), and has no ε, unlike the paper's.
    """
    return F.relu(target_std - tokens.float().std(dim=0)).mean()


def covariance_term(tokens: Float[Tensor, "tokens dim"]) -> Float[Tensor, ""]:
    """VICReg's covariance: sum of squared off-diagonal covariances (n − 1) ÷ width, in float32."""
    tokens = tokens.float()
    tokens = tokens - tokens.mean(dim=0)
    covariance = tokens.T @ tokens / (len(tokens) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / tokens.shape[1]


def objective(
    predicted: Sequence[Tensor], targets: Sequence[Tensor], config: ObjectiveConfig
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of a step and its named parts. `targets` are in the objective's own space already.

    The VICReg terms are of the predictions at hand: where a step is split, of each micro-batch by itself.
    """
    regression = latent_regression(predicted, targets, config.power, normalise_targets=False)
    total, parts = regression, {"regression": regression.detach()}
    if config.variance_weight or config.covariance_weight:
        tokens = torch.cat([z.flatten(0, 1) for z in predicted])
        variance = variance_term(tokens, config.variance_target)
        covariance = covariance_term(tokens)
        total = total + config.variance_weight * variance + config.covariance_weight * covariance
        parts |= {"variance": variance.detach(), "covariance": covariance.detach()}
    return total, parts
