"""What a teacher's latents are like over many clips: size, outlier channels, baselines, effective rank.

Sums are kept in float64 and grow with the width, never with the number of clips. Knows no teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salt_vla.objectives import normalise

if TYPE_CHECKING:
    from jaxtyping import Float

TOP_CHANNELS = 8
SAMPLED_TOKENS = 64  # a clip; L1 needs the mean before it can be summed, so these are kept


@dataclass(frozen=True)
class LatentStatistics:
    """Of raw latents, and (`…_normalised`) of what the loss is taken on: layer-normalised, without affine.

    `mean_mse`, `mean_l1`: the error of always predicting each channel's mean, which is what a loss has to be
    held against. `top_share`: share of the variance in the 8 channels that vary most. `position_share`: share
    of the normalised variance that the mean of each token place explains. `effective_rank`: RankMe, the
    exponential of the entropy of the singular values' shares (arXiv 2210.02885, without its ε), here of
    tokens *minus their channel means*. `finite_share`: share of numbers that are neither NaN nor infinite;
    the others count as 0.
    """

    clips: int
    mean_square: float
    token_std: float
    top_share: float
    top_share_normalised: float
    mean_mse: float
    mean_mse_normalised: float
    mean_l1_normalised: float
    position_share: float
    effective_rank: float
    effective_rank_normalised: float
    finite_share: float


class _Moments:
    """Sums of tokens and of their products, per channel and per token place."""

    def __init__(self, tokens: int, dim: int) -> None:
        self.clips = 0
        self.sums = torch.zeros(tokens, dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, latents: Float[Tensor, "batch tokens dim"]) -> None:
        self.clips += len(latents)
        self.sums += latents.sum(dim=0)
        flat = latents.flatten(0, 1)
        self.products += flat.T @ flat

    @property
    def count(self) -> int:
        return self.clips * len(self.sums)

    def covariance(self) -> Float[Tensor, "dim dim"]:
        mean = self.sums.sum(dim=0) / self.count
        return self.products / self.count - torch.outer(mean, mean)


class LatentSums:
    """`add` batches of raw latents, then `statistics()`."""

    def __init__(self, tokens: int, dim: int) -> None:
        self._raw, self._scored = _Moments(tokens, dim), _Moments(tokens, dim)
        self._deviations = 0.0
        self._finite = 0
        self._kept: list[Tensor] = []

    def add(self, latents: Float[Tensor, "batch tokens dim"]) -> None:
        latents = latents.detach().float().cpu()
        finite = torch.isfinite(latents)
        self._finite += int(finite.sum())
        latents = latents.where(finite, torch.zeros(()))
        scored = normalise(latents)
        self._deviations += float(latents.std(dim=-1).double().sum())
        self._kept.append(scored[:, :: max(1, scored.shape[1] // SAMPLED_TOKENS)].flatten(0, 1))
        self._raw.add(latents.double())
        self._scored.add(scored.double())

    def top_channels(self) -> list[int]:
        """The raw channels that vary most, the first of them most of all."""
        variance = self._raw.covariance().diagonal()
        return [int(channel) for channel in variance.topk(min(TOP_CHANNELS, len(variance))).indices]

    def statistics(self) -> LatentStatistics:
        """Raises `ValueError` before the first `add`."""
        raw, scored = self._raw, self._scored
        if not raw.clips:
            raise ValueError("no latents were added")
        raw_covariance, covariance = raw.covariance(), scored.covariance()
        mse = _mean_mse(covariance)
        places = scored.sums / scored.clips
        mean = places.mean(dim=0)
        of_places = float((places - mean).square().mean())
        return LatentStatistics(
            clips=raw.clips,
            mean_square=float(raw.products.diagonal().mean()) / raw.count,
            token_std=self._deviations / raw.count,
            top_share=_top_share(raw_covariance),
            top_share_normalised=_top_share(covariance),
            mean_mse=_mean_mse(raw_covariance),
            mean_mse_normalised=mse,
            mean_l1_normalised=float((torch.cat(self._kept) - mean).abs().mean()),
            position_share=of_places / mse if mse > 0 else 0.0,
            effective_rank=effective_rank(raw_covariance),
            effective_rank_normalised=effective_rank(covariance),
            finite_share=self._finite / (raw.count * raw.sums.shape[1]),
        )


def _mean_mse(covariance: Tensor) -> float:
    return float(covariance.diagonal().clamp(min=0).mean())


def _top_share(covariance: Tensor) -> float:
    variance = covariance.diagonal().clamp(min=0)
    total = float(variance.sum())
    return float(variance.topk(min(TOP_CHANNELS, len(variance))).values.sum()) / total if total > 0 else 0.0


def effective_rank(covariance: Float[Tensor, "dim dim"]) -> float:
    """RankMe of the centred tokens whose covariance this is: exp(−Σ p log p), p the singular values' shares.

    Singular values are the square roots of the covariance's eigenvalues. 0 where nothing varies.
    """
    values = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    total = values.sum()
    if float(total) <= 0:
        return 0.0
    shares = values / total
    return float(torch.exp(torch.special.entr(shares).sum()))
