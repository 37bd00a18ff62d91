"""Whether one figure of runs foretells another, such as a held-out loss the accuracy of a probe.

Knows pairs of numbers, one a run; neither runs nor what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.statistics import CONFIDENCE

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST_RUNS = 4
RESAMPLES = 4000


@dataclass(frozen=True)
class Regression:
    """y ≈ intercept + slope · x over runs. `r2` is the square of Pearson's r; `low` and `high` the middle
    95 % of it over resamples of whole runs. `r2_left_out`: 1 − Σ(y − ŷ)² ÷ Σ(y − ȳ)², each run foretold by
    the others (ȳ theirs, too): below zero the line tells less of a new run than their mean does."""

    runs: int
    slope: float
    intercept: float
    pearson: float
    r2: float
    low: float
    high: float
    r2_left_out: float


def regress(x: Float[np.ndarray, " runs"], y: Float[np.ndarray, " runs"], seed: int = 0) -> Regression:
    """The least-squares line through runs. Few runs make a wide interval, and percentiles still err to the
    narrow side there. Raises `DataError` below four runs, and where either figure does not vary."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    count = len(x)
    if count < FEWEST_RUNS or len(y) != count:
        raise DataError(
            f"a regression over runs needs {FEWEST_RUNS} runs or more with both figures, not {count}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("a regression over runs needs figures that are numbers; leave the others out")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DataError("one of the figures is the same in every run: there is nothing to foretell")
    slope, intercept = _line(x, y)
    pearson = float(np.corrcoef(x, y)[0, 1])
    chosen = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    resampled = [_r2(x[each], y[each]) for each in chosen if np.ptp(x[each]) > 0 and np.ptp(y[each]) > 0]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wrong = baseline = 0.0
    for run in range(count):
        others = np.arange(count) != run
        wrong += (y[run] - _foretold(x[others], y[others], x[run])) ** 2
        baseline += (y[run] - y[others].mean()) ** 2
    return Regression(
        count, slope, intercept, pearson, pearson**2, float(low), float(high), float(1 - wrong / baseline)
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean() - slope * x.mean())


def _foretold(x: np.ndarray, y: np.ndarray, at: float) -> float:
    if np.ptp(x) == 0:
        return float(y.mean())
    slope, intercept = _line(x, y)
    return slope * at + intercept


def _r2(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)
