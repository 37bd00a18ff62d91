"""The space in which targets are compared, and the statistics that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.models import gather_tokens
from salt_vla.objectives import normalise

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

Mode = Literal["normalised", "centred", "raw"]


class TargetSpace:
    """How targets are compared.

    R² is always scored in the *scored* space: layer-normalised latents, or raw ones where the objective says
    `raw`. `centred` trains on scored targets minus `position_mean`, and adds it back to be scored.
    `position_mean` (tokens, dim) is the mean of scored training targets at each token place; its mean over
    places is the channel mean. Measured once, it never changes; `RunningSpace` says otherwise.
    """

    def __init__(self, mode: Mode, position_mean: Float[Tensor, "tokens dim"]) -> None:
        self.mode = mode
        self.position_mean = position_mean

    @property
    def channel_mean(self) -> Float[Tensor, " dim"]:
        return self.position_mean.mean(dim=0)

    def scored(self, raw: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return scored_targets(raw, self.mode)

    def trained(
        self, scored: Tensor, ids: Int64[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target dim"]:
        """The objective's targets at token places `ids`."""
        return self.to_trained(gather_tokens(scored, ids), ids)

    def to_trained(self, scored: Tensor, ids: Int64[Tensor, "batch target"]) -> Tensor:
        """Centre what was picked at `ids` already, where the objective does."""
        return scored - self.position_mean[ids] if self.mode == "centred" else scored

    def to_scored(self, predicted: Tensor, ids: Int64[Tensor, "batch target"]) -> Tensor:
        """Undo the centring of predictions at `ids`."""
        predicted = predicted.float()
        return predicted + self.position_mean[ids] if self.mode == "centred" else predicted

    def begin(self) -> None:
        """Before the first step: nothing has been seen."""

    def gather(self, scored: Float[Tensor, "batch tokens dim"]) -> None:
        """A part of the step's targets, to be learned from."""

    def after_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """All parts of the step were gathered; `add_up` sums a tensor over the processes."""

    def forget(self) -> None:
        """What was gathered is of a step that shall not count."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            raise RunError(
                f"statistics measured at the start have no state, but the checkpoint holds {list(state)}"
            )


class RunningSpace(TargetSpace):
    """A `TargetSpace` whose `position_mean` follows the targets of each step's global batch.

    s ← m·s + (1 − m)·batch mean and w ← m·w + 1 − m from zeros, `position_mean` = s ÷ w: the average of all
    steps before this one, without the pull to zero of its start (Kingma, Ba, arXiv:1412.6980, section 3).
    Before the first step it is zero. However a batch is split, its parts add up.
    """

    def __init__(
        self, mode: Mode, shape: tuple[int, int], momentum: float, device: torch.device | str
    ) -> None:
        super().__init__(mode, torch.zeros(shape, device=device))
        self.momentum = momentum
        self.begin()

    def begin(self) -> None:
        shape, device = self.position_mean.shape, self.position_mean.device
        self._sum = torch.zeros(shape, device=device)
        self._weight = torch.zeros((), device=device)
        self._gathered = torch.zeros(shape, dtype=torch.float64, device=device)
        self._clips = 0
        self._settle()

    def gather(self, scored: Tensor) -> None:
        self._gathered += scored.sum(dim=0, dtype=torch.float64)
        self._clips += len(scored)

    def after_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        # One tensor, so that several processes speak once.
        clips = self._gathered.new_full((1,), self._clips)
        whole = add_up(torch.cat([self._gathered.flatten(), clips]))
        mean = (whole[:-1] / whole[-1]).view_as(self._sum).float()
        self._sum.lerp_(mean, 1 - self.momentum)
        self._weight.lerp_(torch.ones_like(self._weight), 1 - self.momentum)
        self.forget()
        self._settle()

    def forget(self) -> None:
        self._gathered.zero_()
        self._clips = 0

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "weight": self._weight}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Raises `RunError` when `state` is not of running statistics of this shape."""
        if state.keys() != {"sum", "weight"} or state["sum"].shape != self._sum.shape:
            raise RunError("the checkpoint does not hold the running statistics of this run's targets")
        self._sum.copy_(state["sum"])
        self._weight.copy_(state["weight"])
        self._settle()

    def _settle(self) -> None:
        self.position_mean = torch.where(self._weight > 0, self._sum / self._weight, 0.0)


def has_running_statistics(config: TrainConfig) -> bool:
    """Whether statistics follow the run: where the settings say so, and where targets change with it."""
    return config.objective.statistics == "running" or config.target.provider == "ema"


def scored_targets(raw: Tensor, mode: str) -> Tensor:
    return raw.float() if mode == "raw" else normalise(raw)


def mean_per_position(raw_batches: Iterable[Tensor], mode: str) -> Float[Tensor, "tokens dim"]:
    """Mean of scored targets at each token place over batches of raw targets (batch, tokens, dim)."""
    total: Tensor | None = None
    count = 0
    for raw in raw_batches:
        summed = scored_targets(raw, mode).double().sum(dim=0)
        total = summed if total is None else total + summed
        count += len(raw)
    if total is None:
        raise ValueError("no batch to take the mean over")
    return (total / count).float()
