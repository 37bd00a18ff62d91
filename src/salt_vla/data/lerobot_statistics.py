"""Statistics of one feature over frames, an episode at a time, merged into those of a data set.

Must not know files; figures follow LeRobot: per vector entry, and per channel in 0..1 for images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FeatureStatistics:
    """Of `count` frames, each figure in the feature's own shape."""

    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    count: int

    def to_json(self) -> dict[str, Any]:
        return {
            "min": self.minimum.tolist(),
            "max": self.maximum.tolist(),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "count": [self.count],
        }


def summarise(values: np.ndarray) -> FeatureStatistics:
    """Statistics over the first axis; of uint8 (frames, height, width, 3) per channel, shape (3, 1, 1)."""
    count = len(values)
    if values.dtype == np.uint8 and values.ndim == 4:
        return _summarise_images(values, count)
    rows = values.reshape(count, -1).astype(np.float64)
    return FeatureStatistics(rows.min(0), rows.max(0), rows.mean(0), rows.std(0), count)


def _summarise_images(film: np.ndarray, count: int) -> FeatureStatistics:
    # A histogram a channel holds all the four figures need, at a tenth of the cost of float copies.
    counts = np.stack([np.bincount(film[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    variance = np.maximum(share @ levels**2 - mean**2, 0)
    minimum = levels[(counts > 0).argmax(axis=1)]
    maximum = levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)]
    figures = np.stack([minimum, maximum, mean, np.sqrt(variance)]).reshape(4, 3, 1, 1)
    return FeatureStatistics(figures[0], figures[1], figures[2], figures[3], count)


def merge_statistics(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all frames, from those of disjoint groups of frames."""
    weights = np.array([part.count for part in parts], dtype=np.float64)
    weights /= weights.sum()
    means = np.stack([part.mean for part in parts])
    mean = np.tensordot(weights, means, 1)
    variances = np.stack([part.std**2 for part in parts]) + (means - mean) ** 2
    return FeatureStatistics(
        minimum=np.min([part.minimum for part in parts], axis=0),
        maximum=np.max([part.maximum for part in parts], axis=0),
        mean=mean,
        std=np.sqrt(np.tensordot(weights, variances, 1)),
        count=sum(part.count for part in parts),
    )
