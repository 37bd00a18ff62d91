"""Settings of what is trained: which tokens are masked, the encoder and the predictor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from salt_vla.config.checks import require, require_at_least, require_choices
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry

Positions = Literal["rope", "sincos"]
Truncate = Literal["end", "random", "pad", "even"]


@dataclass(frozen=True)
class BlockSpec:
    """One mask generator of V-JEPA: how many blocks, how large.

    Scales are shares of the token grid (space: of rows × columns; time: of time steps); `aspect_ratio` is
    the range of height ÷ width.
    """

    num_blocks: int = 8
    spatial_scale: float = 0.15
    temporal_scale: float = 1.0
    aspect_ratio: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        require_at_least(1, self, "masks.blocks.", "num_blocks")
        for name in ("spatial_scale", "temporal_scale"):
            value = getattr(self, name)
            require(0 < value <= 1, f"masks.blocks.{name} must lie in (0, 1], not {value}")
        low, high = self.aspect_ratio
        require(
            0 < low <= high, f"masks.blocks.aspect_ratio must be (low, high) > 0, not {self.aspect_ratio}"
        )


VJEPA_BLOCKS = (BlockSpec(num_blocks=8, spatial_scale=0.15), BlockSpec(num_blocks=2, spatial_scale=0.7))


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the encoder sees. `multiblock` is V-JEPA's; the others mask an exact share `ratio`.

    `truncate`: what becomes of contexts of uneven size. `end` cuts all to the shortest by dropping the last
    tokens, as the reference does; `random` drops random ones; `pad` keeps every token and pads the shorter
    rows; `even` draws more masks than clips, takes those of nearly one size, and cuts at random.
    `max_targets` caps the masked tokens predicted per clip and group (0: all of them); it changes the
    compute of a step, never what the encoder sees.
    """

    strategy: Literal["multiblock", "random", "tube", "topup_block"] = "multiblock"
    blocks: tuple[BlockSpec, ...] = VJEPA_BLOCKS
    ratio: float = 0.75
    truncate: Truncate = "end"
    max_targets: int = 0

    def __post_init__(self) -> None:
        require_choices(self, "masks")
        require(0 < self.ratio < 1, f"masks.ratio must lie in (0, 1), not {self.ratio}")
        require(bool(self.blocks), "masks.blocks is empty; give at least one block specification")
        require(self.max_targets >= 0, f"masks.max_targets must be 0 (all) or more, not {self.max_targets}")

    @property
    def num_groups(self) -> int:
        """Mask groups a clip: V-JEPA's blocks make one each, the other strategies one in all."""
        return len(self.blocks) if self.strategy == "multiblock" else 1


@dataclass(frozen=True)
class EncoderConfig:
    """A ViT on tubelets, under timm's name for its size; `positions` are 3-axis RoPE or sin-cos tables.

    `depth` (0: the name's own) lets a recipe cut or add blocks.
    """

    name: str = "vit_base_patch16_224"
    geometry: ClipGeometry = field(default_factory=ClipGeometry)
    positions: Positions = "rope"
    depth: int = 0
    drop_path: float = 0.0
    tanh_gelu: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        require_choices(self, "encoder")
        require(0 <= self.drop_path < 1, f"encoder.drop_path must lie in [0, 1), not {self.drop_path}")
        require(self.depth >= 0, f"encoder.depth must be 0 (the name's own) or more, not {self.depth}")


@dataclass(frozen=True)
class PredictorConfig:
    """The narrow ViT that fills in latents at masked tokens; one mask token per mask group."""

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    positions: Positions = "rope"
    num_mask_tokens: int = 2
    tanh_gelu: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        require_choices(self, "predictor")
        require_at_least(1, self, "predictor.", "dim", "depth", "num_heads", "num_mask_tokens")
        if self.dim % self.num_heads:
            fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0 and self.dim // h >= 8] or [1]
            raise ConfigError(
                f"predictor.dim={self.dim} is not divisible by predictor.num_heads={self.num_heads}; "
                f"head counts that divide it: {', '.join(map(str, fits))}"
            )
