"""Whether one figure of runs foretells another, such as a held-out loss the accuracy of a probe.

Knows pairs of numbers, one a run; neither runs nor what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student_t

from salt_vla.errors import DataError
from salt_vla.evaluation.statistics import CONFIDENCE

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST_RUNS = 4
ONE = 1 - 1e-12  # of a correlation, whose scale has no end at 1


@dataclass(frozen=True)
class Regression:
    """y ≈ intercept + slope · x over runs. `r2` is the square of Pearson's r; `low` and `high` its 95 %
    interval for new runs. `r2_left_out`: 1 − Σ(y − ŷ)² ÷ Σ(y − ȳ)², each run foretold by
    the others (ȳ theirs, too): below zero the line tells less of a new run than their mean does."""

    runs: int
    slope: float
    intercept: float
    pearson: float
    r2: float
    low: float
    high: float
    r2_left_out: float


def regress(x: Float[np.ndarray, " runs"], y: Float[np.ndarray, " runs"]) -> Regression:
    """The least-squares line through runs. Raises `DataError` below four runs, and where either figure does
    not vary."""
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
    low, high = _interval(x, y)
    wrong = baseline = 0.0
    for run in range(count):
        others = np.arange(count) != run
        wrong += (y[run] - _foretold(x[others], y[others], x[run])) ** 2
        baseline += (y[run] - y[others].mean()) ** 2
    return Regression(count, slope, intercept, pearson, pearson**2, low, high, float(1 - wrong / baseline))


def _interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of r²: every run is left out in turn (jackknife) on Fisher's scale, artanh r, with Student's t of
    runs − 2 degrees of freedom; where r may be of either sign the interval begins at 0.

    Resampled percentiles, corrected or not, never reach 0 and miss nearly always where nothing is foretold.
    """
    count = len(x)
    middle = _fisher(x, y)
    left_out = np.array([_fisher(np.delete(x, run), np.delete(y, run)) for run in range(count)])
    error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    reach = student_t.ppf((1 + CONFIDENCE) / 2, count - 2) * error
    ends = np.tanh([middle - reach, middle + reach])
    low, high = sorted(ends**2)
    return (0.0 if ends[0] < 0 < ends[1] else float(low)), float(high)


def _fisher(x: np.ndarray, y: np.ndarray) -> float:
    """Nothing is foretold where one figure does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.arctanh(np.clip(np.corrcoef(x, y)[0, 1], -ONE, ONE)))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean() - slope * x.mean())


def _foretold(x: np.ndarray, y: np.ndarray, at: float) -> float:
    if np.ptp(x) == 0:
        return float(y.mean())
    slope, intercept = _line(x, y)
    return slope * at + intercept
