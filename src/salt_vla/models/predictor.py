"""The predictor: from the context's tokens, what stands at the target tokens.

Knows nothing of where contexts come from or what the targets mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salt_vla.config import PredictorConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.attention import Block, init_weights, rescale_residuals, rotation, sincos_table
from salt_vla.models.encoder import gather_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class Predictor(nn.Module):
    """A narrow ViT over context tokens and one mask token a target; answers for targets only.

    The order of either list of ids is immaterial. In the last block only targets ask, since only they
    are read. Source: V-JEPA's predictor (facebookresearch/vjepa2, src/models/predictor.py), whose mask tokens
    start at zero; ours are random, since rotary positions leave a zero where it is and the first block would
    ask the same of every target.
    """

    def __init__(
        self, config: PredictorConfig, encoder_dim: int, target_dim: int, geometry: ClipGeometry
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.head_dim = config.dim // config.num_heads
        if config.positions == "rope" and self.head_dim % 2:
            raise ConfigError(
                f"rope turns pairs of channels, but predictor.dim={config.dim} over "
                f"predictor.num_heads={config.num_heads} makes heads of {self.head_dim}; choose an even width"
            )
        self.embed = nn.Linear(encoder_dim, config.dim)
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, 4.0, tanh_gelu=config.tanh_gelu) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.proj = nn.Linear(config.dim, target_dim)
        table = sincos_table(config.dim, geometry) if config.positions == "sincos" else torch.empty(0)
        self.register_buffer("positions", table, persistent=False)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)
        rescale_residuals(self.blocks)

    def forward(
        self,
        context_tokens: Float[Tensor, "batch context encoder_dim"],
        context_ids: Int64[Tensor, "batch context"],
        target_ids: Int64[Tensor, "batch target"],
        group: int = 0,
        context_valid: Tensor | None = None,
    ) -> Float[Tensor, "batch target target_dim"]:
        """`group` chooses the mask token. Raises `ConfigError` for a group that has none."""
        if not 0 <= group < len(self.mask_tokens):
            raise ConfigError(
                f"mask group {group} has no mask token; predictor.num_mask_tokens is {len(self.mask_tokens)}"
            )
        batch, num_targets = target_ids.shape
        asked = self.mask_tokens[group].expand(batch, num_targets, -1)
        embedded = self.embed(context_tokens)
        x = torch.cat([embedded, asked.to(embedded.dtype)], dim=1)
        ids = torch.cat([context_ids, target_ids], dim=1)
        turn = None
        if self.config.positions == "sincos":
            x = x + gather_tokens(self.positions.unsqueeze(0), ids)  # type: ignore[operator]
        else:
            turn = rotation(ids, self.head_dim, self.geometry)
        valid = None
        if context_valid is not None:
            valid = torch.cat([context_valid, torch.ones_like(target_ids, dtype=torch.bool)], dim=1)
        for number, block in enumerate(self.blocks, start=1):
            last = num_targets if number == len(self.blocks) else None
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, turn, valid, last, use_reentrant=False)
            else:
                x = block(x, turn, valid, last)
        return self.proj(self.norm(x))


def build_predictor(
    config: PredictorConfig, encoder_dim: int, target_dim: int, geometry: ClipGeometry
) -> Predictor:
    """A freshly initialised predictor from `encoder_dim` wide contexts to `target_dim` wide targets."""
    return Predictor(config, encoder_dim, target_dim, geometry)
