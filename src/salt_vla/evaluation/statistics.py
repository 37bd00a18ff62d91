"""R² and accuracy with bootstrap intervals over episodes, and paired differences between two predictors.

Clips of one episode resemble one another, so the episode is what gets resampled. Knows predictions and
episode numbers; neither encoders nor probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import rankdata

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Shaped

# Higher is better in all of them; all but `OF_SPREAD` are means over clips of 1 − what a clip has `wrong`.
Metric = Literal[
    "r2",
    "r2_over_copy",
    "accuracy",
    "accuracy_at_5",
    "auroc",
    "recall_at_1",
    "recall_at_5",
    "mean_average_precision",
    "relative_accuracy",
]
# Of these `second` (less the mean's part, which `first` gives) is what errors are measured against.
OF_SPREAD = ("r2", "r2_over_copy")
CONFIDENCE = 0.95
# A dimension whose standard deviation is below this share of the target's root mean square "does not vary".
STILL = 1e-5
# Resampled sums of squares are kept above this share of the sample's, so that none divides by zero.
SMALLEST_SHARE = 1e-9
WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A figure with its percentile interval; `apart` says that the interval does not hold zero."""

    value: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class EpisodeSums:
    """One predictor's errors, summed within each episode: all that any resample of episodes needs.

    `wrong` holds squared errors (r2) or wrong answers (all other metrics); `first` and `second` are the sums
    of the truth and of its square, about the sample's mean (zeros unless r2; for r2_over_copy zeros and the
    squared errors of copying). Rows follow `episodes`, sorted.
    """

    metric: Metric
    episodes: Int64[np.ndarray, " episodes"]
    clips: Float[np.ndarray, " episodes"]
    wrong: Float[np.ndarray, "episodes dims"]
    first: Float[np.ndarray, "episodes dims"]
    second: Float[np.ndarray, "episodes dims"]
    varying: Bool[np.ndarray, " dims"]

    @property
    def left_out(self) -> tuple[int, ...]:
        """Output dimensions that do not vary in the sample and so do not count."""
        return tuple(int(d) for d in np.flatnonzero(~self.varying))

    def score(self, weights: Shaped[np.ndarray, "resamples episodes"]) -> Float[np.ndarray, " resamples"]:
        """The metric with episode e counted `weights[:, e]` times."""
        weights = weights.astype(np.float64)
        clips = weights @ self.clips
        wrong = weights @ self.wrong[:, self.varying]
        if self.metric not in OF_SPREAD:
            return 1 - wrong[:, 0] / clips
        first, second = weights @ self.first[:, self.varying], weights @ self.second[:, self.varying]
        spread = second - first**2 / clips[:, None]
        total = self.second.sum(0) - self.first.sum(0) ** 2 / self.clips.sum()
        spread = np.maximum(spread, SMALLEST_SHARE * total[self.varying])
        return (1 - wrong / spread).mean(1)

    @property
    def value(self) -> float:
        """The metric on the sample itself."""
        return float(self.score(np.ones((1, len(self.episodes))))[0])

    def same_clips(self, other: EpisodeSums) -> bool:
        """Whether both were computed on the same held-out clips with the same truth."""
        mine = (self.episodes, self.clips, self.first, self.second)
        theirs = (other.episodes, other.clips, other.first, other.second)
        return self.metric == other.metric and all(map(np.array_equal, mine, theirs))


def varying_dims(target: Float[np.ndarray, "clips dims"]) -> Bool[np.ndarray, " dims"]:
    """Output dimensions whose variance is more than rounding, measured against the target's own size."""
    size = float(np.sqrt((target.astype(np.float64) ** 2).mean()))
    return target.std(0, dtype=np.float64) > STILL * size


def r2_sums(
    truth: Float[np.ndarray, "clips dims"],
    predicted: Float[np.ndarray, "clips dims"],
    episodes: Int64[np.ndarray, " clips"],
) -> EpisodeSums:
    """Sums for R²: the mean over output dimensions of 1 − SSE/SST, SST about the mean of the (re)sample.

    Dimensions of almost no variance are left out (`left_out`); if none varies, that is a `DataError`.
    """
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    if truth.shape != predicted.shape:
        raise DataError(f"predictions of shape {predicted.shape} do not fit a truth of shape {truth.shape}")
    varying = varying_dims(truth)
    if not varying.any():
        raise DataError("R² needs a target that varies over the held-out clips; leave this one out")
    centred = truth - truth.mean(0)
    keys, clips, (wrong, first, second) = _by_episode(episodes, (truth - predicted) ** 2, centred, centred**2)
    return EpisodeSums("r2", keys, clips, wrong, first, second, varying)


def accuracy_sums(
    truth: Shaped[np.ndarray, " clips"],
    predicted: Shaped[np.ndarray, " clips"],
    episodes: Int64[np.ndarray, " clips"],
) -> EpisodeSums:
    """Sums for accuracy: the share of clips whose class was named."""
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise DataError(f"predictions of shape {predicted.shape} do not fit labels of shape {truth.shape}")
    return share_sums("accuracy", truth == predicted, episodes)


def share_sums(
    metric: Metric, right: Shaped[np.ndarray, " clips"], episodes: Int64[np.ndarray, " clips"]
) -> EpisodeSums:
    """Sums for a metric that is a mean over clips (or pairs, or queries) of a number in 0 … 1, such as
    whether the answer was right."""
    right = np.asarray(right, np.float64)
    if right.ndim != 1 or not ((right >= 0) & (right <= 1)).all():
        raise DataError(f"{metric} is a mean of numbers from 0 to 1, one a clip, not {right.shape} others")
    keys, clips, (wrong,) = _by_episode(episodes, 1 - right[:, None])
    nothing = np.zeros_like(wrong)
    return EpisodeSums(metric, keys, clips, wrong, nothing, nothing, np.ones(1, bool))


def copy_sums(
    truth: Float[np.ndarray, "clips dims"],
    predicted: Float[np.ndarray, "clips dims"],
    copied: Float[np.ndarray, "clips dims"],
    episodes: Int64[np.ndarray, " clips"],
) -> EpisodeSums:
    """Sums for 1 − SSE(predicted)/SSE(copied) over all dimensions together: 0 is as good as copying."""
    wrong, copying = (((truth - other) ** 2).sum(1, keepdims=True) for other in (predicted, copied))
    if not copying.any():
        raise DataError("nothing changes from a clip to its future: copying is exact, and cannot be bettered")
    keys, clips, (errors, spread) = _by_episode(episodes, wrong, copying)
    return EpisodeSums("r2_over_copy", keys, clips, errors, np.zeros_like(spread), spread, np.ones(1, bool))


def auroc_sums(
    truth: Float[np.ndarray, "clips 1"],
    predicted: Float[np.ndarray, "clips 1"],
    episodes: Int64[np.ndarray, " clips"],
) -> EpisodeSums:
    """Sums for the area under the ROC curve: how often a clip where it happens (truth 1) is ranked above one
    where it does not (0); ties are halves.

    The area is a mean over pairs, not clips. Each clip stands for its influence on it: its placement among
    the clips of the other class (DeLong et al. 1988), summed within episodes (Obuchowski 1997). Exact for the
    sample; of a resample the first order.
    """
    happens, score = truth[:, 0] > 0.5, np.asarray(predicted[:, 0], np.float64)
    counts = int(happens.sum()), int((~happens).sum())
    if not all(counts):
        raise DataError("an area under the ROC curve needs held-out clips of both kinds; leave this one out")
    overall = rankdata(score)
    below = np.empty(len(score))  # The share of the other class that is ranked on the right side of a clip.
    below[happens] = (overall[happens] - rankdata(score[happens])) / counts[1]
    below[~happens] = 1 - (overall[~happens] - rankdata(score[~happens])) / counts[0]
    area = below[happens].mean()
    size = np.where(happens, *counts)
    wrong = (1 - area) - len(score) / size * (below - area)
    keys, clips, (summed,) = _by_episode(episodes, wrong[:, None])
    nothing = np.zeros_like(summed)
    return EpisodeSums("auroc", keys, clips, summed, nothing, nothing, np.ones(1, bool))


def _by_episode(
    episodes: Int64[np.ndarray, " clips"], *values: Float[np.ndarray, "clips dims"]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Sorted episode numbers, clips in each, and each array summed within its episodes."""
    keys, which = np.unique(episodes, return_inverse=True)
    if any(len(v) != len(which) for v in values):
        raise DataError(f"{len(values[0])} predictions do not fit {len(which)} episode numbers")
    sums = []
    for array in values:
        total = np.zeros((len(keys), array.shape[1]))
        np.add.at(total, which, array)
        sums.append(total)
    return keys.astype(np.int64), np.bincount(which).astype(np.float64), sums


def bootstrap_scores(
    sums: Sequence[EpisodeSums], resamples: int, seed: int
) -> Float[np.ndarray, "predictors resamples"]:
    """Scores of several predictors on the same resamples of their episodes (drawn with replacement).

    A pure function of its arguments; the draws depend on the number of episodes and the seed alone, so two
    calls over equally many episodes see the same draws.
    """
    count = len(sums[0].episodes)
    if count < 2:
        raise DataError("an interval needs at least 2 held-out episodes; hold out more of them")
    if any(len(s.episodes) != count for s in sums):
        raise DataError("predictors compared on the same resamples must share their held-out episodes")
    random = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // count)
    blocks = []
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        weights = random.multinomial(count, np.full(count, 1 / count), size=size)
        blocks.append(np.stack([s.score(weights) for s in sums]))
    return np.concatenate(blocks, axis=1)


def percentile_interval(values: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The middle 95 % of resampled figures."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval(sums: EpisodeSums, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The score with its percentile interval over episodes."""
    return Estimate(sums.value, *percentile_interval(bootstrap_scores([sums], resamples, seed)[0]))


def paired_difference(
    first: EpisodeSums, second: EpisodeSums, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """first − second, both scored on the same resamples: what the clips have in common cancels.

    Raises `DataError` when the two were not computed on the same clips.
    """
    if not first.same_clips(second):
        raise DataError("a paired difference needs two predictors of the same target on the same clips")
    scores = bootstrap_scores([first, second], resamples, seed)
    return Estimate(first.value - second.value, *percentile_interval(scores[0] - scores[1]))
