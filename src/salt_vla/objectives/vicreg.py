"""VICReg's terms against collapse, and the pooling of tokens for those on the encoder.

Bardes, Ponce, LeCun, arXiv:2105.04906, equations 1 to 4; knows no configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


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


def pooled(
    tokens: Float[Tensor, "batch context dim"], valid: Bool[Tensor, "batch context"] | None = None
) -> Float[Tensor, "batch dim"]:
    """The mean of each clip's tokens in float32, leaving out padding (where `valid` is False)."""
    if valid is None:
        return tokens.float().mean(dim=1)
    kept = valid.unsqueeze(-1)
    return tokens.float().masked_fill(~kept, 0).sum(dim=1) / kept.sum(dim=1)
