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
    steps, rows, columns = geometry.token_grid
    # A place holds distance × tokens + id of the nearest token so far: the least is nearest, then first.
    found = context_ids.new_full((len(context_ids), geometry.num_tokens), FAR)
    seen = context_ids if context_valid is None else context_ids.masked_fill(~context_valid, FAR)
    found.scatter_reduce_(1, context_ids, seen, "amin")
    found = found.view(-1, steps, rows, columns)
    for axis, (length, power, weight) in enumerate(((steps, 1, 1), (rows, 2, steps), (columns, 2, steps)), 1):
        places = torch.arange(length, device=found.device)
        apart = (places[:, None] - places).abs() ** power * (weight * geometry.num_tokens)
        # (…, from, to) along a last axis: the least over where one comes from.
        moved = found.movedim(axis, -1).unsqueeze(-1) + apart
        found = moved.amin(dim=-2).movedim(-1, axis)
    return found.flatten(1).gather(1, target_ids) % geometry.num_tokens
