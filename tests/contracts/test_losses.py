"""Every regression of the registry is a loss that the step can be trained on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from salt_vla.config import ObjectiveConfig
from salt_vla.errors import ConfigError
from salt_vla.registry import LOSSES, resolve

Loss = Callable[[list[Tensor], list[Tensor], ObjectiveConfig], Tensor]
CONFIG = ObjectiveConfig()


@pytest.fixture(params=sorted(LOSSES))
def loss(request: pytest.FixtureRequest) -> Loss:
    return resolve(LOSSES, request.param)


def groups(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, count, 12, generator=generator) for count in (5, 11)]


def test_loss_is_a_float32_scalar_whatever_the_predictions_are(loss: Loss) -> None:
    predicted = [z.bfloat16() for z in groups(0)]
    value = loss(predicted, groups(1), CONFIG)
    assert value.shape == () and value.dtype == torch.float32
    assert torch.equal(value, loss([z.float() for z in predicted], groups(1), CONFIG))


def test_nothing_is_better_than_the_target_itself(loss: Loss) -> None:
    exact = loss(groups(1), groups(1), CONFIG).item()
    near = [t + 0.1 * torch.randn(t.shape) for t in groups(1)]
    assert exact == pytest.approx(0, abs=1e-6)
    assert exact < loss(near, groups(1), CONFIG).item() < loss(groups(0), groups(1), CONFIG).item()


def test_every_group_counts_alike(loss: Loss) -> None:
    predicted, targets = groups(0), groups(1)
    single = [loss([z], [t], CONFIG) for z, t in zip(predicted, targets, strict=True)]
    assert loss(predicted, targets, CONFIG).item() == pytest.approx(torch.stack(single).mean().item())


def test_a_batch_is_the_mean_of_its_equal_parts(loss: Loss) -> None:
    predicted, targets = groups(0), groups(1)
    rows = [
        loss([z[i : i + 1] for z in predicted], [t[i : i + 1] for t in targets], CONFIG) for i in range(3)
    ]
    assert loss(predicted, targets, CONFIG).item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)


def test_a_step_down_its_gradient_lowers_it(loss: Loss) -> None:
    predicted = [z.requires_grad_() for z in groups(0)]
    before = loss(predicted, groups(1), CONFIG)
    before.backward()
    moved = [z.detach() - 0.1 * z.grad for z in predicted if z.grad is not None]
    assert all(z.grad is not None and z.grad.isfinite().all() for z in predicted)
    assert loss(moved, groups(1), CONFIG) < before


def test_gradient_is_finite_where_predictions_vanish_or_are_exact(loss: Loss) -> None:
    for start in (torch.zeros(3, 5, 12), groups(1)[0]):
        z = start.clone().requires_grad_()
        loss([z], groups(1)[:1], CONFIG).backward()
        assert z.grad is not None and z.grad.isfinite().all()


def test_lists_that_do_not_match_are_refused(loss: Loss) -> None:
    with pytest.raises(ConfigError, match="need one target per prediction"):
        loss(groups(0)[:1], groups(1), CONFIG)
    with pytest.raises(ConfigError, match="predictions are"):
        loss([torch.zeros(1, 5, 12)], [torch.zeros(3, 5, 12)], CONFIG)
