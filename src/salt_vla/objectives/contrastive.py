"""InfoNCE between predictions and targets: each prediction shall find its own target among the others.

Van den Oord, Li, Vinyals, arXiv:1807.03748, equation 4, with cosines as scores; knows no configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

MOST_TOKENS = 1024  # a group's tokens that are compared with each other: a table of 4 MiB in float32


def info_nce(
    predicted: Sequence[Float[Tensor, "batch target dim"]],
    targets: Sequence[Float[Tensor, "batch target dim"]],
    temperature: float,
    most_tokens: int = MOST_TOKENS,
) -> tuple[Float[Tensor, ""], float]:
    """(loss, chance level): mean over mask groups and tokens of −log softmax_j(cos(z_i, t_j) ÷ τ) at j = i.

    Negatives are the other targets of the group, of the same clip and of other clips alike. A group with more
    than `most_tokens` takes as many, evenly spaced over clips and places. Who cannot tell targets apart gets
    the chance level, mean over groups of log n. In float32.
    """
    losses, chances = [], []
    for z, t in zip(predicted, targets, strict=True):
        total = z.shape[0] * z.shape[1]
        count = min(total, most_tokens)
        chosen = torch.arange(count, device=z.device) * total // count
        # Chosen first: normalising all of them would cost as much as the regression.
        left = F.normalize(z.flatten(0, 1)[chosen].float(), dim=-1)
        right = F.normalize(t.flatten(0, 1)[chosen].float(), dim=-1)
        scores = left @ right.T / temperature
        losses.append(F.cross_entropy(scores, torch.arange(count, device=z.device)))
        chances.append(math.log(count))
    return torch.stack(losses).mean(), sum(chances) / len(chances)
