"""VideoMAE and VideoMAEv2 of any size, run by transformers' `VideoMAEModel`, never by remote code.

Owns the names under which their weights are published. Where each layout is defined:
- transformers (`videomae.…attention.attention.q_bias`; `fc_norm`, `classifier`; `decoder.…`):
  huggingface/transformers src/transformers/models/videomae/{modeling_videomae,convert_videomae_to_pytorch}.py
- original (`blocks.N.attn.qkv.weight`, `q_bias`, `v_bias`, no bias of keys): MCG-NJU/VideoMAE
  modeling_finetune.py (`norm` or `fc_norm`, `head`) and modeling_pretrain.py (`encoder.…`, `decoder.…`,
  `encoder_to_decoder`, `mask_token`); a checkpoint's dict keeps them under "model" or "module"
- VideoMAEv2: OpenGVLab/VideoMAEv2 run_class_finetuning.py (`_orig_mod.`, `backbone.`, `encoder.` in front);
  its hub repositories' modeling_videomaev2.py wraps the network as `model.`
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel

from salt_vla.errors import ConfigError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.teachers import weights
from salt_vla.teachers.base import FrozenTeacher, TeacherRequest, require_geometry

PREFIXES = (
    (r"^(module\.|model\.|_orig_mod\.|backbone\.|videomae\.)+", ""),
    (r"^encoder\.(?=(blocks|patch_embed|norm|pos_embed|head)\b)", ""),
)
ORIGINAL = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"^(encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^(encoder\.layer\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"^(encoder\.layer\.\d+)\.attn\.", r"\1.attention.attention."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^norm\.", "layernorm."),
    # transformers up to 4.x and its saved files: biases apart from the projections.
    (r"\.attention\.attention\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attention\.attention\.v_bias$", ".attention.attention.value.bias"),
)
# Known and not the encoder's: the pixel decoder of pre-training, the heads of classifiers.
IGNORED = (
    r"decoder\..*",
    r"encoder_to_decoder\.(weight|bias)",
    r"mask_token",
    r"decoder_pos_embed",
    r"fc_norm\.(weight|bias)",
    r"(head|classifier)\.(weight|bias)",
)
POSITIONS = "embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection.weight"
HALF_ROUNDING = 4e-3  # A sine stored as bfloat16 is off by up to 2⁻⁹.


class VideoMAETeacher(FrozenTeacher):
    """Tokens of a `VideoMAEModel`.

    With `use_mean_pooling` (every fine-tuned checkpoint, and VideoMAEv2) the class has no final norm: its
    tokens are the raw residual stream, and so are these. A classifier's `fc_norm` belongs behind the mean
    over tokens and is not applied.
    """

    def encode(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.module(pixels.transpose(1, 2)).last_hidden_state)


def load(path: Path, name: str, request: TeacherRequest) -> VideoMAETeacher:
    """The teacher in a folder with config.json and safetensors.

    Its position table numbers all tokens of a clip in one row, so another geometry than the checkpoint's
    would give every token another code than it was trained with: that is a `ConfigError`. Raises `RunError`
    for a checkpoint that is not whole or not what its config.json says.
    """
    config = read_config(path)
    geometry = clip_geometry(config, name)
    require_geometry(geometry, request.geometry, name)
    tensors = encoder_tensors(weights.read_weights(path), path)
    _require_sizes(path, config, tensors)
    table = tensors.pop(POSITIONS, None)
    model = weights.build_module(lambda: VideoMAEModel(config), path)
    weights.load_weights(model, tensors, path)
    _require_positions(path, model, table)
    mean, std = weights.pixel_statistics(path)
    teacher = VideoMAETeacher(
        name,
        model,
        request,
        geometry=geometry,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        has_final_norm=model.layernorm is not None,
        facts={
            "family": "videomae",
            "heads": config.num_attention_heads,
            "epsilon": config.layer_norm_eps,
            "activation": config.hidden_act,
        },
        mean=mean,
        std=std,
    )
    model.encoder.layer = model.encoder.layer[: teacher.block]
    if not teacher.normed:
        model.layernorm = None
    # Beside the weights: the class copies it there again in every forward.
    model.embeddings.position_embeddings = model.embeddings.position_embeddings.to(teacher.device)
    return teacher


def read_config(folder: Path) -> VideoMAEConfig:
    """transformers' configuration, from its own config.json or from a VideoMAEv2 hub repository's."""
    said = weights.read_config(folder)
    if "model_config" in said:
        said = _from_videomae_v2(said["model_config"], folder)
    return weights.build_config(VideoMAEConfig, said, folder)


def _from_videomae_v2(said: Any, folder: Path) -> dict[str, Any]:
    """The fields of a VideoMAEv2 hub repository's `model_config`, under transformers' names.

    Refuses what `VideoMAEModel` cannot compute: cosine attention, layer scale, a custom attention scale.
    """
    if not isinstance(said, dict):
        raise RunError(f"{folder / weights.CONFIG}: model_config must be an object, not {said!r}")
    for key, harmless in (("cos_attn", (False,)), ("init_values", (0, None)), ("qk_scale", (None,))):
        if key in said and said[key] not in harmless:
            raise RunError(
                f"{folder / weights.CONFIG} has {key}={said[key]!r}, which VideoMAEModel cannot compute; "
                f"such a checkpoint cannot be a teacher here"
            )
    try:
        return {
            "image_size": said["img_size"],
            "patch_size": said["patch_size"],
            "num_channels": said["in_chans"],
            "num_frames": said["num_frames"],
            "tubelet_size": said["tubelet_size"],
            "hidden_size": said["embed_dim"],
            "num_hidden_layers": said["depth"],
            "num_attention_heads": said["num_heads"],
            "intermediate_size": round(said["embed_dim"] * said["mlp_ratio"]),  # Giant: 1408 × 48/11.
            "hidden_act": "gelu",  # torch's nn.GELU: the exact one.
            "layer_norm_eps": said["layer_norm_eps"],
            "qv_bias": said["qkv_bias"],
            "use_mean_pooling": said["use_mean_pooling"],
        }
    except KeyError as error:
        raise RunError(f"{folder / weights.CONFIG} lacks model_config.{error.args[0]}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{folder / weights.CONFIG}: model_config.mlp_ratio is no number: {error}") from error


def clip_geometry(config: VideoMAEConfig, name: str) -> ClipGeometry:
    """What the network takes; `ConfigError` for other than square RGB clips."""
    image, patch = (_square(size, name) for size in (config.image_size, config.patch_size))
    if config.num_channels != 3:
        raise ConfigError(f"teacher {name} takes {config.num_channels} colour channels, not 3")
    return ClipGeometry(config.num_frames, image, config.tubelet_size, patch)


def _square(size: int | list[int] | tuple[int, ...], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"teacher {name} takes pictures or patches of {size}; only square ones can be used")
    return sides.pop()


def encoder_tensors(held: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors of any published layout, under `VideoMAEModel`'s names.

    What pre-training or classification put beside the encoder is left out by name; anything else stays and
    is an error when it is loaded.
    """
    # In a pre-training checkpoint a table outside `encoder.` is the decoder's.
    pretrained = any("encoder.patch_embed." in key for key in held)
    outside = (r"(module\.|model\.)*pos_embed",) if pretrained else ()
    kept = {key: held[key] for key in held if not any(re.fullmatch(pattern, key) for pattern in outside)}
    return weights.mapped(kept, PREFIXES, IGNORED, ORIGINAL, folder)


def _require_sizes(folder: Path, config: VideoMAEConfig, tensors: dict[str, Tensor]) -> None:
    found = weights.video_sizes(tensors, PATCHES, r"encoder\.layer\.(\d+)\.", folder)
    first = "encoder.layer.0.intermediate.dense.weight"
    if first in tensors:
        found["intermediate_size"] = len(tensors[first])
    said = {key: getattr(config, key) for key in found if key != "patch_size"}
    weights.require_sizes(folder, said | {"patch_size": _square(config.patch_size, str(folder))}, found)


def _require_positions(folder: Path, model: VideoMAEModel, table: Tensor | None) -> None:
    """A table in the file must be the sinusoid that the class computes: the class cannot hold another."""
    ours = model.embeddings.position_embeddings
    if table is None:
        return
    same = table.shape == ours.shape and torch.allclose(table.float(), ours, rtol=0, atol=HALF_ROUNDING)
    if not same:
        raise RunError(
            f"the position table in {folder} is not the sinusoid that VideoMAEModel computes for this "
            f"config.json (learned, permuted, or for another geometry); such a checkpoint cannot be used"
        )
