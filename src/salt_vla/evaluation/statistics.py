"""R², accuracy and their like with intervals over episodes and seeds, and paired differences of predictors.

Clips of one episode resemble one another, so whole episodes are left out in turn. Knows predictions and
episode numbers; neither encoders nor probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import beta, rankdata
from scipy.stats import t as student_t

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
# Below this many held-out episodes nothing is called apart, whatever an interval says.
MIN_EPISODES_FOR_CLAIMS = 10
# Tables show three decimals; what they show as 0.000 is claimed by nobody, however sure its sign.
SMALLEST_CLAIM = 0.0005
# A dimension whose standard deviation is below this share of the target's root mean square "does not vary".
STILL = 1e-5
# Sums of squares of some episodes are kept above this share of the sample's, so that none divides by zero.
SMALLEST_SHARE = 1e-9
ROUNDING = 1e-12  # of a share
LOWEST_R2 = -999.0  # An interval's end; few episodes say nothing, and say it with a number.
LEVELS = 2_000  # quantiles of Student's t that two sources of chance are added by


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `apart` says that the interval does not hold zero, and that the figure
    is not shown as zero."""

    value: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        return abs(self.value) >= SMALLEST_CLAIM and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class EpisodeSums:
    """One predictor's errors, summed within each episode: all that any choice of episodes needs.

    `wrong` holds squared errors (r2) or wrong answers (all other metrics); `first` and `second` are the sums
    of the truth and of its square, about the sample's mean (zeros unless r2; for r2_over_copy zeros and the
    squared errors of copying; for auroc the clips where it happens, and zeros). Rows follow `episodes`,
    sorted.
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

    @property
    def support(self) -> int:
        """How many episodes the figure rests on: all; for auroc those with a clip where it happens, or those
        with one where it does not, whichever are fewer."""
        if self.metric != "auroc":
            return len(self.episodes)
        happens = self.first[:, 0]
        return int(min((happens > 0).sum(), (happens < self.clips).sum()))

    def score(self, weights: Shaped[np.ndarray, "choices episodes"]) -> Float[np.ndarray, " choices"]:
        """The metric with episode e counted `weights[:, e]` times."""
        weights = weights.astype(np.float64)
        return self._score(*(weights @ sums for sums in (self.clips, self.wrong, self.first, self.second)))

    def left_one_out(self) -> Float[np.ndarray, " episodes"]:
        """The metric without episode e, for every e."""
        parts = (self.clips, self.wrong, self.first, self.second)
        return self._score(*(sums.sum(0) - sums for sums in parts))

    def shares(self) -> Float[np.ndarray, " episodes"]:
        """What each episode takes away from a perfect score: 1 − their sum is the metric."""
        if self.metric not in OF_SPREAD:
            return np.asarray(self.wrong[:, 0] / self.clips.sum())
        spread = self.second.sum(0) - self.first.sum(0) ** 2 / self.clips.sum()
        return np.asarray((self.wrong[:, self.varying] / spread[self.varying]).mean(1))

    def _score(
        self, clips: np.ndarray, wrong: np.ndarray, first: np.ndarray, second: np.ndarray
    ) -> Float[np.ndarray, " choices"]:
        """From sums over the episodes that count, a row a choice of them."""
        if self.metric not in OF_SPREAD:
            return np.asarray(1 - wrong[:, 0] / clips)
        spread = second - first**2 / clips[:, None]
        total = self.second.sum(0) - self.first.sum(0) ** 2 / self.clips.sum()
        spread = np.maximum(spread, SMALLEST_SHARE * total)[:, self.varying]
        return np.asarray((1 - wrong[:, self.varying] / spread).mean(1))

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
    keys, clips, (summed, events) = _by_episode(episodes, wrong[:, None], happens[:, None])
    return EpisodeSums("auroc", keys, clips, summed, events, np.zeros_like(summed), np.ones(1, bool))


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


def interval(sums: EpisodeSums) -> Estimate:
    """The score with a 95 % interval for new episodes: Student's t with the jackknife's standard error over
    episodes, on a scale where scores spread evenly: log(1 − R²), arcsin √share.

    Leaving out whole episodes is the cluster jackknife CV3 (MacKinnon, Nielsen and Webb, J. Appl.
    Econometrics 38, 2023): where episodes are few and uneven it errs to the wide side, percentiles of a
    bootstrap to the narrow one. Where all episodes score alike (all answers right, say) there is no spread to
    see, and a share gets the interval of Clopper and Pearson (Biometrika 26, 1934) for so many episodes. An
    area under the ROC curve knows no more than the fewer of its two kinds of episodes say (`support`). A pure
    function. Raises `DataError` below two episodes.
    """
    return joint_interval([sums])


def paired_difference(first: EpisodeSums, second: EpisodeSums) -> Estimate:
    """first − second with Student's 95 % interval: an episode is left out for both at once, so what makes it
    hard for both cancels. Where shares of all episodes differ alike there is no spread to see either: then as
    many others as could have been missed (Clopper and Pearson's, of none in so many) may differ by all.

    Raises `DataError` when the two were not computed on the same clips.
    """
    if not first.same_clips(second):
        raise DataError("a paired difference needs two predictors of the same target on the same clips")
    return joint_difference([first], [second])


def joint_interval(sums: Sequence[EpisodeSums]) -> Estimate:
    """Mean score of predictors of several seeds, with a 95 % interval for new episodes and new seeds."""
    _require_together(sums)
    values = np.array([each.value for each in sums])
    mean, left_out = float(values.mean()), np.mean([each.left_one_out() for each in sums], axis=0)
    support = min(each.support for each in sums)
    if sums[0].metric in OF_SPREAD:
        error = _half_width(np.log(_error(left_out)), np.log(_error(values)), support)
        low, high = (1 - np.exp(np.log(_error(mean)) + side * error) for side in (1, -1))
        return Estimate(mean, max(float(low), LOWEST_R2), max(float(high), mean))
    if max(np.ptp(left_out), np.ptp(values)) < ROUNDING:
        return Estimate(mean, *_clopper_pearson(mean, support))
    error = _half_width(_angle(left_out), _angle(values), support)
    low, high = (np.sin(np.clip(_angle(mean) + side * error, 0, np.pi / 2)) ** 2 for side in (-1, 1))
    return Estimate(mean, float(low), float(high))


def _clopper_pearson(share: float, count: int) -> tuple[float, float]:
    """For `share · count` right answers, which need not be a whole number, of `count`."""
    right, tail = share * count, (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, right, count - right + 1)) if right else 0.0
    high = float(beta.ppf(1 - tail, right + 1, count - right)) if right < count else 1.0
    return low, high


def joint_difference(first: Sequence[EpisodeSums], second: Sequence[EpisodeSums]) -> Estimate:
    """Mean over seeds of first − second, seed by seed; the 95 % interval is for new episodes and seeds."""
    values, left_out, support = _differences(first, second)
    mean = float(values.mean())
    if first[0].metric in OF_SPREAD:
        error = _half_width(left_out, values, support)
        return Estimate(mean, mean - error, mean + error)
    if max(np.ptp(left_out), np.ptp(values)) < ROUNDING:
        unseen = _clopper_pearson(0.0, support)[1]
        return Estimate(mean, (1 - unseen) * mean - unseen, (1 - unseen) * mean + unseen)
    error = _half_width(left_out, values, support)
    return Estimate(mean, max(mean - error, -1.0), min(mean + error, 1.0))


def joint_p_value(first: Sequence[EpisodeSums], second: Sequence[EpisodeSums]) -> float:
    """How often a difference whose truth is zero would come out as far from it as this one, over new episodes
    and seeds: at 0.05 where `joint_difference`'s interval ends at zero. Not below 1 ÷ `LEVELS`; 1 where there
    is no spread to see, or too few episodes to see it by."""
    if len(first) == 1:
        raise ValueError("of one seed `significance.sign_flip_p_value` asks less")
    values, left_out, support = _differences(first, second)
    if support < MIN_EPISODES_FOR_CLAIMS or max(np.ptp(left_out), np.ptp(values)) < ROUNDING:
        return 1.0
    errors = _errors(left_out, values, support)
    return float(max((errors >= abs(values.mean())).mean(), 1 / LEVELS))


def _differences(
    first: Sequence[EpisodeSums], second: Sequence[EpisodeSums]
) -> tuple[Float[np.ndarray, " seeds"], Float[np.ndarray, " episodes"], int]:
    """Of every seed; with one episode left out, their mean over seeds; how many episodes they rest on."""
    _require_together([*first, *second])
    pairs = list(zip(first, second, strict=True))
    values = np.array([one.value - other.value for one, other in pairs])
    left_out = np.mean([one.left_one_out() - other.left_one_out() for one, other in pairs], axis=0)
    return values, left_out, min(each.support for each in (*first, *second))


def _half_width(
    left_out: Float[np.ndarray, " episodes"], per_seed: Float[np.ndarray, " seeds"], support: int
) -> float:
    """Half of a 95 % interval, from figures that leave one episode out and from those of single seeds."""
    if len(per_seed) == 1:
        of_episodes, freedom = _error_of_episodes(left_out, support)
        return of_episodes * float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))
    return float(np.quantile(_errors(left_out, per_seed, support), CONFIDENCE))


def _errors(
    left_out: Float[np.ndarray, " episodes"], per_seed: Float[np.ndarray, " seeds"], support: int
) -> Float[np.ndarray, " levels"]:
    """How far off a mean over two seeds or more may be: `LEVELS` sizes of its error, all as likely.

    Episodes and seeds each err by Student's t with their own degrees of freedom times their own standard
    error; the two are added as independent (Behrens and Fisher's distribution, by its quantiles). Normal
    seeds are assumed, and few of them cost width.
    """
    seeds = len(per_seed)
    of_episodes, freedom = _error_of_episodes(left_out, support)
    of_seeds = float(per_seed.std(ddof=1) / np.sqrt(seeds))
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    shuffled = np.random.default_rng(seeds).permutation(levels)
    return np.abs(
        of_episodes * student_t.ppf(levels, freedom) + of_seeds * student_t.ppf(shuffled, seeds - 1)
    )


def _error_of_episodes(left_out: Float[np.ndarray, " episodes"], support: int) -> tuple[float, float]:
    """Their standard error and its degrees of freedom. Where the figure rests on fewer episodes (`support`),
    their spread about their own mean stands for that of others: as of a sample of so many."""
    count = len(left_out)
    squares = (left_out - left_out.mean()) ** 2
    error, freedom = float(np.sqrt((count - 1) / count * squares.sum())), _freedom(squares)
    if support >= count:
        return error, freedom
    if support < 2:
        return np.inf, 1.0
    return error * float(np.sqrt(support / (support - 1))), min(freedom, support - 1)


def _freedom(squares: Float[np.ndarray, " episodes"]) -> float:
    """Degrees of freedom of a variance summed from these squares, by Satterthwaite's 2 E² ÷ Var: one fewer
    than episodes where they are those of a normal sample, down to two where one episode owns the spread."""
    count, total = len(squares), float(squares.sum())
    spread = float((squares**2).sum()) - total**2 / count
    return min(2 * total**2 / spread, count - 1) if spread > 0 else count - 1


def _error(r2: Float[np.ndarray, " *any"] | float) -> Float[np.ndarray, " *any"]:
    """1 − R², above zero."""
    return np.maximum(1 - np.asarray(r2), SMALLEST_SHARE)


def _angle(share: Float[np.ndarray, " *any"] | float) -> Float[np.ndarray, " *any"]:
    return np.asarray(np.arcsin(np.sqrt(np.clip(share, 0, 1))))


def _require_together(sums: Sequence[EpisodeSums]) -> None:
    count = len(sums[0].episodes)
    if count < 2:
        raise DataError("an interval needs at least 2 held-out episodes; hold out more of them")
    if any(len(each.episodes) != count for each in sums):
        raise DataError("predictors that are held against one another must share their held-out episodes")
