"""V-JEPA 2 encoders, run by transformers' `VJEPA2Model` without its predictor.

Owns the names under which their weights are published. Where each layout is defined:
- transformers (`encoder.layer.N.attention.query`; `predictor.…`; classifiers: `vjepa2.…`, `pooler.…`):
  huggingface/transformers src/transformers/models/vjepa2/modeling_vjepa2.py
- original (`module.backbone.blocks.N.attn.qkv`, under "target_encoder" beside "encoder" and "predictor"; a
  `pos_embed` that rotary models do not use): facebookresearch/vjepa2 src/hub/backbones.py and
  src/models/vision_transformer.py; the same mapping in transformers' convert_vjepa2_to_hf.py
V-JEPA 2.1 (app/vjepa_2_1/models/vision_transformer.py there) is another network, which transformers 5.23
does not have: its checkpoints are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder

from salt_vla.errors import ConfigError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.teachers import weights
from salt_vla.teachers.base import FrozenTeacher, TeacherRequest, require_geometry

PREFIXES = (
    (r"^(vjepa2\.|target_encoder\.|module\.|backbone\.)+", ""),
    (r"^encoder\.(module\.|backbone\.)*", ""),
)
ORIGINAL = (
    (r"^patch_embed\.", "embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"^(layer\.\d+)\.attn\.", r"\1.attention."),
    (r"^norm\.", "layernorm."),
)
# Known and not the encoder's: the predictor, a classifier's pooler and head, a table that RoPE replaces.
IGNORED = (r"predictor\..*", r"pooler\..*", r"classifier\.(weight|bias)", r"pos_embed")
ONLY_IN_2_1 = ("norms_block.", "patch_embed_img.", "img_mod_embed", "video_mod_embed")
PATCHES = "embeddings.patch_embeddings.proj.weight"


class VJEPA2Teacher(FrozenTeacher):
    """Tokens of a V-JEPA 2 encoder; its forward ends with a final norm."""

    def encode(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.module(pixels.transpose(1, 2)).last_hidden_state)


def load(path: Path, name: str, request: TeacherRequest) -> VJEPA2Teacher:
    """The teacher in a folder with config.json and safetensors.

    Rotary positions count steps, rows and columns, so any number of frames and any image size will do; the
    class takes them from its configuration, not from the clip, which is therefore set to the geometry that
    was asked for. Raises `ConfigError` for other patches or tubelets, `RunError` for a checkpoint that is not
    whole or not what its config.json says.
    """
    config = read_config(path)
    geometry = clip_geometry(config, request.geometry, name)
    tensors = encoder_tensors(weights.read_weights(path), path)
    _require_sizes(path, config, tensors)
    config.crop_size, config.frames_per_clip = geometry.image_size, geometry.num_frames
    encoder: VJEPA2Encoder = weights.build_module(lambda: VJEPA2Model(config), path).encoder
    weights.load_weights(encoder, tensors, path)
    mean, std = weights.pixel_statistics(path)
    teacher = VJEPA2Teacher(
        name,
        encoder,
        request,
        geometry=geometry,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        has_final_norm=True,
        facts={
            "family": "vjepa2",
            "heads": config.num_attention_heads,
            "epsilon": config.layer_norm_eps,
            "activation": config.hidden_act,
        },
        mean=mean,
        std=std,
    )
    encoder.layer = encoder.layer[: teacher.block]
    if not teacher.normed:
        encoder.layernorm = nn.Identity()  # type: ignore[assignment]  # Declared as the norm it was.
    return teacher


def read_config(folder: Path) -> VJEPA2Config:
    """Its predictor's sizes are not read: the class builds one, which is thrown away."""
    said = {key: value for key, value in weights.read_config(folder).items() if not key.startswith("pred_")}
    return weights.build_config(VJEPA2Config, said, folder)


def clip_geometry(config: VJEPA2Config, wanted: ClipGeometry | None, name: str) -> ClipGeometry:
    """The checkpoint's patches and tubelets, with the frames and the image size that were asked for."""
    if not isinstance(config.patch_size, int) or config.in_chans != 3:
        raise ConfigError(
            f"teacher {name} has patches of {config.patch_size} and {config.in_chans} colour channels; only "
            f"square patches of 3 channels can be used"
        )
    own = ClipGeometry(config.frames_per_clip, config.crop_size, config.tubelet_size, config.patch_size)
    if wanted is not None and (wanted.tubelet_size, wanted.patch_size) == (own.tubelet_size, own.patch_size):
        own = wanted
    require_geometry(own, wanted, name)
    return own


def encoder_tensors(held: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors of any published layout, under `VJEPA2Encoder`'s names.

    An original checkpoint holds the encoder twice; its averaged copy, "target_encoder", is the published one.
    """
    later = sorted(key for key in held if any(mark in key for mark in ONLY_IN_2_1))
    if later:
        raise RunError(
            f"the weights in {folder} are V-JEPA 2.1's ({later[0]}), a network that transformers does not "
            f"have; use a V-JEPA 2 checkpoint"
        )
    twice = any(key.startswith("target_encoder.") for key in held)
    kept = {key: held[key] for key in held if not (twice and key.startswith("encoder."))}
    return weights.mapped(kept, PREFIXES, IGNORED, ORIGINAL, folder)


def _require_sizes(folder: Path, config: VJEPA2Config, tensors: dict[str, Tensor]) -> None:
    found = weights.video_sizes(tensors, PATCHES, r"layer\.(\d+)\.", folder)
    said = {key: getattr(config, key) for key in found}
    first = "layer.0.mlp.fc1.weight"
    if first in tensors:
        found["hidden_size × mlp_ratio"] = len(tensors[first])
        said["hidden_size × mlp_ratio"] = int(config.hidden_size * config.mlp_ratio)
    weights.require_sizes(folder, said, found)
