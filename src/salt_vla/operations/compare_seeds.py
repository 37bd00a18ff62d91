"""What may be said of runs that are one experiment with several seeds: means with intervals, and differences
between two experiments taken seed by seed.

Knows names, settings and figures, no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from salt_vla.config import RuntimeConfig, TrainConfig, config_hash

CONFIDENCE = 0.95
FEWEST_SEEDS = 3  # for an interval: two points have a spread, but nobody would believe it


class Entry(NamedTuple):
    """A run to be taken together with others. `value`: its figure at `step`; `apart`: how it came there
    otherwise than its settings say, in words; `data`: equal for runs that learned from the same."""

    name: str
    config: TrainConfig | None
    value: float | None
    step: int = 0
    apart: str = ""
    data: str = ""


@dataclass(frozen=True)
class Group:
    """Runs whose settings are equal but for the seed, with figures of the same step. `mean` is over seeds, of
    which each counts once however many runs have it; `low` and `high` are Student's 95 % interval, None below
    three seeds; `note` says what they are."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None
    note: str

    @property
    def name(self) -> str:
        return self.runs[0]


@dataclass(frozen=True)
class PairedDifference:
    """`first` − `against` over the seeds that both have. `apart`: the interval does not hold zero."""

    first: str
    against: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    apart: bool
    note: str


def group_runs(runs: Sequence[Entry]) -> tuple[Group, ...]:
    """In the order of their first runs."""
    found: dict[Any, list[tuple[str, int, float | None]]] = {}
    for name, config, value, step, apart, data in runs:
        key = (_experiment(config), step, apart, data) if config else name
        found.setdefault(key, []).append((name, config.seed if config else 0, value))
    return tuple(_group(each) for each in found.values())


def pairs_of(runs: Sequence[Entry]) -> set[frozenset[str]]:
    """Names of two whose figures are of the same step and that came there alike."""
    return {
        frozenset((one.name, other.name))
        for one, other in combinations(runs, 2)
        if (one.step, one.apart) == (other.step, other.apart)
    }


def kept_apart(runs: Sequence[Entry]) -> list[str]:
    """A sentence on runs whose settings are equal but for the seed and that are no group all the same, and
    one on figures of different steps."""
    said: list[str] = []
    alike: dict[str, list[Entry]] = {}
    for run in runs:
        if run.config:
            alike.setdefault(_experiment(run.config), []).append(run)
    for same in alike.values():
        if len({run[3:] for run in same}) > 1:
            each = [f"{run.name} ({_place(run, same)})" for run in same]
            said.append(f"of equal settings, and not taken together: {', '.join(each)}")
    if len({run.step for run in runs if run.value is not None}) > 1:
        said.append("figures of different steps are not held against one another; those at equal steps are")
    return said


def _place(run: Entry, same: Sequence[Entry]) -> str:
    said = [f"figure of step {run.step}" if run.value is not None else "no figure", run.apart]
    said += ["other data"] * (run.data != same[0].data)
    return "; ".join(filter(None, said))


def paired_differences(groups: Sequence[Group], alike: set[frozenset[str]]) -> tuple[PairedDifference, ...]:
    """Each group against the first, where they share seeds and `alike` has the pairs of runs."""
    found = []
    for group in groups[1:]:
        first = groups[0]
        by_seed: dict[int, list[float]] = {}
        for name, seed, value in zip(group.runs, group.seeds, group.values, strict=True):
            for other, same, theirs in zip(first.runs, first.seeds, first.values, strict=True):
                fits = seed == same and frozenset((name, other)) in alike
                if fits and value is not None and theirs is not None:
                    by_seed.setdefault(seed, []).append(value - theirs)
        if by_seed:
            seeds = tuple(sorted(by_seed))
            differences = tuple(sum(by_seed[seed]) / len(by_seed[seed]) for seed in seeds)
            mean, low, high, note = interval(differences)
            apart = low is not None and high is not None and (low > 0 or high < 0)
            found.append(
                PairedDifference(group.name, first.name, seeds, differences, mean, low, high, apart, note)
            )
    return tuple(found)


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None, str]:
    """(mean, low, high, what that is): Student's t over seeds with n − 1 degrees of freedom, which takes them
    for draws of a normal distribution; no interval below three."""
    count, mean = len(values), sum(values) / len(values)
    if count < FEWEST_SEEDS:
        return mean, None, None, "one seed" if count == 1 else f"{count} seeds, too few for an interval"
    from scipy.stats import t as student_t  # Takes longer to import than all the rest.

    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread / math.sqrt(count)
    return mean, mean - half, mean + half, f"95 %, Student's t over {count} seeds"


def _group(runs: Sequence[tuple[str, int, float | None]]) -> Group:
    names, seeds, values = zip(*sorted(runs, key=lambda run: run[1]), strict=True)
    by_seed: dict[int, list[float]] = {}
    for _, seed, value in runs:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return Group(names, seeds, values, None, None, None, "no figure")
    mean, low, high, note = interval([sum(each) / len(each) for each in by_seed.values()])
    return Group(names, seeds, values, mean, low, high, note)


def _experiment(config: TrainConfig) -> str:
    """What is the same for all seeds of an experiment; how and where it was computed is left out."""
    return config_hash(replace(config, seed=0, runtime=RuntimeConfig()))
