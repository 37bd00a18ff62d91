"""Tubelet vectors and frames, into each other, in NumPy.

A tubelet vector is ordered (colour, time, row, column), as the weights of a 3-D convolution are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry

FloatArray = NDArray[np.float32]
FramesArray = NDArray[np.uint8]
_Pixel = TypeVar("_Pixel", bound=np.generic)
# What layer normalisation adds to the variance, so that a tubelet of one flat colour can be divided by it.
EPSILON = 1e-5


def check_frames(frames: FramesArray, geometry: ClipGeometry) -> None:
    """Raises `DataError` unless `frames` are uint8 (T, H, W, 3) of the geometry's size."""
    wanted = (geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    if frames.shape != wanted or frames.dtype != np.uint8:
        raise DataError(f"expected uint8 frames of shape {wanted}, not {frames.dtype} {frames.shape}")


def patchify(frames: FloatArray, geometry: ClipGeometry) -> FloatArray:
    """(T, H, W, 3) → (tokens, patch_dim)."""
    steps, rows, columns = geometry.token_grid
    tubelet, patch = geometry.tubelet_size, geometry.patch_size
    blocks = frames.reshape(steps, tubelet, rows, patch, columns, patch, 3)
    return blocks.transpose(0, 2, 4, 6, 1, 3, 5).reshape(geometry.num_tokens, geometry.patch_dim)


def unpatchify(patches: FloatArray, geometry: ClipGeometry) -> FloatArray:
    """(tokens, patch_dim) → (T, H, W, 3): the inverse of `patchify`."""
    steps, rows, columns = geometry.token_grid
    tubelet, patch = geometry.tubelet_size, geometry.patch_size
    blocks = patches.reshape(steps, rows, columns, 3, tubelet, patch, patch)
    size = geometry.image_size
    return blocks.transpose(0, 4, 1, 5, 2, 6, 3).reshape(geometry.num_frames, size, size, 3)


def paste_predictions(
    frames: FramesArray,
    predicted: FloatArray,
    target_ids: NDArray[np.int64],
    geometry: ClipGeometry,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> FramesArray:
    """The clip with the predictions at `target_ids` in place of the film.

    `predicted` (targets, patch_dim) is in normalised patch space: each true tubelet, in the network's pixels
    (value/255 − `pixel_mean`)/`pixel_std` a colour, shifted and scaled to mean 0 and variance 1. The true
    tubelet's own mean and deviation bring the prediction back: its brightness and contrast are given.
    """
    check_frames(frames, geometry)
    if predicted.shape != (len(target_ids), geometry.patch_dim):
        raise DataError(
            f"expected predictions of shape {(len(target_ids), geometry.patch_dim)}, not {predicted.shape}"
        )
    mean, std = np.asarray(pixel_mean, np.float32), np.asarray(pixel_std, np.float32)
    patches = patchify(((frames.astype(np.float32) / 255 - mean) / std).astype(np.float32), geometry)
    true = patches[target_ids]
    scale = np.sqrt(true.var(axis=1, keepdims=True) + EPSILON)
    patches[target_ids] = predicted * scale + true.mean(axis=1, keepdims=True)
    pixels = (unpatchify(patches, geometry) * std + mean) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def token_map(ids: NDArray[np.int64], geometry: ClipGeometry) -> NDArray[np.bool_]:
    """(time steps, H, W): true at the pixels of the tokens `ids`."""
    flat = np.zeros(geometry.num_tokens, dtype=bool)
    flat[ids] = True
    return enlarge(flat.reshape(geometry.token_grid), geometry.patch_size)


def enlarge(images: NDArray[_Pixel], factor: int) -> NDArray[_Pixel]:
    """Repeat every pixel of (count, H, W, …) `factor` times along rows and columns."""
    return images.repeat(factor, axis=1).repeat(factor, axis=2)
