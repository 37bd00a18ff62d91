"""Features of clips: latents of any token model pooled three ways, and downsampled pixels beside them.

Streams over batches of frames, so memory is bounded by one batch and the features themselves. Knows neither
targets nor probes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salt_vla.errors import ConfigError, DataError
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

    Frames = UInt8[Tensor, "batch frames height width 3"] | UInt8[np.ndarray, "batch frames height width 3"]
    Batches = Iterable[tuple[Sequence[int] | Int64[np.ndarray, " batch"], Frames]]
    # pooling → encoder → (clips, dims) float32
    FeatureTable = dict[str, dict[str, Float[np.ndarray, "clips dims"]]]

POOLINGS = ("mean", "step", "grid")
PIXELS, CONSTANT = "pixels", "constant"
PIXEL_SIDE = 16
GRID_SIDE = 2


class TokenModel(Protocol):
    """Anything that turns raw clips into one latent a token; teachers are such, a wrapped student too.

    It moves the frames to its own device; tokens come in the geometry's order (time, row, column).
    """

    @property
    def geometry(self) -> ClipGeometry: ...

    @property
    def dim(self) -> int: ...

    def latents(
        self, frames_uint8: UInt8[Tensor, "batch frames height width 3"], /
    ) -> Float[Tensor, "batch tokens dim"]: ...


def pool_tokens(
    tokens: Float[Tensor, "batch tokens dim"], geometry: ClipGeometry, pooling: str
) -> Float[Tensor, "batch features"]:
    """Average tokens over the clip (`mean`), within each time step (`step`), or within the quarters of each
    time step (`grid`); what is not averaged is concatenated, time first.

    Quarters of an odd number of rows share the middle row; a side of one token is not split.
    """
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


def extract_features(
    models: Mapping[str, TokenModel],
    batches: Batches,
    num_clips: int,
    poolings: Sequence[str] = POOLINGS,
) -> FeatureTable:
    """One pass over (clip indices, frames): every model's features under every pooling, `pixels` (the same
    strongest form under each pooling's name) and `constant` (no features at all).

    Row i belongs to clip index i; each of the `num_clips` indices must come exactly once, else `DataError`.
    """
    for name in (PIXELS, CONSTANT):
        if name in models:
            raise ConfigError(f"{name!r} is the name of a baseline; give the encoder another name")
    table: FeatureTable = {pooling: {} for pooling in poolings}
    pixels: dict[str, np.ndarray] = {}
    seen = np.zeros(num_clips, dtype=np.int64)
    with torch.inference_mode():
        for indices, frames in batches:
            rows = np.asarray(indices, dtype=np.int64)
            clips = torch.as_tensor(frames)
            _count(seen, rows, clips)
            for name, model in models.items():
                tokens = _latents(name, model, clips)
                for pooling in poolings:
                    pooled = pool_tokens(tokens, model.geometry, pooling)
                    _store(table[pooling], name, num_clips, rows, pooled)
            _store(pixels, PIXELS, num_clips, rows, pixel_features(clips))
    if (seen != 1).any():
        clip = int(np.flatnonzero(seen != 1)[0])
        raise DataError(f"clip {clip} of {num_clips} came {int(seen[clip])} times; every clip is needed once")
    for by_encoder in table.values():
        by_encoder.update(pixels)
        by_encoder[CONSTANT] = np.zeros((num_clips, 0), np.float32)
    return table


def _count(seen: np.ndarray, rows: np.ndarray, clips: Tensor) -> None:
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise DataError(
            f"frames must be uint8 (batch, time, height, width, 3), not {clips.dtype} {tuple(clips.shape)}"
        )
    if len(rows) != len(clips):
        raise DataError(f"{len(rows)} clip indices came with {len(clips)} clips")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(seen):
        raise DataError(f"clip indices {rows.min()} … {rows.max()} do not lie within 0 … {len(seen) - 1}")
    np.add.at(seen, rows, 1)


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


def _store(table: dict[str, np.ndarray], name: str, num_clips: int, rows: np.ndarray, values: Tensor) -> None:
    if name not in table:
        table[name] = np.zeros((num_clips, values.shape[1]), np.float32)
    table[name][rows] = values.cpu().numpy()
