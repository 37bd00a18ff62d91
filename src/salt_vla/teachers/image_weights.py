"""The names under which image towers' weights are published, and their way into transformers' classes.

Owns one plain name for each tensor (`blocks.0.attn.q.weight`), to which file names and the class's own are
both brought: transformers renames its modules between versions, files keep the old names. Sources:
- transformers' files: src/transformers/models/{dinov2,dinov3_vit,siglip,siglip2}/modeling_*.py and
  conversion_mapping.py (`attention.attention.query` → `attention.q_proj`, `layer.N` → `model.layer.N`)
- facebookresearch/dinov2, dinov2/models/vision_transformer.py, layers/{attention,layer_scale,swiglu_ffn}.py:
  `blocks.N.attn.qkv`, `ls1.gamma`, `mlp.w12`; the same mapping in transformers' convert_dinov2_to_hf.py
- facebookresearch/dinov3, dinov3/models/vision_transformer.py and layers/: `storage_tokens`,
  `rope_embed.periods`, `attn.qkv.bias_mask`, `mlp.w1|w2|w3`; also transformers' convert_dinov3_vit_to_hf.py
- open_clip's SigLIP, a timm tower below `visual.trunk.`: mlfoundations/open_clip src/open_clip/timm_model.py,
  huggingface/pytorch-image-models timm/models/vision_transformer.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_vla.errors import RunError
from salt_vla.teachers import weights

PREFIXES = (
    (r"^(module\.|backbone\.|visual\.trunk\.|vision_model\.|dinov2\.|dinov2_with_registers\.)+", ""),
    (r"^embeddings\.", ""),
)
PLAIN = (
    (r"^(?:encoder\.|model\.)?(?:layers?|blocks)\.(\d+)\.", r"blocks.\1."),
    (r"^patch_embed(?:dings?)?\.(?:proj(?:ection)?\.)?(?=weight|bias)", "patch."),
    (r"^(?:pos_embed|position_embeddings|position_embedding\.weight)$", "positions"),
    (r"^(?:storage_tokens|register_tokens)$", "registers"),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.(?:layer_scale|ls)(\d)\.(?:lambda1|gamma)$", r".scale\1"),
    (r"\.(?:attention\.attention|attention|self_attn)\.", ".attn."),
    (r"\.attn\.(?:query|q_proj)\.", ".attn.q."),
    (r"\.attn\.(?:key|k_proj)\.", ".attn.k."),
    (r"\.attn\.(?:value|v_proj)\.", ".attn.v."),
    (r"\.attn\.(?:output\.dense|o_proj|out_proj|proj)\.", ".attn.out."),
    (r"\.mlp\.(?:w12|weights_in)\.", ".mlp.gate_up."),
    (r"\.mlp\.(?:w1|gate_proj)\.", ".mlp.gate."),
    (r"\.mlp\.(?:w2|fc1|up_proj)\.", ".mlp.up."),
    (r"\.mlp\.(?:w3|fc2|weights_out|down_proj)\.", ".mlp.down."),
)
# Known and not the tower's: the text side, the pooling head, a classifier.
IGNORED = (
    r"(text_model|text)\..*",
    r"logit_(scale|bias)",
    r"head\..*",
    r"attn_pool\..*",
    r"classifier\.(weight|bias)",
)
PERIODS = "rope_embed.periods"


def tower_tensors(held: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tower's tensors of any published layout, under plain names; fused ones are split."""
    plain = weights.mapped(held, PREFIXES, IGNORED, PLAIN, folder)
    masks = {key for key in plain if key.endswith(".attn.qkv.bias_mask")}
    # DINOv3 multiplies the bias of keys by a mask of zeros: what is stored there is never used.
    unused = masks | {mask.replace("qkv.bias_mask", "k.bias") for mask in masks}
    found: dict[str, Tensor] = {}
    for key, tensor in plain.items():
        head, fused, kind = key.partition(".gate_up.")
        if fused:
            gate, up = tensor.chunk(2)  # SwiGLU: silu(first half) × second half, in both repositories.
            found |= {f"{head}.gate.{kind}": gate, f"{head}.up.{kind}": up}
        elif key not in unused:
            found[key] = tensor
    return found


def load(module: nn.Module, plain: Mapping[str, Tensor], folder: Path) -> None:
    """Put plain-named tensors into a class, whatever this version of transformers calls its modules."""
    state = module.state_dict()
    own = {
        name: key for key in state for name in weights.mapped({key: state[key]}, PREFIXES, (), PLAIN, folder)
    }
    named = {}
    for name, tensor in plain.items():
        key = own.get(name, name)
        # (1, D), (1, 1, D) and (D) are one token; (1, N, D) and (N, D) one table: repositories differ.
        alike = key in state and _without_ones(state[key]) == _without_ones(tensor)
        named[key] = tensor.reshape(state[key].shape) if alike else tensor
    weights.load_weights(module, named, folder)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def require_periods(plain: dict[str, Tensor], theta: float, head_dim: int, folder: Path) -> None:
    """Take DINOv3's rotary periods out of the tensors; they must be those that config.json's base gives.

    θ^(4·i ÷ head_dim), i < head_dim ÷ 4. Published files hold them in bfloat16: 2⁻⁸ is allowed.
    """
    held = plain.pop(PERIODS, None)
    ours = theta ** (torch.arange(head_dim // 4) * 4 / head_dim)
    if held is not None and not (
        held.shape == ours.shape and torch.allclose(held.float(), ours, rtol=2**-8, atol=0)
    ):
        raise RunError(
            f"the rotary periods in {folder} are not those of rope_theta={theta} and {head_dim} channels a "
            f"head; correct {weights.CONFIG}"
        )
