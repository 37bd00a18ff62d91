"""Attention rollout: how much of each token of a clip reaches each token that an encoder gives.

Knows our encoder's blocks; models of others do not show their attention here, and are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salt_vla.errors import ConfigError
from salt_vla.models.attention import Attention, rotate
from salt_vla.teachers.pixel import EncoderTeacher

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    from salt_vla.evaluation.features import TokenModel
    from salt_vla.models.attention import Rotation


def attention_map(
    attention: Attention, x: Float[Tensor, "batch tokens dim"], turn: Rotation | None
) -> Float[Tensor, "batch heads tokens tokens"]:
    """softmax(QKᵀ/√d) of one layer for its (normed) input, in float32: row i is what token i looks at."""
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    q, k = (y.unflatten(-1, (attention.num_heads, attention.head_dim)) for y in (q, k))
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / attention.head_dim**0.5
    return scores.softmax(-1)


@torch.inference_mode()
def attention_rollout(
    name: str, model: TokenModel, frames_uint8: UInt8[Tensor, "batch frames height width 3"]
) -> Float[Tensor, "batch tokens tokens"]:
    """Row i: the shares of all input tokens in output token i; rows sum to 1.

    Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3: the product over layers,
    first to last, of ½ A + ½ I, with A the mean over heads; ½ I stands for the residual connection. It takes
    neither values nor MLPs into account: it shows where attention goes, not what is used. Raises
    `ConfigError` for a model that does not show its attention.
    """
    if not isinstance(model, EncoderTeacher):
        raise ConfigError(
            f"encoder {name!r} does not show its attention: attention rollout needs an encoder of this "
            "package (a run, checkpoint or export)"
        )
    rolled: list[Tensor] = []

    def follow(attention: Any, arguments: tuple[Any, ...]) -> None:
        mean = attention_map(attention, arguments[0], arguments[1]).mean(1)
        step = 0.5 * (mean + torch.eye(mean.shape[-1], device=mean.device))
        rolled[:] = [step if not rolled else step @ rolled[0]]

    hooks = [block.attn.register_forward_pre_hook(follow) for block in model.encoder.blocks]  # type: ignore[union-attr]
    try:
        model.latents(frames_uint8)
    finally:
        for hook in hooks:
            hook.remove()
    return rolled[0].cpu()
