"""A study's records joined over seeds, and as Markdown: means, intervals, and paired differences of probes.

Knows records and sums of errors, no runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from salt_vla.evaluation.statistics import EpisodeSums, Estimate, joint_difference

MINUS = "−"


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean, and the 95 % interval of Student's t for new seeds (infinite at one seed)."""
    array = np.array(values, dtype=np.float64)
    if len(array) < 2:
        return Estimate(float(array.mean()), -np.inf, np.inf)
    half = float(student_t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Estimate(float(array.mean()), float(array.mean()) - half, float(array.mean()) + half)


def paired_probes(ones: Sequence[EpisodeSums], others: Sequence[EpisodeSums]) -> Estimate:
    """Mean over seeds of one − other, seed by seed on the same held-out episodes; the 95 % interval covers
    new episodes and new seeds."""
    if len(ones) != len(others) or any(not sums.same_clips(ones[0]) for sums in (*ones, *others)):
        raise ValueError("paired differences need the same seeds, on the same held-out clips")
    return joint_difference(ones, others)


def signed(value: float, digits: int = 3) -> str:
    """+0.041, −0.003."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def with_interval(estimate: Estimate, digits: int = 3) -> str:
    """A difference with its interval, bold where that excludes zero; alone where one seed gives none."""
    if not np.isfinite(estimate.high):
        return signed(estimate.value, digits)
    low, high = (signed(end, digits) for end in (estimate.low, estimate.high))
    text = f"{signed(estimate.value, digits)} [{low}, {high}]"
    return f"**{text}**" if estimate.apart else text


def spread(estimate: Estimate, digits: int = 3) -> str:
    """A mean, and half the width of its interval, where it has one."""
    half = (estimate.high - estimate.low) / 2
    return signed(estimate.value, digits) + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Joined:
    """The records of cells that differ in their seed alone, and their probes' sums, in the seeds' order."""

    name: str
    records: tuple[Mapping[str, object], ...]
    sums: tuple[Mapping[tuple[str, str], EpisodeSums], ...]

    @property
    def seeds(self) -> list[int]:
        return [int(str(record["seed"])) for record in self.records]

    def values(self, *path: str) -> list[float]:
        """One figure of every seed's record."""
        found = []
        for record in self.records:
            value: object = record
            for key in path:
                assert isinstance(value, Mapping)
                value = value[key]
            assert isinstance(value, float)
            found.append(value)
        return found

    def mean(self, *path: str) -> float:
        return float(np.mean(self.values(*path)))

    def probe(self, encoder: str, target: str) -> list[EpisodeSums]:
        """Of every seed that has it."""
        return [sums[encoder, target] for sums in self.sums if (encoder, target) in sums]

    def of_seeds(self, seeds: Sequence[int]) -> Joined:
        """The same, for some of its seeds."""
        kept = [at for at, seed in enumerate(self.seeds) if seed in seeds]
        return Joined(
            self.name,
            tuple(self.records[at] for at in kept),
            tuple(self.sums[at] for at in kept),
        )


def difference(one: Joined, other: Joined, *path: str) -> Estimate:
    """one − other of a figure, paired by seed."""
    one, other = matched(one, other)
    pairs = zip(one.values(*path), other.values(*path), strict=True)
    return over_seeds([mine - theirs for mine, theirs in pairs])


def matched(one: Joined, other: Joined) -> tuple[Joined, Joined]:
    """Both for the seeds that both have."""
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not seeds:
        raise ValueError(f"{one.name} and {other.name} share no seed")
    return one.of_seeds(seeds), other.of_seeds(seeds)
