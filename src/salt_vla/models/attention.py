"""Transformer blocks whose tokens carry their place in the clip: 3-axis RoPE, SDPA, pre-norm.

Knows positions and widths, not what the tokens mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salt_vla.geometry import ClipGeometry

Rotation = tuple[Tensor, Tensor]  # (cos, sin), each (batch or 1, tokens, 1, head_dim); see `rotation`


def token_places(ids: Tensor, geometry: ClipGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """(time, row, column) of token ids; each has the shape of `ids`."""
    _, _, columns = geometry.token_grid
    per_step = geometry.tokens_per_step
    place = ids % per_step
    return ids // per_step, place // columns, place % columns


def rotation(ids: Tensor, head_dim: int, geometry: ClipGeometry) -> Rotation:
    """Cosines and sines that turn queries and keys by their place in the clip.

    `ids`: (batch or 1, tokens). Each axis owns 2·⌊(head_dim ÷ 3) ÷ 2⌋ channels, the rest is not turned. The
    frequencies are *tiled* over an axis' channels, not interleaved, as in V-JEPA 2's released weights
    (facebookresearch/vjepa2, src/models/utils/modules.py; transformers' `rotate_queries_or_keys`): the two
    channels of a pair turn by different angles, so a score is not a function of distance alone.
    """
    axis_dim = 2 * ((head_dim // 3) // 2)
    half = axis_dim // 2
    omega = 1.0 / 10000 ** (torch.arange(half, device=ids.device, dtype=torch.float32) / max(half, 1))
    angles = [(axis.float().unsqueeze(-1) * omega).repeat(1, 1, 2) for axis in token_places(ids, geometry)]
    still = torch.zeros(*ids.shape, head_dim - 3 * axis_dim, device=ids.device)
    angle = torch.cat([*angles, still], dim=-1).unsqueeze(2)
    # (x₀, x₁) → (x₀ cos₀ − x₁ sin₀, x₁ cos₁ + x₀ sin₁): the sign is the sine's, once for all blocks.
    signs = torch.arange(head_dim, device=ids.device) % 2 * 2.0 - 1
    return angle.cos(), angle.sin() * signs


def _swapped(x: Tensor) -> Tensor:
    """Neighbouring channels change places."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack((pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn neighbouring channel pairs of x (batch, tokens, heads, head_dim), in the precision of x."""
    cos, sin = (part.to(x.dtype) for part in by)
    return (x * cos).addcmul_(_swapped(x), sin)


class _Turned(torch.autograd.Function):
    """`rotate`, knowing its own gradient: autograd's would keep and fill several tensors as large as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, (cos, sin))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, (cos, _swapped(sin))), None, None


def turned(x: Tensor, by: Rotation) -> Tensor:
    """`rotate`, with a gradient of its own where one is asked for."""
    return _Turned.apply(x, *by) if x.requires_grad else rotate(x, by)


def sincos_table(dim: int, geometry: ClipGeometry) -> Tensor:
    """Fixed 3-D sin-cos positions, (num_tokens, dim): time, row, column share the channels.

    Row and column have an even share each, time takes what is left over.
    """
    ids = torch.arange(geometry.num_tokens)
    share = 2 * (dim // 6)
    widths = (dim - 2 * share, share, share)
    parts = []
    for axis, width in zip(token_places(ids, geometry), widths, strict=True):
        half = (width + 1) // 2
        omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float32) / max(half, 1))
        angle = axis.float().unsqueeze(-1) * omega
        parts.append(torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width])
    return torch.cat(parts, dim=-1)


class Attention(nn.Module):
    """Multi-head attention with a joint qkv projection (timm's layout)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, turn: Rotation | None, valid: Tensor | None = None, last_queries: int | None = None
    ) -> Tensor:
        """x (batch, tokens, dim). With `last_queries` = n only the last n tokens ask; all answer.

        `valid` (batch, tokens): False entries are padding and are not attended to.
        """
        batch, tokens, dim = x.shape
        first = 0 if last_queries is None else tokens - last_queries
        if first:
            q = F.linear(x[:, first:], self.qkv.weight[:dim], self.qkv.bias[:dim])
            k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (q, k, v))
        if turn is not None:
            cos, sin = turn
            k = turned(k, turn)
            q = turned(q, (cos[:, first:], sin[:, first:]))
        mask = None if valid is None else valid[:, None, None, :]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        return self.proj(y.transpose(1, 2).reshape(batch, -1, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, tanh_gelu: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh" if tanh_gelu else "none")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth (one draw a clip)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0, tanh_gelu: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), tanh_gelu)
        self.drop_path = drop_path

    def _drop(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept`: which clips keep this residual; drawn here where nobody says so."""
        if not self.training or self.drop_path == 0:
            return x
        share = 1 - self.drop_path
        if kept is None:
            kept = torch.empty(len(x), device=x.device).bernoulli_(share)
        return x * kept.to(x.dtype)[:, None, None] / share

    def forward(
        self,
        x: Tensor,
        turn: Rotation | None,
        valid: Tensor | None = None,
        last_queries: int | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`keep` (batch, 2): which clips keep the residual of the attention, and that of the MLP."""
        of_attention, of_mlp = (None, None) if keep is None else (keep[:, 0], keep[:, 1])
        residual = x if last_queries is None else x[:, x.shape[1] - last_queries :]
        x = residual + self._drop(self.attn(self.norm1(x), turn, valid, last_queries), of_attention)
        return x + self._drop(self.mlp(self.norm2(x)), of_mlp)


def init_weights(module: nn.Module) -> None:
    """The reference's start: truncated normal of deviation 0.02 for weights, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def rescale_residuals(blocks: nn.ModuleList) -> None:
    """Divide the two output projections of block n (from 1) by √(2n), as the reference does at the start."""
    for number, block in enumerate(blocks, start=1):
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * number) ** 0.5)  # type: ignore[union-attr,operator]
            block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)  # type: ignore[union-attr,operator]
