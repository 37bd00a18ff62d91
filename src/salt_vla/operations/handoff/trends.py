"""Whether a curve still falls or stands: a pure function of its numbers, with an interval. Knows no runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

STANDS_SHARE = 0.01  # of the level: a change over the last half that nobody would call progress
MOST_BINS, LEAST_BINS = 16, 8
LEAST_ROWS_A_BIN = 2
NORMAL = 1.959964
MOST_ALIKE = 0.99
Verdict = Literal["still falls", "stands", "rises", "cannot be told"]


@dataclass(frozen=True)
class Trend:
    """What a curve does over its last half, from step `first` to step `last`: its `level` there (a median),
    and the `change` over it with a 95 % interval, all in the curve's own unit."""

    first: int
    last: int
    level: float
    change: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """`stands` is claimed only where the whole interval is too small to matter: a curve that is too
        noisy to be told has not been shown to stand."""
        band = STANDS_SHARE * abs(self.level)
        if -band <= self.low and self.high <= band:
            return "stands"
        if self.high < 0:
            return "still falls"
        return "rises" if self.low > 0 else "cannot be told"


def trend(steps: Sequence[int], values: Sequence[float]) -> Trend | None:
    """Of the last half of the steps; None where it has too few rows.

    The rows are put into equal bins of which the medians count, so that neither spikes nor the likeness of
    neighbouring rows decide. The slope is Theil's and Sen's, the median of those between all pairs of bins;
    its interval is Sen's (1968), from the variance of Kendall's S for bins that are independent. Where those
    that follow one another lie alike about the line, the variance is enlarged by (1 + r) ÷ (1 − r), r their
    correlation (after Yue and Wang, 2004). Of 16 bins r comes out too low: where noise remembers longer than
    a bin lasts, a flat curve is still said to move more often than one time in twenty.
    """
    step, value = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    good = np.isfinite(value)
    step, value = step[good], value[good]
    if not len(step):
        return None
    late = step > step[0] + (step[-1] - step[0]) / 2
    step, value = step[late], value[late]
    bins = min(MOST_BINS, len(step) // LEAST_ROWS_A_BIN)
    if bins < LEAST_BINS:
        return None
    x = np.array([part.mean() for part in np.array_split(step, bins)])
    y = np.array([np.median(part) for part in np.array_split(value, bins)])
    first, second = np.triu_indices(bins, k=1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    enlarged = _enlargement(y - np.median(slopes) * x)
    half_width = NORMAL * np.sqrt(enlarged * bins * (bins - 1) * (2 * bins + 5) / 18)
    lowest = max(0, round((len(slopes) - half_width) / 2) - 1)
    low, high = slopes[lowest], slopes[-1 - lowest]
    length = step[-1] - step[0]
    return Trend(
        int(step[0]),
        int(step[-1]),
        float(np.median(y)),
        *(float(slope * length) for slope in (np.median(slopes), low, high)),
    )


def _enlargement(left: np.ndarray) -> float:
    """Of the variance, by what neighbours among the bins have in common; 1 where that is nothing."""
    left = left - left.mean()
    total = float(left @ left)
    alike = min(MOST_ALIKE, max(0.0, float(left[1:] @ left[:-1]) / total)) if total else 0.0
    return (1 + alike) / (1 - alike)
