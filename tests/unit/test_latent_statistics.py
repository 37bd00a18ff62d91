"""Statistics of latents: streamed sums give what the formulas give, and every figure means what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from salt_vla.evaluation.latent_statistics import LatentStatistics, LatentSums, effective_rank
from salt_vla.objectives import explained_variance, normalise

CLIPS, TOKENS, DIM = 7, 12, 24


def measured(latents: Tensor, batch: int = 3) -> LatentStatistics:
    sums = LatentSums(latents.shape[1], latents.shape[2])
    for start in range(0, len(latents), batch):
        sums.add(latents[start : start + batch])
    return sums.statistics()


@pytest.fixture
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 4, DIM)
    return torch.randn(CLIPS, TOKENS, DIM, generator=generator) * scale + 0.7


def test_streamed_sums_give_what_the_formulas_give(latents: Tensor) -> None:
    found = measured(latents)
    flat, scored = latents.double().flatten(0, 1), normalise(latents).double().flatten(0, 1)
    variance, scored_variance = (x.var(dim=0, unbiased=False) for x in (flat, scored))
    assert found.clips == CLIPS
    assert found.mean_square == pytest.approx(float(flat.square().mean()))
    assert found.token_std == pytest.approx(float(flat.std(dim=1).mean()))
    assert found.mean_mse == pytest.approx(float(variance.mean()))
    assert found.mean_mse_normalised == pytest.approx(float(scored_variance.mean()))
    assert found.mean_l1_normalised == pytest.approx(float((scored - scored.mean(0)).abs().mean()), rel=1e-5)
    assert found.top_share == pytest.approx(float(variance.topk(8).values.sum() / variance.sum()))
    assert found.top_share_normalised == pytest.approx(
        float(scored_variance.topk(8).values.sum() / scored_variance.sum())
    )
    assert found.finite_share == 1


def test_batches_do_not_matter(latents: Tensor) -> None:
    one, many = (dataclasses.asdict(measured(latents, batch)) for batch in (1, CLIPS))
    assert one == pytest.approx(many)


def test_the_mean_predictors_error_is_where_r2_is_zero(latents: Tensor) -> None:
    scored = normalise(latents).double()
    mean = scored.mean(dim=(0, 1)).expand_as(scored)
    error = float((mean - scored).square().mean())
    assert measured(latents).mean_mse_normalised == pytest.approx(error)
    assert float(explained_variance(mean, scored, mean[0, 0])) == pytest.approx(0)


def test_effective_rank_is_the_entropy_of_singular_values_of_centred_tokens(latents: Tensor) -> None:
    flat = latents.double().flatten(0, 1)
    values = torch.linalg.svdvals(flat - flat.mean(dim=0))
    shares = values / values.sum()
    assert measured(latents).effective_rank == pytest.approx(float((-shares * shares.log()).sum().exp()))


def test_effective_rank_of_known_covariances() -> None:
    assert effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.diag(torch.tensor([4.0, 4, 0, 0], dtype=torch.float64))) == pytest.approx(2)
    assert effective_rank(torch.zeros(3, 3, dtype=torch.float64)) == 0


def test_latents_that_are_their_place_alone() -> None:
    place = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    assert measured(place.expand(CLIPS, -1, -1)).position_share == pytest.approx(1)


def test_latents_that_do_not_vary_have_no_variance_rank_or_share() -> None:
    found = measured(torch.linspace(-1, 1, DIM).expand(CLIPS, TOKENS, DIM))
    assert found.mean_mse == pytest.approx(0, abs=1e-12) and found.mean_mse_normalised < 1e-12
    assert measured(torch.zeros(2, TOKENS, DIM)).effective_rank == 0
    assert measured(torch.zeros(2, TOKENS, DIM)).position_share == 0


def test_a_few_loud_channels_own_the_raw_variance_and_the_normalised_too(latents: Tensor) -> None:
    """Normalising a token rescales it as a whole: within it, loud channels stay loud."""
    loud = latents.clone()
    loud[..., -3:] *= 40
    found = measured(loud)
    assert found.top_share > 0.99 and found.top_share_normalised > 0.9
    assert found.effective_rank < measured(latents).effective_rank / 2


def test_loud_tokens_are_tamed_by_normalising(latents: Tensor) -> None:
    loud = torch.randn(CLIPS, TOKENS, 256, generator=torch.Generator().manual_seed(2))
    loud[:, 0] *= 100 * torch.eye(256)[:8].sum(0) + 0.01  # One token place, loud in eight channels.
    found = measured(loud)
    assert found.top_share > 0.9 and found.top_share_normalised < 0.5


def test_numbers_that_are_none_are_counted_and_stand_for_zero(latents: Tensor) -> None:
    broken = latents.clone()
    broken[0, 0, :6] = torch.nan
    broken[1, 1, 0] = torch.inf
    found = measured(broken)
    assert found.finite_share == pytest.approx(1 - 7 / latents.numel())
    zeroed = torch.nan_to_num(broken, nan=0, posinf=0)
    assert found.mean_mse == pytest.approx(measured(zeroed).mean_mse)


def test_no_latents_are_no_statistics() -> None:
    with pytest.raises(ValueError, match="no latents"):
        LatentSums(TOKENS, DIM).statistics()
