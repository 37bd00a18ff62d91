"""Features of clips: what is kept of a token model's latents, and downsampled pixels beside them.

Knows one batch at a time; neither targets nor probes, nor where features are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salt_vla.config import to_json
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.settings import POOLINGS as POOLINGS
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

PIXELS, CONSTANT = "pixels", "constant"
PIXEL_SIDE = 16
GRID_SIDE = 2
PATCH_SIDE = 4  # of the pixels that stand for a patch where tokens are wanted
TOKENS = "tokens"
SEGMENTS = 4


def _segments(order: Sequence[int], count: int) -> list[int]:
    """Frame numbers of a clip cut into four segments, as equal as can be, which then stand in this order."""
    edges = [count * number // SEGMENTS for number in range(SEGMENTS + 1)]
    return [frame for number in order for frame in range(edges[number], edges[number + 1])]


# The order in which an encoder sees a clip's frames: (frames) → their numbers. In those of `SHUFFLES` and in
# `forward` together every segment stands once in every place: all segments and places count alike.
SHUFFLES = {"2143": (1, 0, 3, 2), "3412": (2, 3, 0, 1), "4321": (3, 2, 1, 0)}
ORDERS: dict[str, Callable[[int], list[int]]] = {
    "forward": lambda count: list(range(count)),
    "reversed": lambda count: list(range(count - 1, -1, -1)),
    **{name: partial(_segments, order) for name, order in SHUFFLES.items()},
}


@dataclass(frozen=True)
class Reading:
    """What is kept of a clip: a pooling of `POOLINGS`, or `tokens` for all of them; `arrangement`: the order
    of `ORDERS` in which the encoder sees the frames."""

    pooling: str = "grid"
    arrangement: str = "forward"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("pooling", self.pooling, (*POOLINGS, TOKENS)),
            ("order of frames", self.arrangement, tuple(ORDERS)),
        ):
            if value not in known:
                raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(known)}")


class TokenModel(Protocol):
    """Anything that turns raw clips into one latent a token; teachers are such, a wrapped student too.

    It moves the frames to its own device; tokens come in the geometry's order (time, row, column).
    """

    @property
    def geometry(self) -> ClipGeometry: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the latents."""
        ...

    def latents(
        self, frames_uint8: UInt8[Tensor, "batch frames height width 3"], /
    ) -> Float[Tensor, "batch tokens dim"]: ...


class Pixels:
    """No network: a token is its tubelet's patch, each frame of it averaged to 4 × 4, colours in [0, 1]."""

    def __init__(self, geometry: ClipGeometry) -> None:
        self.geometry = geometry
        self.side = min(PATCH_SIDE, geometry.patch_size)
        self.dim = geometry.tubelet_size * self.side**2 * 3
        self.fingerprint = f"pixels-2 {to_json(geometry)}"

    def latents(
        self, frames_uint8: UInt8[Tensor, "batch frames height width 3"], /
    ) -> Float[Tensor, "batch tokens dim"]:
        steps, rows, columns = self.geometry.token_grid
        batch, count = frames_uint8.shape[:2]
        images = frames_uint8.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        small = F.adaptive_avg_pool2d(images, (rows * self.side, columns * self.side))
        cut = small.reshape(batch, steps, count // steps, 3, rows, self.side, columns, self.side)
        return cut.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(batch, steps * rows * columns, self.dim)

    def with_places(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim_and_place"]:
        """Each token's time, row and column (0 … 1) beside it: attention has no order, and an encoder's
        tokens know their places."""
        axes = [
            (torch.arange(count, device=tokens.device) + 0.5) / count for count in self.geometry.token_grid
        ]
        places = torch.cartesian_prod(*axes).expand(len(tokens), -1, -1)
        return torch.cat([tokens, places.to(tokens.dtype)], dim=2)


def pool_tokens(
    tokens: Float[Tensor, "batch tokens dim"], geometry: ClipGeometry, pooling: str
) -> Float[Tensor, " batch *features"]:
    """All tokens (`tokens`), or their averages over the clip (`mean`), within each time step (`step`), or
    within the quarters of each time step (`grid`); what is not averaged is concatenated, time first.

    Quarters of an odd number of rows share the middle row; a side of one token is not split.
    """
    if pooling == TOKENS:
        return tokens
    if pooling == "mean":
        return tokens.mean(1)
    steps, rows, columns = geometry.token_grid
    batch, _, dim = tokens.shape
    by_step = tokens.reshape(batch, steps, rows, columns, dim)
    if pooling == "step":
        return by_step.mean((2, 3)).flatten(1)
    if pooling != "grid":
        raise ConfigError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
    images = by_step.permute(0, 1, 4, 2, 3).reshape(batch * steps, dim, rows, columns)
    quarters = F.adaptive_avg_pool2d(images, (min(GRID_SIDE, rows), min(GRID_SIDE, columns)))
    return quarters.reshape(batch, steps, dim, -1).transpose(2, 3).flatten(1)


def pixel_features(
    frames_uint8: UInt8[Tensor, "batch frames height width 3"],
) -> Float[Tensor, "batch features"]:
    """Every frame area-averaged to 16 × 16, colours in [0, 1]: no frame and no place is pooled away."""
    batch, count, height, width, _ = frames_uint8.shape
    images = frames_uint8.reshape(batch * count, height, width, 3).permute(0, 3, 1, 2).float() / 255
    small = F.adaptive_avg_pool2d(images, (min(PIXEL_SIDE, height), min(PIXEL_SIDE, width)))
    return small.permute(0, 2, 3, 1).reshape(batch, -1)


def features_of(
    name: str,
    model: TokenModel,
    frames: UInt8[Tensor, "batch frames height width 3"],
    readings: Iterable[Reading],
) -> dict[Reading, Float[np.ndarray, " batch *dims"]]:
    """A batch under each reading, the network run once an order of frames. `Pixels` gives its strongest form
    under every pooling, and patches where tokens are wanted."""
    found: dict[Reading, np.ndarray] = {}
    wanted = list(readings)
    with torch.inference_mode():
        for arrangement in dict.fromkeys(reading.arrangement for reading in wanted):
            arranged = frames[:, ORDERS[arrangement](frames.shape[1])]
            mine = [reading for reading in wanted if reading.arrangement == arrangement]
            if isinstance(model, Pixels) and any(reading.pooling != TOKENS for reading in mine):
                strongest = pixel_features(arranged)  # the same under every pooling
            if not isinstance(model, Pixels) or any(reading.pooling == TOKENS for reading in mine):
                tokens = _latents(name, model, arranged)
            for reading in mine:
                if isinstance(model, Pixels) and reading.pooling != TOKENS:
                    kept = strongest
                elif isinstance(model, Pixels):
                    kept = model.with_places(tokens)
                else:
                    kept = pool_tokens(tokens, model.geometry, reading.pooling)
                found[reading] = kept.to("cpu", torch.float32).numpy()
    return found


def _latents(name: str, model: TokenModel, clips: Tensor) -> Float[Tensor, "batch tokens dim"]:
    """The model's tokens as float32, where they were made, checked against what the model says of itself."""
    geometry = model.geometry
    wanted = (geometry.num_frames, geometry.image_size, geometry.image_size)
    if tuple(clips.shape[1:4]) != wanted:
        raise DataError(
            f"encoder {name!r} reads clips of {wanted[0]} frames of {wanted[1]}×{wanted[2]}, "
            f"but was given {clips.shape[1]} frames of {clips.shape[2]}×{clips.shape[3]}"
        )
    tokens = model.latents(clips).float()
    if tuple(tokens.shape) != (len(clips), geometry.num_tokens, model.dim):
        raise DataError(
            f"encoder {name!r} gave latents of shape {tuple(tokens.shape)} "
            f"where its geometry promises {(len(clips), geometry.num_tokens, model.dim)}"
        )
    return tokens
