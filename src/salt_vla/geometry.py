"""The arithmetic of cutting a clip into tubelet tokens. Knows nothing of pixels, models or masks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from salt_vla.errors import ConfigError


@dataclass(frozen=True)
class ClipGeometry:
    """How a clip of square frames becomes a grid of tubelet tokens.

    A token covers `tubelet_size` frames × `patch_size`² pixels. Tokens are numbered time first, then row,
    then column: `id = (t · rows + r) · columns + c`.

    Raises `ConfigError` when a size is not a positive integer or does not divide.
    """

    num_frames: int = 16
    image_size: int = 224
    tubelet_size: int = 2
    patch_size: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"geometry.{field.name} must be a positive integer, not {value!r}")
        for whole, part in (("num_frames", "tubelet_size"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"geometry.{whole}={getattr(self, whole)} is not a multiple of "
                    f"geometry.{part}={getattr(self, part)}; change one of them"
                )

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(time steps, rows, columns) of tokens."""
        side = self.image_size // self.patch_size
        return (self.num_frames // self.tubelet_size, side, side)

    @property
    def tokens_per_step(self) -> int:
        """Tokens at one time step."""
        return self.token_grid[1] * self.token_grid[2]

    @property
    def num_tokens(self) -> int:
        return self.token_grid[0] * self.tokens_per_step

    @property
    def patch_dim(self) -> int:
        """Numbers in one tubelet: 3 colours × tubelet_size × patch_size²."""
        return 3 * self.tubelet_size * self.patch_size**2

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip as uint8 (T, H, W, 3)."""
        return self.num_frames * self.image_size**2 * 3
