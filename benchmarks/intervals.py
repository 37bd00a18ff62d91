"""How often a nominal 95 % interval holds the truth, on synthetic data whose truth is known.

    python benchmarks/intervals.py [--runs 2000]

Episodes have 1 to 8 clips, half of whose spread they share. Prints the tables of docs/evaluation.md: over
held-out episodes, and over the runs of `runs regress`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import norm

from salt_vla.evaluation.regression import regress
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    Estimate,
    auroc_sums,
    interval,
    joint_difference,
    joint_interval,
    paired_difference,
    r2_sums,
    share_sums,
)

EPISODES = (10, 20, 60, 120)
RUNS = (5, 10, 20)
Random = np.random.Generator
Case = Callable[[Random, int], tuple[Estimate, float]]


def numbers(random: Random, episodes: int) -> np.ndarray:
    return np.arange(episodes).repeat(random.integers(1, 9, episodes))


def noise(random: Random, of: np.ndarray, scale: float) -> np.ndarray:
    shared = random.standard_normal((of[-1] + 1, 2))[of]
    return scale * np.sqrt(0.5) * (shared + random.standard_normal(shared.shape))


def r2(random: Random, episodes: int, variance: float = 0.25, heavy: float = 0.0) -> tuple[Estimate, float]:
    of = numbers(random, episodes)
    truth, error = noise(random, of, 1.0), noise(random, of, np.sqrt(variance))
    error *= np.exp(heavy * random.standard_normal((episodes, 1)) - heavy**2)[of]
    return interval(r2_sums(truth, truth + error, of)), 1 - variance


def difference(random: Random, episodes: int) -> tuple[Estimate, float]:
    of = numbers(random, episodes)
    truth, error, more = (noise(random, of, scale) for scale in (1.0, 0.5, 0.3))
    return paired_difference(
        r2_sums(truth, truth + error, of), r2_sums(truth, truth + error + more, of)
    ), 0.09


def accuracy(random: Random, episodes: int, a: float = 2) -> tuple[Estimate, float]:
    of = numbers(random, episodes)
    right = random.random(len(of)) < random.beta(a, 1, episodes)[of]
    return interval(share_sums("accuracy", right, of)), a / (a + 1)


def pairs(random: Random, episodes: int) -> tuple[Estimate, float]:
    of = np.arange(episodes).repeat(2)
    right = random.random(len(of)) < random.uniform(0.25, 0.85, episodes)[of]
    return interval(share_sums("relative_accuracy", right, of)), 0.55


def area(random: Random, episodes: int) -> tuple[Estimate, float]:
    """Something happens in a fifth of the episodes, once; scores are a standard deviation higher there."""
    of = np.arange(episodes).repeat(4)
    truth = np.zeros((episodes, 4))
    truth[random.permutation(episodes)[: episodes // 5], 0] = 1
    truth = truth.reshape(-1, 1)
    return interval(auroc_sums(truth, truth + random.standard_normal(truth.shape), of)), norm.cdf(
        np.sqrt(0.5)
    )


def seeds(random: Random, episodes: int, means: tuple[float, ...]) -> list[list[EpisodeSums]]:
    """Three seeds of predictors whose error's variance is spread by 0.05 about each mean."""
    of = numbers(random, episodes)
    truth, common = noise(random, of, 1.0), noise(random, of, 1.0)
    drawn = [np.maximum(0.03, mean + 0.05 * random.standard_normal(3)) for mean in means]
    return [
        [r2_sums(truth, truth + np.sqrt(v / 2) * (common + noise(random, of, 1.0)), of) for v in each]
        for each in drawn
    ]


def joined(random: Random, episodes: int) -> tuple[Estimate, float]:
    (ones,) = seeds(random, episodes, (0.25,))
    return joint_interval(ones), 0.75


def joined_difference(random: Random, episodes: int) -> tuple[Estimate, float]:
    return joint_difference(*seeds(random, episodes, (0.25, 0.3))), 0.05


def runs_line(random: Random, runs: int, r2: float, heavy: bool = False) -> tuple[Estimate, float]:
    """Figures of runs around a line; `heavy`: distances from it by Student's t of 4 degrees of freedom."""
    x, away = random.standard_normal(runs), random.standard_normal(runs)
    if heavy:
        away = random.standard_t(4, runs) / np.sqrt(2)
    found = regress(x, np.sqrt(r2) * x + np.sqrt(1 - r2) * away)
    return Estimate(found.r2, found.low, found.high), r2


CASES = {
    "R² of 0.75": r2,
    "R² of 0.2": lambda random, episodes: r2(random, episodes, 0.8),
    "R² of 0.75, some episodes far harder": lambda random, episodes: r2(random, episodes, 0.25, 0.5),
    "paired difference of R²": difference,
    "accuracy of 0.67": accuracy,
    "accuracy of 0.9": lambda random, episodes: accuracy(random, episodes, 9),
    "relative accuracy, two pairs a scene": pairs,
    "area under the ROC curve, events in a fifth": area,
    "R² over three seeds": joined,
    "difference over three seeds": joined_difference,
}


OF_RUNS = {
    "R² of 0.95 over runs": lambda random, runs: runs_line(random, runs, 0.95),
    "R² of 0.5 over runs": lambda random, runs: runs_line(random, runs, 0.5),
    "R² of 0 over runs": lambda random, runs: runs_line(random, runs, 0.0),
    "R² of 0.95 over runs, some far off": lambda random, runs: runs_line(random, runs, 0.95, True),
}


def table(head: str, counts: tuple[int, ...], cases: Mapping[str, Case], repeats: int) -> None:
    print(f"| {head} | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}")
    for name, draw in cases.items():
        shares = []
        for count in counts:
            found = (draw(np.random.default_rng([13, count, repeat]), count) for repeat in range(repeats))
            shares.append(np.mean([each.low <= truth <= each.high for each, truth in found]))
        print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000, help="how often each is drawn")
    repeats = parser.parse_args().runs
    table("runs", RUNS, OF_RUNS, repeats)
    table("held-out episodes", EPISODES, CASES, repeats)


if __name__ == "__main__":
    main()
