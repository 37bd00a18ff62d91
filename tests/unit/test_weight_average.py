"""The moving average of the weights is the formula, stands in for them when asked, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from salt_vla.errors import RunError
from salt_vla.training.average import WeightAverage


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}


def move(weights: dict[str, nn.Parameter], number: int) -> dict[str, Tensor]:
    """Update `number` of the weights; what they are then."""
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(torch.full_like(parameter, 0.1 * (number + 1)))
    return {name: parameter.detach().double().clone() for name, parameter in weights.items()}


def test_the_average_is_the_formula() -> None:
    weights = parameters()
    average = WeightAverage(weights.items(), momentum=0.5)
    expected = {name: parameter.detach().double().clone() for name, parameter in weights.items()}
    for number in range(20):
        now = move(weights, number)
        average.update(number)
        momentum = min(0.5, (1 + number) / (10 + number))
        expected = {n: momentum * expected[n] + (1 - momentum) * now[n] for n in now}
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_it_stands_in_the_weights_place_and_leaves_them_as_they_were() -> None:
    weights = parameters()
    average = WeightAverage(weights.items(), momentum=0.9)
    now = move(weights, 0)
    with average.in_place():
        assert all(torch.equal(weights[n], average.tensors[n]) for n in weights)
        assert not torch.equal(weights["a"].double(), now["a"])
    assert all(torch.equal(weights[n].double(), now[n]) for n in weights)
    with pytest.raises(ZeroDivisionError), average.in_place():
        _ = 1 / 0
    assert all(torch.equal(weights[n].double(), now[n]) for n in weights)


def test_it_is_float32_where_the_weights_are_not() -> None:
    weights = parameters(torch.bfloat16)
    average = WeightAverage(weights.items(), momentum=0.999)
    before = average.tensors["a"].clone()
    move(weights, 0)
    for number in range(1000, 1010):
        average.update(number)
    assert average.tensors["a"].dtype == torch.float32
    assert not torch.equal(average.tensors["a"], before)  # Steps of a thousandth are lost in bfloat16.


def test_it_comes_back_from_a_checkpoint_and_from_no_other() -> None:
    weights = parameters()
    average = WeightAverage(weights.items(), momentum=0.9)
    saved = {name: tensor + 1 for name, tensor in average.tensors.items()}
    average.restore(saved, "step_00000002")
    assert all(torch.equal(average.tensors[name], saved[name]) for name in saved)
    with pytest.raises(RunError, match=r"step_00000002 does not fit .* averages of b"):
        average.restore({"a": saved["a"]}, "step_00000002")
