"""V-JEPA 2's attentive head: self-attention blocks over a frozen encoder's tokens, then one question to them.

Knows tensors; neither data, targets nor how a head is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salt_vla.models.attention import Block, Mlp, init_weights, rescale_residuals

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_HEADS = 16
MLP_RATIO = 4
EPSILON = 1e-6


def count_heads(dim: int) -> int:
    """Attention heads of a head this wide: 16 as the reference, or the largest divisor of `dim` below it."""
    return next(count for count in range(min(MAX_HEADS, dim), 0, -1) if dim % count == 0)


class AttentiveHead(nn.Module):
    """`depth` pre-norm self-attention blocks, a learned query that attends to all tokens, an MLP, a readout.

    As facebookresearch/vjepa2 builds it (src/models/attentive_pooler.py, `AttentiveClassifier` of depth 4;
    `depth` 3 here counts the self-attention blocks alone): no positions, no output projection after the
    cross-attention, output projections of block n divided by √(2n) at the start. A key bias is left out: it
    moves all scores of a query alike, which softmax does not see.
    """

    def __init__(self, dim: int, outputs: int, depth: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads or count_heads(dim)
        self.blocks = nn.ModuleList(Block(dim, self.num_heads, MLP_RATIO) for _ in range(depth))
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, MLP_RATIO * dim, tanh_gelu=False)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.query, std=0.02)
        rescale_residuals(self.blocks)
        with torch.no_grad():
            self.mlp.fc2.weight.div_((2.0 * max(depth, 1)) ** 0.5)
        self.readout = nn.Linear(dim, outputs)  # As torch starts it: the reference leaves it so.

    def forward(self, tokens: Float[Tensor, "clips tokens dim"]) -> Float[Tensor, "clips outputs"]:
        for block in self.blocks:
            tokens = block(tokens, None)
        return _ask([self], tokens)[0]

    def questions(self) -> Float[Tensor, "heads dim"]:
        """What the query looks for in a token after its normalisation, before its gain: keys are linear in
        the token, so query and key weights are one vector a head."""
        query = self.to_query(self.query).unflatten(0, (self.num_heads, -1))
        keys = self.to_key.weight.unflatten(0, (self.num_heads, -1))
        scale = query.shape[1] ** -0.5
        return torch.einsum("hc,hcd->hd", query * scale, keys) * self.norm1.weight

    def answer(self, found: Float[Tensor, "clips heads dim"]) -> Float[Tensor, "clips outputs"]:
        """From the attended means of normalised tokens to outputs: values are linear too, and weights of a
        softmax sum to one."""
        found = found * self.norm1.weight + self.norm1.bias
        values = self.to_value.weight.unflatten(0, (self.num_heads, -1))
        x = self.query + torch.einsum("bhd,hcd->bhc", found, values).flatten(1) + self.to_value.bias
        x = x + self.mlp(self.norm2(x))
        return self.readout(x)


def answers(
    heads: Sequence[AttentiveHead], tokens: Float[Tensor, "clips tokens dim"]
) -> list[Float[Tensor, "clips outputs"]]:
    """What each head says of the same clips. Heads without blocks share the passes over the tokens."""
    if any(len(head.blocks) for head in heads):
        return [head(tokens) for head in heads]
    return _ask(heads, tokens)


def _ask(heads: Sequence[AttentiveHead], tokens: Tensor) -> list[Tensor]:
    """Cross-attention of every head to the tokens, two products for all: clips × tokens × questions each,
    where keys and values of one head alone would cost clips × tokens × 2 dim."""
    normal = F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
    scores = torch.cat([head.questions() for head in heads]) @ normal.transpose(1, 2)
    found = scores.softmax(-1) @ normal
    parts = found.split([head.num_heads for head in heads], dim=1)
    return [head.answer(part) for head, part in zip(heads, parts, strict=True)]
