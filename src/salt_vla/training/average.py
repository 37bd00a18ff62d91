"""A moving average of the weights: better than the last ones at a constant rate, and free to look at.

Knows parameters by their names, not what they are of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from salt_vla.errors import RunError


class WeightAverage:
    """average ← momentum · average + (1 − momentum) · weights, in float32; begins as the weights are.

    The momentum of the first steps is smaller, min(momentum, (1 + n) / (10 + n)) at update n (from 0), so
    that the random start is soon forgotten (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], momentum: float) -> None:
        self._parameters = dict(parameters)
        self.momentum = momentum
        self.tensors = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """After update `number` (from 0) of the parameters."""
        momentum = min(self.momentum, (1 + number) / (10 + number))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - momentum)

    def restore(self, tensors: dict[str, Tensor], where: object) -> None:
        if tensors.keys() != self.tensors.keys():
            differing = ", ".join(sorted(tensors.keys() ^ self.tensors.keys()))
            raise RunError(f"{where} does not fit this run's configuration: averages of {differing}")
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the averages stand in the parameters' place."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(weights)

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
