"""The video encoder: a ViT over tubelets that computes only the tokens it is shown.

Knows nothing of teachers, targets or training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salt_vla.config import EncoderConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.attention import Block, init_weights, rescale_residuals, rotation, sincos_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True)
class VitSize:
    """What a size's name stands for: width, blocks, attention heads, and how much wider the MLP is."""

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


# timm's names for the sizes, with V-JEPA 2's 22 heads for "giant" (timm has 16); "micro" is ours, for CPU
# demonstrations and tests.
SIZES = {
    "micro": VitSize(128, 4, 4),
    "tiny": VitSize(192, 12, 3),
    "small": VitSize(384, 12, 6),
    "medium": VitSize(512, 12, 8),
    "base": VitSize(768, 12, 12),
    "large": VitSize(1024, 24, 16),
    "huge": VitSize(1280, 32, 16),
    "giant": VitSize(1408, 40, 22, 48 / 11),
    "gigantic": VitSize(1664, 48, 16, 64 / 13),
}
_NAME = re.compile(r"^vit_(?P<size>[a-z]+)(?:_patch(?P<patch>\d+)_(?P<image>\d+))?$")


def vit_size(config: EncoderConfig) -> VitSize:
    """Width, depth and heads that a name like `vit_base_patch16_224` stands for.

    Raises `ConfigError` for an unknown name, or when the name's patch or image size contradicts the
    geometry.
    """
    match = _NAME.match(config.name)
    if match is None or match["size"] not in SIZES:
        known = ", ".join(f"vit_{size}" for size in SIZES)
        raise ConfigError(
            f"encoder.name {config.name!r} is unknown; sizes: {known} (+ _patch16_224 and so on)"
        )
    geometry = config.geometry
    for part, actual in (("patch", geometry.patch_size), ("image", geometry.image_size)):
        if match[part] and int(match[part]) != actual:
            raise ConfigError(
                f"encoder.name {config.name!r} says {part} {match[part]} but the geometry has {actual}; "
                f"change one of them"
            )
    return SIZES[match["size"]]


def patchify(pixels: Tensor, geometry: ClipGeometry) -> Tensor:
    """(batch, 3, T, H, W) → (batch, tokens, patch_dim); a tubelet's numbers lie in Conv3d weight order:
    colour, time, row, column. Token order as in `ClipGeometry`.
    """
    steps, rows, columns = geometry.token_grid
    tubelet, patch = geometry.tubelet_size, geometry.patch_size
    x = pixels.reshape(len(pixels), 3, steps, tubelet, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(pixels), geometry.num_tokens, geometry.patch_dim)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (batch, k) of x (batch or 1, tokens, dim) → (batch, k, dim)."""
    return x.expand(len(ids), -1, -1).gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class VideoEncoder(nn.Module):
    """`encoder(pixels, context_ids=None) -> (batch, tokens or context, dim)`, layer-normed at the end.

    With `context_ids` only those tokens are embedded and attended: hidden tokens cannot leak in.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = vit_size(config)
        depth = config.depth or size.depth
        self.config = config
        self.geometry = config.geometry
        self.dim = size.dim
        self.head_dim = size.dim // size.num_heads
        self.patch_embed = nn.Linear(config.geometry.patch_dim, size.dim)
        drop = [config.drop_path * number / max(depth - 1, 1) for number in range(depth)]
        self.blocks = nn.ModuleList(
            Block(size.dim, size.num_heads, size.mlp_ratio, drop[i], config.tanh_gelu) for i in range(depth)
        )
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        table = sincos_table(size.dim, self.geometry) if config.positions == "sincos" else torch.empty(0)
        self.register_buffer("positions", table, persistent=False)
        self.apply(init_weights)
        rescale_residuals(self.blocks)

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 frames height width"],
        context_ids: Int64[Tensor, "batch context"] | None = None,
        context_valid: Tensor | None = None,
        layer: int | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`pixels` are normalised. `layer` = n: the tokens after block n (from 1), through the final norm."""
        self._check(pixels)
        return self.encode_tubelets(patchify(pixels, self.geometry), context_ids, context_valid, layer)

    def encode_tubelets(
        self,
        tubelets: Float[Tensor, "batch tokens patch_dim"],
        context_ids: Int64[Tensor, "batch context"] | None = None,
        context_valid: Tensor | None = None,
        layer: int | None = None,
        keep: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`forward` for pixels that were cut already: several contexts of a clip share one `patchify`.

        `keep` (batch, depth, 2): which residuals stochastic depth leaves in; None: drawn here.
        """
        if layer is not None and not 1 <= layer <= len(self.blocks):
            raise ConfigError(f"encoder {self.config.name} has layers 1 … {len(self.blocks)}, not {layer}")
        ids = context_ids
        if ids is None:
            ids = torch.arange(self.geometry.num_tokens, device=tubelets.device).unsqueeze(0)
        else:
            tubelets = gather_tokens(tubelets, ids)
        x = self.patch_embed(tubelets)
        turn = None
        if self.config.positions == "sincos":
            x = x + gather_tokens(self.positions.unsqueeze(0), ids)  # type: ignore[operator]
        else:
            turn = rotation(ids, self.head_dim, self.geometry)
        for number, block in enumerate(self.blocks[:layer]):
            kept = None if keep is None else keep[:, number]
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, turn, context_valid, None, kept, use_reentrant=False)
            else:
                x = block(x, turn, context_valid, keep=kept)
        return self.norm(x)

    def _check(self, pixels: Tensor) -> None:
        g = self.geometry
        expected = (3, g.num_frames, g.image_size, g.image_size)
        if tuple(pixels.shape[1:]) != expected:
            raise ConfigError(
                f"encoder {self.config.name} takes clips of shape (batch, {', '.join(map(str, expected))}) "
                f"(3, frames, height, width), not {tuple(pixels.shape)}"
            )


def build_encoder(config: EncoderConfig) -> VideoEncoder:
    """A freshly initialised encoder; seed torch first for reproducible weights."""
    return VideoEncoder(config)
