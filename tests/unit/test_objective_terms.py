"""The terms beside the regression are their formulas, act where they are told, and mean what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.config import ObjectiveConfig
from salt_vla.errors import ConfigError
from salt_vla.objectives import (
    check_objective,
    covariance_term,
    info_nce,
    objective,
    pooled,
    variance_term,
)

VICREG = ObjectiveConfig(variance_weight=0.5, variance_target=3.0, covariance_weight=0.25)


def groups(seed: int, dim: int = 12, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, count, dim, generator=generator) * 2 + 1 for count in (5, 11)]


def one(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor([list(rows)])]


def test_smooth_l1_by_hand() -> None:
    """Errors 0.5 and 3 cost 0.125 and 2.5."""
    total, _ = objective(one([0.5], [3.0]), one([0.0], [0.0]), ObjectiveConfig(loss="smooth_l1"))
    assert total.item() == pytest.approx((0.125 + 2.5) / 2)


def test_cosine_by_hand_and_blind_to_length() -> None:
    """Angles of 0°, 90° and 180° cost 0, 1 and 2."""
    predicted = one([2.0, 0.0], [0.0, 5.0], [-1.0, 0.0])
    targets = one([1.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    total, _ = objective(predicted, targets, ObjectiveConfig(loss="cosine"))
    longer, _ = objective([7 * z for z in predicted], targets, ObjectiveConfig(loss="cosine"))
    assert total.item() == pytest.approx(1) == longer.item()


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_regressions_are_their_formulas_in_float64(loss: str) -> None:
    predicted, targets = groups(1), groups(2)
    terms = []
    for z, t in ((z.double().numpy(), t.double().numpy()) for z, t in zip(predicted, targets, strict=True)):
        error = np.abs(z - t)
        smooth = np.where(error < 1, error**2 / 2, error - 0.5).mean()
        product = (z * t).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(t, axis=-1)
        terms.append({"smooth_l1": smooth, "cosine": 1 - product.mean()}[loss])
    total, _ = objective(predicted, targets, ObjectiveConfig(loss=loss))
    assert total.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_wrong_name_is_answered_with_the_near_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'smoothl1' is unknown; did you mean smooth_l1\? known: cosine, power"
    ):
        check_objective(ObjectiveConfig(loss="smoothl1"), clips=8)
    with pytest.raises(ConfigError, match=r"'hinge' is unknown; known: "):
        check_objective(ObjectiveConfig(loss="hinge"), clips=8)
    check_objective(ObjectiveConfig(loss="cosine"), clips=1)


def test_one_clip_at_a_time_has_no_deviation_between_clips() -> None:
    for where in ("encoder", "both"):
        config = replace(VICREG, regularised=where)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"compares clips, but one is computed at a time; raise batch"):
            check_objective(config, clips=1)
        check_objective(config, clips=2)
    check_objective(VICREG, clips=1)
    check_objective(ObjectiveConfig(regularised="encoder"), clips=1)  # No weight: nothing is compared.


def test_the_seeds_form_with_its_weights_by_hand() -> None:
    """Weights 1 and 0.1, standard deviation 1, on all predicted tokens: two groups as one table.

    Rows (0, 0), (1, 2), (2, 4): deviations 1 and 2, covariance 2. Variance 0, covariance 2 · 2² ÷ 2 = 4.
    Halved: deviations ½ and 1, covariance ½. Variance ¼, covariance ¼.
    """
    seed = ObjectiveConfig(power=2.0, targets="raw", variance_weight=1.0, covariance_weight=0.1)
    predicted = [torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]), torch.tensor([[[2.0, 4.0]]])]
    total, parts = objective(predicted, predicted, seed)
    assert total.item() == pytest.approx(0.4)
    assert (parts["variance"].item(), parts["covariance"].item()) == pytest.approx((0, 4))
    half = [z / 2 for z in predicted]
    total, parts = objective(half, half, seed)
    assert (parts["variance"].item(), parts["covariance"].item()) == pytest.approx((0.25, 0.25))
    assert total.item() == pytest.approx(0.25 + 0.1 * 0.25)


def test_vicreg_terms_are_float32_from_bfloat16_predictions() -> None:
    predicted = [z.bfloat16() for z in groups(1)]
    _, parts = objective(predicted, groups(2), VICREG)
    _, exact = objective([z.float() for z in predicted], groups(2), VICREG)
    assert parts["variance"].dtype == torch.float32 and parts == exact


def test_pooling_leaves_out_padding() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [99.0]], [[2.0], [4.0], [6.0]]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert pooled(tokens, valid).tolist() == [[2.0], [4.0]]
    assert pooled(tokens[1:].bfloat16()).tolist() == [[4.0]]
    assert pooled(tokens.masked_fill(tokens == 99, math.nan), valid).tolist() == [[2.0], [4.0]]


def test_encoder_terms_are_of_pooled_contexts_group_by_group() -> None:
    predicted, targets, contexts = groups(1), groups(2), groups(3, dim=7)
    config = replace(VICREG, regularised="encoder")
    total, parts = objective(predicted, targets, config, contexts)
    pools = [c.mean(dim=1) for c in contexts]
    variance = sum(variance_term(p, 3.0).item() for p in pools) / 2
    covariance = sum(covariance_term(p).item() for p in pools) / 2
    assert set(parts) == {"regression", "variance_encoder", "covariance_encoder"}
    assert parts["variance_encoder"].item() == pytest.approx(variance)
    assert parts["covariance_encoder"].item() == pytest.approx(covariance)
    assert total.item() == pytest.approx(parts["regression"].item() + 0.5 * variance + 0.25 * covariance)


def test_a_clip_left_alone_in_a_validation_has_no_encoder_term() -> None:
    total, parts = objective(
        groups(1, batch=1), groups(2, batch=1), replace(VICREG, regularised="encoder"), groups(3, batch=1)
    )
    assert list(parts) == ["regression"] and torch.equal(total, parts["regression"])


def test_both_is_the_sum_with_columns_of_their_own() -> None:
    args = groups(1), groups(2)
    contexts, valid = groups(3), [None, torch.ones(3, 11, dtype=torch.bool)]
    totals = {
        where: objective(*args, replace(VICREG, regularised=where), contexts, valid)  # type: ignore[arg-type]
        for where in ("predictions", "encoder", "both")
    }
    both, parts = totals["both"]
    separate = totals["predictions"][0] + totals["encoder"][0] - parts["regression"]
    assert both.item() == pytest.approx(separate.item())
    assert parts == totals["predictions"][1] | totals["encoder"][1]


def test_encoder_terms_push_collapsed_clips_apart_through_the_encoder_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = [1 + 0.01 * torch.randn(4, 6, 5, generator=generator) for _ in range(2)]
    contexts = [c.requires_grad_() for c in contexts]
    predicted = [z.requires_grad_() for z in groups(1, batch=4)]
    config = ObjectiveConfig(variance_weight=1.0, regularised="encoder")
    total, _ = objective(predicted, [z.detach() for z in predicted], config, contexts)
    total.backward()
    for context in contexts:
        assert context.grad is not None
        before, after = (pooled(c.detach()).std(dim=0).mean() for c in (context, context - context.grad))
        assert after > 2 * before
    assert all(z.grad is not None and not z.grad.any() for z in predicted)


def test_info_nce_by_hand() -> None:
    """Two right answers at right angles: each scores 1 ÷ τ against 0."""
    targets = one([3.0, 0.0], [0.0, 2.0])
    loss, chance = info_nce(targets, targets, temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))
    swapped, _ = info_nce(one([0.0, 1.0], [1.0, 0.0]), targets, temperature=0.5)
    assert swapped.item() == pytest.approx(-math.log(1 / (math.exp(2) + 1)))
    assert chance == pytest.approx(math.log(2))


def test_info_nce_is_its_formula_in_float64() -> None:
    predicted, targets, terms = groups(1), groups(2), []
    for z, t in zip(predicted, targets, strict=True):
        left, right = z.flatten(0, 1).double().numpy(), t.flatten(0, 1).double().numpy()
        left = left / np.linalg.norm(left, axis=1, keepdims=True)
        right = right / np.linalg.norm(right, axis=1, keepdims=True)
        scores = np.exp(left @ right.T / 0.1)
        terms.append(-np.log(np.diag(scores) / scores.sum(axis=1)).mean())
    assert info_nce(predicted, targets, 0.1)[0].item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_who_cannot_tell_targets_apart_gets_the_chance_level() -> None:
    targets = groups(2)
    same = [torch.ones_like(t) for t in targets]
    loss, chance = info_nce(targets, same, temperature=0.1)
    assert loss.item() == pytest.approx(chance) == pytest.approx((math.log(15) + math.log(33)) / 2)


def test_info_nce_takes_bounded_memory_evenly_over_the_clips() -> None:
    """Of 3 clips with 11 tokens each, 6 are compared: rows 0, 5, 11, 16, 22, 27 of the table."""
    z, t = groups(1)[1], groups(2)[1]
    chosen = [0, 5, 11, 16, 22, 27]
    few, chance = info_nce([z], [t], 0.1, most_tokens=6)
    expected, _ = info_nce([z.flatten(0, 1)[chosen][None]], [t.flatten(0, 1)[chosen][None]], 0.1)
    assert few.item() == pytest.approx(expected.item()) and chance == pytest.approx(math.log(6))


def test_info_nce_in_the_objective_has_its_chance_beside_it() -> None:
    predicted, targets = [z.requires_grad_() for z in groups(1)], groups(2)
    config = ObjectiveConfig(contrastive_weight=0.5, contrastive_temperature=0.2)
    total, parts = objective(predicted, targets, config)
    loss, chance = info_nce(predicted, targets, 0.2)
    assert parts["contrastive"].item() == pytest.approx(loss.item())
    assert parts["contrastive_chance"].item() == pytest.approx(chance)
    assert total.item() == pytest.approx(parts["regression"].item() + 0.5 * loss.item())
    total.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in predicted)


def test_a_step_down_info_nce_finds_more_of_its_own_targets() -> None:
    z, t = groups(1)[1].requires_grad_(), groups(2)[1]
    before, _ = info_nce([z], [t], 0.1)
    before.backward()
    assert z.grad is not None
    after, _ = info_nce([z.detach() - 5 * z.grad], [t], 0.1)
    assert after < before
