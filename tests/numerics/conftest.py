"""What the tests of teachers share: films, the pixels an independent hand makes of them, weights far from
their start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from salt_vla.geometry import ClipGeometry

Films = Callable[..., Tensor]


@pytest.fixture(scope="module", autouse=True)
def seeded_networks() -> None:
    """Weights drawn for a file's shared networks are the same in every run: so are rounding errors."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded_network(seeded_networks: None) -> None:
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def films() -> Films:
    """(geometry, count=2) → uint8 (count, T, H, W, 3)."""

    def make(geometry: ClipGeometry, count: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(geometry.num_tokens)
        shape = (count, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return make


@pytest.fixture(scope="session")
def pixel_values() -> Callable[[Tensor], Tensor]:
    """uint8 (B, T, H, W, 3) → what transformers' processors give: (B, T, 3, H, W), ImageNet's statistics."""

    def make(frames: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
        return ((frames.double() / 255 - mean) / std).permute(0, 1, 4, 2, 3).float().contiguous()

    return make


@pytest.fixture(scope="session")
def shaken() -> Callable[[nn.Module], nn.Module]:
    """Every parameter moved, biases and norms too, so that nothing is zero or one by chance; eval mode."""

    def shake(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return module.eval()

    return shake
