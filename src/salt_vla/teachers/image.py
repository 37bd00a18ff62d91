"""Image towers as teachers of video: DINOv2 (with registers), DINOv3, SigLIP and SigLIP 2, frame by frame.

Owns how a clip's frames become one vector a tubelet token; the names of weights are `image_weights.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from salt_vla.errors import ConfigError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.pixels import MEAN, STD
from salt_vla.teachers import image_weights, weights
from salt_vla.teachers.base import FrozenTeacher, TeacherRequest, require_geometry

MAX_BLOCKS = 1000  # The classes write a list of them before any weight is looked at.
FRAMES_AT_ONCE = 64  # Bounds the memory of a batch: 32 clips of 16 frames are 512 pictures.
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Tower:
    """A published class, where its vision settings lie, and how it treats pictures.

    `fixed_size`: its position table has one size, that of `config.image_size`; the others interpolate theirs
    or turn by angles, and take any multiple of their patch.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    part: str = ""
    fixed_size: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


_SIGLIP = (SiglipVisionConfig, SiglipVisionModel)
_SIGLIP2 = (Siglip2VisionConfig, Siglip2VisionModel)
# model_type of config.json → tower. A full SigLIP model's vision tower is described in its `vision_config`.
TOWERS = {
    "dinov2": Tower(Dinov2Config, Dinov2Model),
    "dinov2_with_registers": Tower(Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    "dinov3_vit": Tower(DINOv3ViTConfig, DINOv3ViTModel),
    "siglip": Tower(*_SIGLIP, "vision_config", fixed_size=True, mean=HALF, std=HALF),
    "siglip_vision_model": Tower(*_SIGLIP, fixed_size=True, mean=HALF, std=HALF),
    "siglip2": Tower(*_SIGLIP2, "vision_config", mean=HALF, std=HALF),
    "siglip2_vision_model": Tower(*_SIGLIP2, mean=HALF, std=HALF),
}


class ImageTeacher(FrozenTeacher):
    """An image tower's patch tokens, one picture at a time, brought to a clip's tubelet tokens.

    A frame whose side the tower cannot take is resized (torch's antialiased bilinear filter, normalised
    pixels, float32); class and register tokens are dropped; the tokens of a tubelet's frames are averaged,
    and the tower's own patch grid is resampled to the clip's by the same filter. Both are linear, so their
    order does not matter. Nothing here sees motion: each frame is encoded alone.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        request: TeacherRequest,
        *,
        geometry: ClipGeometry,
        tower: Tower,
        side: int,
        statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
    ) -> None:
        config = model.config
        self.side, self.patch = side, int(config.patch_size)
        facts = {key: config.to_dict()[key] for key in _DECIDING if key in config.to_dict()}
        super().__init__(
            name,
            model,
            request,
            geometry=geometry,
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            has_final_norm=True,
            facts=facts | {"family": config.model_type, "side": side},
            mean=statistics[0],
            std=statistics[1],
        )
        self.own_rows = self.side // self.patch
        self._forward: Callable[[Tensor], Tensor] = (
            self._patches_forward if tower.model is Siglip2VisionModel else self._pictures_forward
        )
        _cut(model, self.block, self.normed)
        if isinstance(
            model, DINOv3ViTModel
        ):  # Its angles stay float32 in every precision, as in its own class.
            model.rope_embeddings = _angles(model).to(request.device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised (batch, 3, frames, height, width) → (batch, tokens, dim), float32."""
        clips, tubelet = len(pixels), self.geometry.tubelet_size
        frames = pixels.transpose(1, 2).flatten(0, 1)
        whole_tubelets = tubelet * max(1, FRAMES_AT_ONCE // tubelet)
        parts = [self._tubelets(chunk) for chunk in frames.split(whole_tubelets)]
        return torch.cat(parts).reshape(clips, self.geometry.num_tokens, self.dim)

    def _tubelets(self, frames: Tensor) -> Tensor:
        """(tubelets · tubelet_size, 3, height, width) → (tubelets, tokens a step, dim)."""
        grid, own = self.geometry.token_grid[1], self.side // self.patch
        tokens = self._forward(_resized(frames, self.side))[:, -own * own :].float()
        tokens = tokens.unflatten(0, (-1, self.geometry.tubelet_size)).mean(dim=1)
        maps = tokens.transpose(1, 2).unflatten(2, (own, own))
        return _resized(maps, grid).flatten(2).transpose(1, 2)

    def _pictures_forward(self, pictures: Tensor) -> Tensor:
        return self.module(pictures).last_hidden_state

    def _patches_forward(self, pictures: Tensor) -> Tensor:
        """SigLIP 2's flexible towers take patches, each a row of (row, column, colour) numbers."""
        patches = F.unfold(
            pictures, self.patch, stride=self.patch
        )  # (pictures, colour · row · column, patches)
        patches = patches.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)
        grid = self.side // self.patch
        shapes = torch.full((len(patches), 2), grid, device=patches.device)
        valid = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        return self.module(patches, valid, shapes).last_hidden_state


# Settings that decide numbers beside the parameters.
_DECIDING = ("num_attention_heads", "layer_norm_eps", "hidden_act", "rope_theta", "patch_size", "image_size")


def _resized(maps: Tensor, side: int) -> Tensor:
    """(batch, channels, n, n) → (batch, channels, side, side); the same tensor where n is `side`."""
    if maps.shape[-1] == side:
        return maps
    size = (side, side)
    resized = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(maps.dtype)


def _cut(model: PreTrainedModel, block: int, normed: bool) -> None:
    """Drop the blocks behind `block`, and the final norm unless it is wanted; their names differ by class."""
    for part in model.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(part, name, child[:block])
    for name, child in model.named_children():
        if isinstance(child, nn.LayerNorm) and not normed:
            setattr(model, name, nn.Identity())


def load(path: Path, name: str, request: TeacherRequest) -> ImageTeacher:
    """The tower in a folder with config.json and safetensors, for clips of `request.geometry`.

    An image tower is made for no clip in particular: without a geometry it takes those of `ClipGeometry()`.
    SigLIP's table has one size, so frames are brought to `config.image_size`; the others take frames as they
    are, or at the nearest multiple of their patch (not at DINOv2's `image_size` of 518, which is five times
    the tokens that its own processor gives it). Raises `RunError` for a checkpoint that is not whole or not
    what its config.json says.
    """
    tower, config = read_config(path)
    geometry = request.geometry or ClipGeometry()
    require_geometry(geometry, None, name)
    plain = image_weights.tower_tensors(weights.read_weights(path), path)
    _require_sizes(path, config, plain)
    if tower.model is DINOv3ViTModel:
        channels = config.hidden_size // config.num_attention_heads
        if channels % 4 or not config.rope_theta > 0:
            raise RunError(
                f"{path / weights.CONFIG}: its rotary positions need a multiple of 4 channels a head, and "
                f"rope_theta above 0, not {channels} and {config.rope_theta}"
            )
        image_weights.require_periods(plain, config.rope_theta, channels, path)
    model = weights.build_module(lambda: tower.model(config), path)
    image_weights.load(model, plain, path)
    _restore_buffers(model)
    patch = config.patch_size
    side = config.image_size if tower.fixed_size else patch * max(1, round(geometry.image_size / patch))
    statistics = weights.pixel_statistics(path, (tower.mean, tower.std))
    return ImageTeacher(
        name, model, request, geometry=geometry, tower=tower, side=side, statistics=statistics
    )


def read_config(folder: Path) -> tuple[Tower, PreTrainedConfig]:
    """The tower that config.json names, and its settings; `RunError` for what is none or cannot be built."""
    said = weights.read_config(folder)
    kind = said.get("model_type")
    if kind not in TOWERS:
        raise RunError(
            f"{folder / weights.CONFIG} has model_type={kind!r}; image towers are {', '.join(TOWERS)}"
        )
    tower = TOWERS[kind]
    vision = said.get(tower.part) if tower.part else said
    if not isinstance(vision, dict):
        raise RunError(
            f"{folder / weights.CONFIG} must hold an object {tower.part!r}: the vision tower's settings"
        )
    depth = vision.get("num_hidden_layers")
    if isinstance(depth, int) and depth > MAX_BLOCKS:
        raise RunError(f"{folder / weights.CONFIG} has num_hidden_layers={depth}, more than any network")
    config = weights.build_config(tower.config, vision, folder)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # The pooling head reads the tokens; it does not change them.
    for key in ("patch_size", "image_size"):
        size = getattr(config, key) if hasattr(config, key) else 1
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{folder / weights.CONFIG} has {key}={size}; only square pictures can be used")
    return tower, config


def _require_sizes(folder: Path, config: PreTrainedConfig, plain: Mapping[str, Tensor]) -> None:
    found = {"num_hidden_layers": weights.blocks_in(plain, r"blocks\.(\d+)\.")}
    if "patch.weight" in plain:
        shape = plain["patch.weight"].shape
        found["hidden_size"] = shape[0]
        if len(shape) == 4:
            found["patch_size"] = shape[3]
        elif len(shape) == 2:  # A row of 3 · patch² numbers.
            found["patch_size"] = math.isqrt(shape[1] // 3)
    weights.require_sizes(folder, {key: getattr(config, key) for key in found}, found)


def _angles(model: DINOv3ViTModel) -> Any:
    """Its rotary module as it is built: in float32. In eval mode, for in training it jitters."""
    return type(model.rope_embeddings)(model.config).eval()


def _restore_buffers(model: PreTrainedModel) -> None:
    """Compute again what a class computes when it is built and no file holds: meta tensors have no values."""
    if isinstance(model, DINOv3ViTModel):
        model.rope_embeddings = _angles(model)
    for part in model.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta and name == "position_ids":
                setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise RunError(f"this version of transformers keeps {lost} in {type(model).__name__}, unknown here")
