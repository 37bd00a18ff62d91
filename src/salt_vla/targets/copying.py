"""The baseline that copies: for each hidden token the nearest one that is visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

FAR = torch.iinfo(torch.int64).max // 4  # further than any token; sums of a few do not overflow


def nearest_context(
    context_ids: Int64[Tensor, "batch context"],
    target_ids: Int64[Tensor, "batch target"],
    geometry: ClipGeometry,
    context_valid: Bool[Tensor, "batch context"] | None = None,
) -> Int64[Tensor, "batch target"]:
    """For each target the visible token to copy: nearest in space first, then in time, then the first.

    So the same place at another time wins where it is visible at all (under blocks that span all time it
    never is; then the nearest visible place is copied). Padding, where `context_valid` is False, is not
    visible.

    A squared distance is a sum over axes, so the nearest token of every place is found one axis after the
    other (Felzenszwalb, Huttenlocher 2012, section 2.1): far less work than comparing all pairs of tokens.
    """
    # A place holds distance × tokens + id of the nearest token so far: the least is nearest, then first.
    found = context_ids.new_full((len(context_ids), geometry.num_tokens), FAR)
    seen = context_ids if context_valid is None else context_ids.masked_fill(~context_valid, FAR)
    found.scatter_reduce_(1, context_ids, seen, "amin")
    found = found.view(-1, *geometry.token_grid)
    steps = geometry.token_grid[0]
    for axis, (power, weight) in enumerate(((1, 1), (2, steps), (2, steps)), start=1):
        places = torch.arange(found.shape[axis], device=found.device)
        apart = (places[:, None] - places).abs() ** power * (weight * geometry.num_tokens)
        nearest = torch.full_like(found, FAR)
        for start, costs in enumerate(apart):
            way = found.narrow(axis, start, 1) + costs.view([-1 if at == axis else 1 for at in range(4)])
            torch.minimum(nearest, way, out=nearest)
        found = nearest
    return found.flatten(1).gather(1, target_ids) % geometry.num_tokens
