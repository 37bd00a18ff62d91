"""The loss and explained variance are their formulas, by hand and in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.config import ObjectiveConfig
from salt_vla.errors import ConfigError
from salt_vla.objectives import (
    covariance_term,
    explained_variance,
    latent_regression,
    normalise,
    objective,
    variance_term,
)


def groups(seed: int, dim: int = 12) -> list[Tensor]:
    """Two mask groups of unequal size, far from zero mean and unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, count, dim, generator=generator) * 4 + 2 for count in (5, 11)]


def layer_norm_64(h: np.ndarray) -> np.ndarray:
    centred = h - h.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


def test_normalised_tokens_have_zero_mean_and_unit_variance() -> None:
    tokens = normalise(groups(0)[0].half())
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.var(dim=-1, unbiased=False), torch.ones(3, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("power", "expected"), [(1.0, (4 / 3 + 3) / 2), (2.0, (10 / 6 + 9 / 2) / 2)])
def test_loss_of_raw_targets_by_hand(power: float, expected: float) -> None:
    """Group one misses by 0, 1, 3; group two by 3: each group counts alike, however many tokens it has."""
    predicted = [torch.tensor([[[1.0], [2.0], [6.0]]]), torch.tensor([[[0.0]]])]
    targets = [torch.tensor([[[1.0], [3.0], [3.0]]]), torch.tensor([[[-3.0]]])]
    loss = latent_regression(predicted, targets, power=power, normalise_targets=False)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_of_normalised_targets_by_hand(scale: float) -> None:
    """(1, −1)·c normalises to (1, −1) whatever c: predicting zero costs 1 for p = 1 and ½ for p = 2."""
    targets = [scale * torch.tensor([[[1.0, -1.0], [-3.0, 3.0]]])]
    zero = [torch.zeros(1, 2, 2)]
    assert latent_regression(zero, targets).item() == pytest.approx(1, rel=1e-4)
    assert latent_regression(zero, targets, power=2.0).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("normalised", [True, False])
def test_loss_is_its_formula_in_float64(power: float, normalised: bool) -> None:
    predicted, targets = groups(1), groups(2)
    terms = []
    for z, h in zip(predicted, targets, strict=True):
        held = layer_norm_64(h.double().numpy()) if normalised else h.double().numpy()
        terms.append((np.abs(z.double().numpy() - held) ** power).mean() / power)
    loss = latent_regression(predicted, targets, power=power, normalise_targets=normalised)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_loss_is_computed_in_float32_from_bfloat16_predictions() -> None:
    predicted, targets = [z.bfloat16() for z in groups(1)], groups(2)
    loss = latent_regression(predicted, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, latent_regression([z.float() for z in predicted], targets))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gradient_of_the_loss_is_its_formula(power: float) -> None:
    z = groups(1)[0].requires_grad_()
    h = groups(2)[0]
    latent_regression([z], [h], power=power, normalise_targets=False).backward()
    error = (z - h).detach()
    expected = (error.sign() if power == 1.0 else error) / error.numel()
    torch.testing.assert_close(z.grad, expected)


def test_gradient_is_finite_where_the_prediction_is_exact() -> None:
    for power in (1.0, 1.5, 2.0):
        z = torch.ones(1, 2, 3, requires_grad=True)
        latent_regression([z], [torch.ones(1, 2, 3)], power=power, normalise_targets=False).backward()
        assert z.grad is not None and not z.grad.any()


def test_lists_that_do_not_match_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="need one target per prediction, got 1 and 2 mask groups"):
        latent_regression(groups(1)[:1], groups(2))
    with pytest.raises(ConfigError, match="got 0 and 0"):
        latent_regression([], [])
    message = r"predictions are \(3, 5, 12\) but targets are \(3, 11, 12\)"
    with pytest.raises(ConfigError, match=message):  # Shapes that broadcast must be refused as well.
        latent_regression(groups(1)[:1], groups(2)[1:])
    with pytest.raises(ConfigError):
        latent_regression([torch.zeros(1, 5, 12)], [torch.zeros(3, 5, 12)])


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([1.0, 2.0, 6.0], 1.0),  # perfect
        ([3.0, 3.0, 3.0], 0.0),  # the baseline itself: the mean
        ([1.0, 2.0, 3.0], 1 - 9 / 14),
        ([6.0, 2.0, 1.0], 1 - 50 / 14),  # worse than the baseline
    ],
)
def test_explained_variance_by_hand(predicted: list[float], expected: float) -> None:
    targets = torch.tensor([[1.0], [2.0], [6.0]])
    value = explained_variance(torch.tensor(predicted).unsqueeze(1), targets, torch.tensor([3.0]))
    assert value.item() == pytest.approx(expected)


def test_explained_variance_is_not_a_number_where_the_baseline_is_perfect() -> None:
    targets = torch.ones(2, 3)
    assert math.isnan(explained_variance(torch.zeros(2, 3), targets, torch.ones(3)).item())
    assert math.isnan(explained_variance(targets, targets, torch.ones(3)).item())


def test_explained_variance_broadcasts_its_baseline() -> None:
    predicted, targets = groups(1)[0], groups(2)[0]
    mean = targets.mean(dim=(0, 1))
    by_hand = 1 - ((predicted - targets) ** 2).sum() / ((mean - targets) ** 2).sum()
    value = explained_variance(predicted, targets, mean)
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert torch.equal(value, explained_variance(predicted, targets, mean.expand(3, 5, 12)))


def test_explained_variance_survives_a_large_mean() -> None:
    """In float32 sums the small variance around 10,000 would be lost."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(100_000, generator=generator).double()
    targets = (noise + 10_000).float()
    predicted = (0.5 * noise + 10_000).float()
    value = explained_variance(predicted, targets, targets.double().mean())
    assert value.item() == pytest.approx(0.75, abs=1e-2)


def test_variance_term_by_hand() -> None:
    """Columns {0, 2}, {5, 5} and {−4, 4} deviate by √2, 0 and √32: what exceeds the target costs nothing."""
    tokens = torch.tensor([[0.0, 5.0, -4.0], [2.0, 5.0, 4.0]])
    assert variance_term(tokens, 2.0).item() == pytest.approx(((2 - math.sqrt(2)) + 2 + 0) / 3)
    assert variance_term(tokens, 1.0).item() == pytest.approx(1 / 3)


def test_covariance_term_by_hand() -> None:
    """Columns (−1, 0, 1) and (−2, 0, 2) have covariance 2, the third is constant: 2·2² ÷ 3."""
    tokens = torch.tensor([[-1.0, -2.0, 7.0], [0.0, 0.0, 7.0], [1.0, 2.0, 7.0]])
    assert covariance_term(tokens).item() == pytest.approx(8 / 3)


def test_vicreg_terms_are_their_formulas_in_float64() -> None:
    tokens = groups(4)[1].flatten(0, 1)
    x = tokens.double().numpy()
    deviation = np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=0) / (len(x) - 1))
    assert variance_term(tokens, 4.0).item() == pytest.approx(np.maximum(0, 4 - deviation).mean(), rel=1e-5)
    covariance = np.cov(x, rowvar=False)
    off_diagonal = covariance[~np.eye(12, dtype=bool)]
    assert covariance_term(tokens).item() == pytest.approx((off_diagonal**2).sum() / 12, rel=1e-4)


def test_collapsed_predictions_have_a_finite_gradient() -> None:
    tokens = torch.ones(6, 4, requires_grad=True)
    (variance_term(tokens, 1.0) + covariance_term(tokens)).backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_objective_without_vicreg_is_the_regression_alone() -> None:
    predicted, targets = groups(1), groups(2)
    total, parts = objective(predicted, targets, ObjectiveConfig(power=2.0))
    assert torch.equal(total, latent_regression(predicted, targets, 2.0, normalise_targets=False))
    assert list(parts) == ["regression"] and torch.equal(parts["regression"], total)


def test_objective_adds_its_terms_weighted_over_all_predicted_tokens() -> None:
    predicted, targets = [z.requires_grad_() for z in groups(1)], groups(2)
    config = ObjectiveConfig(variance_weight=0.5, variance_target=6.0, covariance_weight=0.25)
    total, parts = objective(predicted, targets, config)
    tokens = torch.cat([z.reshape(-1, 12) for z in predicted])
    assert parts["variance"].item() == pytest.approx(variance_term(tokens, 6.0).item())
    assert parts["covariance"].item() == pytest.approx(covariance_term(tokens).item())
    whole = parts["regression"] + 0.5 * parts["variance"] + 0.25 * parts["covariance"]
    assert total.item() == pytest.approx(whole.item())
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())
