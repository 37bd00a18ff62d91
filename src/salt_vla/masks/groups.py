"""One split of a batch of clips into what is seen and what is predicted, and how uneven clips are brought to
one size. Knows ids of tokens, not how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from salt_vla.config import Truncate

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

# Bit masks: True = masked (a target). One row a clip, one column a token of the flattened grid.
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskGroup:
    """One split of every clip of a batch into context (seen) and target (predicted) tokens.

    Ids are sorted along a row and disjoint between the two. `context_valid` marks the real entries where a
    policy pads uneven contexts; None means that all are real. Padding stands at a row's end and repeats its
    last real id, so it names a token that is seen anyway. `context_sizes`: the rows' real entries, known
    without asking a device, so that a part of the batch is no wider than its own longest row.
    """

    context_ids: Int64[Tensor, "batch context"]
    target_ids: Int64[Tensor, "batch target"]
    context_valid: Bool[Tensor, "batch context"] | None = None
    context_sizes: tuple[int, ...] | None = None

    def rows(self, start: int, stop: int) -> MaskGroup:
        """The same group for clips start … stop − 1: a rank's or micro-batch's share of the global batch."""
        sizes = None if self.context_sizes is None else self.context_sizes[start:stop]
        return self._part(slice(start, stop), sizes)

    def at(self, places: Sequence[int]) -> MaskGroup:
        """The same group for some of the clips."""
        sizes = None if self.context_sizes is None else tuple(self.context_sizes[at] for at in places)
        return self._part(places, sizes)

    def _part(self, which: slice | Sequence[int], sizes: tuple[int, ...] | None) -> MaskGroup:
        width = max(sizes) if sizes else self.context_ids.shape[1]
        context_ids, target_ids = self.context_ids[which][:, :width], self.target_ids[which]
        if self.context_valid is None or (sizes and min(sizes) == width):
            return MaskGroup(context_ids, target_ids)  # Nothing here is padding.
        return MaskGroup(context_ids, target_ids, self.context_valid[which][:, :width], sizes)

    def to(self, device: torch.device | str) -> MaskGroup:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        valid = None if self.context_valid is None else moved(self.context_valid)
        return MaskGroup(moved(self.context_ids), moved(self.target_ids), valid, self.context_sizes)


def group_of(masked: BoolArray, policy: Truncate, max_targets: int, rng: np.random.Generator) -> MaskGroup:
    """Rows of ids from a (batch, tokens) bit mask; uneven ones are brought to one size as `policy` says.

    `end` keeps the first ids of each row, as many as the shortest has: the reference collator, which so drops
    the last time steps. `random` and `even` keep a random subset. `pad` keeps every context and cuts the
    targets at random. Then at most `max_targets` (0: all) targets are kept, chosen at random.
    """
    contexts, targets = ([np.flatnonzero(row) for row in keep] for keep in (~masked, masked))
    if policy == "pad" and len({len(ids) for ids in contexts}) > 1:
        group = _padded(contexts, _cut(targets, at_random=True, rng=rng))
    else:
        at_random = policy != "end"
        group = MaskGroup(_cut(contexts, at_random, rng), _cut(targets, at_random, rng))
    return _capped(group, max_targets, rng)


def _cut(rows: list[NDArray[np.int64]], at_random: bool, rng: np.random.Generator) -> Tensor:
    """All rows cut to the shortest's length."""
    shortest = min(len(ids) for ids in rows)
    if at_random:
        rows = [
            np.sort(rng.choice(ids, shortest, replace=False)) if len(ids) > shortest else ids for ids in rows
        ]
    return torch.from_numpy(np.stack([ids[:shortest] for ids in rows]).astype(np.int64))


def _padded(contexts: list[NDArray[np.int64]], target_ids: Tensor) -> MaskGroup:
    sizes = tuple(len(ids) for ids in contexts)
    whole = np.stack([np.pad(ids, (0, max(sizes) - len(ids)), mode="edge") for ids in contexts])
    valid = np.arange(max(sizes)) < np.array(sizes)[:, None]
    return MaskGroup(torch.from_numpy(whole.astype(np.int64)), target_ids, torch.from_numpy(valid), sizes)


def _capped(group: MaskGroup, most: int, rng: np.random.Generator) -> MaskGroup:
    """Keep a random `most` of each clip's targets: cheaper steps, the same task."""
    batch, count = group.target_ids.shape
    if not most or count <= most:
        return group
    kept = np.stack([np.sort(rng.permutation(count)[:most]) for _ in range(batch)])
    target_ids = group.target_ids.gather(1, torch.from_numpy(kept))
    return MaskGroup(group.context_ids, target_ids, group.context_valid, group.context_sizes)
