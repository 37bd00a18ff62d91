"""Teachers trained by this package: the encoder of a stage-1 (or any other) run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from salt_vla.config import to_json
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.encoder import VideoEncoder
from salt_vla.models.loading import fingerprint, load_encoder
from salt_vla.models.pixels import normalise_pixels

DTYPES = ("float32", "bfloat16", "float16")


class EncoderTeacher:
    """A `VideoEncoder` behind the teacher interface; also how any encoder is evaluated."""

    def __init__(
        self, encoder: VideoEncoder, name: str, device: str = "cpu", layer: int | None = None
    ) -> None:
        depth = len(encoder.blocks)
        if layer is not None and not 1 <= layer <= depth:
            raise ConfigError(f"teacher {name}: layer {layer} does not exist; it has layers 1 … {depth}")
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.name = name
        self.dim = encoder.dim
        self.num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        self.geometry = encoder.geometry
        self.layer = layer
        self.device = device
        self.fingerprint = fingerprint(encoder, to_json(encoder.config) + f"layer={layer}")

    @torch.inference_mode()
    def latents(self, frames: Tensor) -> Tensor:
        dtype = self.encoder.patch_embed.weight.dtype
        pixels = normalise_pixels(frames.to(self.device)).to(dtype)
        return self.encoder(pixels, layer=self.layer).float()


def load(
    path: Path, geometry: ClipGeometry | None, device: str, dtype: str, layer: int | None = None
) -> EncoderTeacher:
    if dtype not in DTYPES:
        raise ConfigError(f"a teacher's dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    encoder = load_encoder(path)
    if geometry is not None and geometry != encoder.geometry:
        raise ConfigError(f"teacher {path} takes clips of {encoder.geometry}, not {geometry}")
    return EncoderTeacher(encoder.to(getattr(torch, dtype)), path.name, device, layer)
