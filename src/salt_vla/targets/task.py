"""What is being learned, as the loop sees it: a provider and a space, and their state for checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from salt_vla.models import VideoEncoder
from salt_vla.targets.providers import TargetProvider
from salt_vla.targets.space import TargetSpace


def alone(value: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return value


@dataclass(frozen=True)
class Task:
    """Where targets come from and the space in which they are compared."""

    provider: TargetProvider
    space: TargetSpace

    def begin(self, encoder: VideoEncoder) -> None:
        """Before the first step, with the encoder that is going to learn; forgets what trials have left."""
        self.provider.begin(encoder)
        self.space.begin()

    def after_step(
        self, encoder: VideoEncoder, step: int, add_up: Callable[[Tensor], Tensor] = alone
    ) -> None:
        """After update number `step` (from 0); `add_up` sums a tensor over the processes."""
        self.provider.after_step(encoder, step)
        self.space.after_step(add_up)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it, by name; empty where nothing changes while a run goes on."""
        parts = {"provider": self.provider.state(), "space": self.space.state()}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Raises `RunError` where `state` is of something else."""
        for part in (self.provider, self.space):
            prefix = "provider." if part is self.provider else "space."
            part.restore({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
