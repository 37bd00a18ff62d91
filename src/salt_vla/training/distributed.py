"""The processes that train one run together: who they are, and what they tell each other.

Knows torch.distributed, not what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process' number among `size` that train together; alone, everything here costs nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes files and talks to people."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes, of a tensor that each has."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
