"""Changes of colour and light of the student's pixels, on the device that holds them.

Knows numbers drawn elsewhere and their strengths; not which networks look at the pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salt_vla.config import PhotometricConfig

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision takes it


def jittered(
    frames: UInt8[Tensor, "batch frames height width 3"],
    drawn: Float[Tensor, "batch changes"] | None,
    strengths: PhotometricConfig,
) -> UInt8[Tensor, "batch frames height width 3"] | Float[Tensor, "batch frames height width 3"]:
    """Frames with one change of brightness, contrast and saturation for each clip, as float32 within 0 … 255;
    as they are where nothing was drawn.

    Each factor is 1 + strength · drawn, with `drawn` in −1 … 1 (columns: brightness, contrast, saturation).
    In torchvision's terms and in this order: brightness f·x; contrast f·x + (1 − f)·(mean grey of the clip);
    saturation f·x + (1 − f)·(grey of the pixel); each cut to 0 … 255.
    """
    if drawn is None:
        return frames
    x = frames.float()
    weights = torch.tensor(GREY, device=frames.device)
    factors = 1 + drawn * drawn.new_tensor((strengths.brightness, strengths.contrast, strengths.saturation))
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1, 1) for factor in factors.unbind(1))
    if strengths.brightness:
        x = (x * brightness).clamp_(0, 255)
    if strengths.contrast:
        grey = (x.mean(dim=(1, 2, 3)) @ weights).view(-1, 1, 1, 1, 1)
        x = (x * contrast + (1 - contrast) * grey).clamp_(0, 255)
    if strengths.saturation:
        grey = (x @ weights).unsqueeze(-1)
        x = (x * saturation + (1 - saturation) * grey).clamp_(0, 255)
    return x
