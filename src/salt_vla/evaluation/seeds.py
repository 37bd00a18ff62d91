"""Joins tables of several seeds: one figure with an interval for both sources of chance, episodes and seeds.

Knows suite results, not how they were computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.results import MIN_EPISODES_FOR_CLAIMS, Comparison, Row, SuiteResult
from salt_vla.evaluation.significance import holm_within
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    Estimate,
    Metric,
    joint_difference,
    joint_interval,
    joint_p_value,
)

if TYPE_CHECKING:
    from jaxtyping import Float

    Scores = dict[tuple[str, str], EpisodeSums]  # (encoder, target) → sums

BOTH = "95 %, for new episodes and new seeds"
EPISODES_ONLY = "95 %, for new episodes, one seed"
ONE_SIDE = "95 %, for new episodes and new seeds of one of the two; the other is one run"
RANGE = "lowest and highest seed"


@dataclass(frozen=True)
class SeedRow:
    """A figure's mean over seeds. `interval` names what `low` and `high` are; `lowest` and `highest` are the
    single seeds' extremes."""

    encoder: str
    suite: str
    target: str
    metric: Metric
    value: float
    low: float
    high: float
    interval: str
    lowest: float
    highest: float
    seeds: int


@dataclass(frozen=True)
class SeedComparison:
    """A difference's mean over seeds; `apart_in` counts the seeds whose own interval excludes zero, `apart`
    says that the joint one does (never claimed from a mere range of seeds). `p` is for new episodes and
    seeds, `p_holm` corrected for all of the suite's targets; None for a mere range."""

    suite: str
    target: str
    metric: Metric
    encoder: str
    against: str
    difference: float
    low: float
    high: float
    interval: str
    lowest: float
    highest: float
    seeds: int
    apart_in: int
    apart: bool
    p: float | None = None
    p_holm: float | None = None


def aggregate_seeds(
    results: Sequence[SuiteResult], single: Collection[str] = ()
) -> tuple[list[SeedRow], list[SeedComparison]]:
    """Rows and comparisons of several seeds (any number of suites), joined by suite, target and encoder.
    `single`: encoders that are one and the same run at every seed: of their seeds nothing is known.

    With `scores` of the same held-out episodes in every seed the interval covers episodes and seeds; without
    them (rows read back from JSON) it is the range of the seeds, and says so.
    """
    _require_distinct(results)
    rows: dict[tuple[str, str, str], list[tuple[SuiteResult, int]]] = {}
    pairs: dict[tuple[str, str, str, str], list[tuple[SuiteResult, int]]] = {}
    for result in results:
        for i, row in enumerate(result.rows):
            rows.setdefault((result.suite, row.target, row.encoder), []).append((result, i))
        for i, c in enumerate(result.comparisons):
            pairs.setdefault((result.suite, c.target, c.encoder, c.against), []).append((result, i))
    joined = [_join_comparisons(entries, single) for entries in pairs.values()]
    families = [(item.suite, item.encoder, item.against) for item in joined]
    ps = holm_within(families, [item.p for item in joined])
    return (
        [_join_rows(entries, single) for entries in rows.values()],
        [replace(item, p_holm=p) for item, p in zip(joined, ps, strict=True)],
    )


def _join_rows(entries: Sequence[tuple[SuiteResult, int]], single: Collection[str]) -> SeedRow:
    rows = [result.rows[i] for result, i in entries]
    first = rows[0]
    values = np.array([row.value for row in rows])
    sums = _sums_of(entries, (first.encoder, first.target))
    estimate, span = _estimate(values, [sums], lambda: joint_interval(sums))
    span |= _of_one_run(span, [first.encoder], single)
    return SeedRow(
        first.encoder,
        first.suite,
        first.target,
        first.metric,
        estimate.value,
        estimate.low,
        estimate.high,
        **span,
    )


def _join_comparisons(entries: Sequence[tuple[SuiteResult, int]], single: Collection[str]) -> SeedComparison:
    items = [result.comparisons[i] for result, i in entries]
    first = items[0]
    values = np.array([item.difference for item in items])
    mine, theirs = (_sums_of(entries, (name, first.target)) for name in (first.encoder, first.against))
    estimate, span = _estimate(values, [mine, theirs], lambda: joint_difference(mine, theirs))
    span |= _of_one_run(span, [first.encoder, first.against], single)
    return SeedComparison(
        first.suite,
        first.target,
        first.metric,
        first.encoder,
        first.against,
        estimate.value,
        estimate.low,
        estimate.high,
        **span,
        apart_in=sum(item.apart for item in items),
        apart=span["interval"] != RANGE
        and estimate.apart
        and min(each.support for each in (*mine, *theirs)) >= MIN_EPISODES_FOR_CLAIMS,
        p=_p_value(span["interval"], items, mine, theirs),
    )


def _p_value(
    spread: str, items: Sequence[Comparison], first: Sequence[EpisodeSums], second: Sequence[EpisodeSums]
) -> float | None:
    if spread == RANGE:
        return None
    return joint_p_value(first, second) if len(items) > 1 else items[0].p


def _sums_of(entries: Sequence[tuple[SuiteResult, int]], key: tuple[str, str]) -> list[EpisodeSums]:
    """Of every seed that kept them."""
    return [result.scores[key] for result, _ in entries if key in result.scores]


def _estimate(
    values: Float[np.ndarray, " seeds"], sums: Sequence[Sequence[EpisodeSums]], joint: Callable[[], Estimate]
) -> tuple[Estimate, dict[str, Any]]:
    """The joint interval where every seed kept its sums on the same episodes, else the range of the seeds;
    and the fields that say what it is."""
    lowest, highest = float(values.min()), float(values.max())
    span = {"lowest": lowest, "highest": highest, "seeds": len(values)}
    every = [each for side in sums for each in side]
    if len(every) < len(sums) * len(values) or any(not each.same_clips(every[0]) for each in every):
        return Estimate(float(values.mean()), lowest, highest), {"interval": RANGE, **span}
    return joint(), {"interval": BOTH if len(values) > 1 else EPISODES_ONLY, **span}


def _of_one_run(span: Mapping[str, Any], names: Sequence[str], single: Collection[str]) -> dict[str, Any]:
    """What is to be said otherwise where one of these encoders, or all of them, are one run at every seed."""
    alone = sum(name in single for name in names)
    if not alone or span["interval"] == RANGE:
        return {}
    return {"interval": EPISODES_ONLY, "seeds": 1} if alone == len(names) else {"interval": ONE_SIDE}


def group_results(
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    scores: Mapping[tuple[str, int], Scores] | None = None,
) -> list[SuiteResult]:
    """Rows and comparisons read back from files, sorted into one result a suite and seed."""
    keys = dict.fromkeys((row.suite, row.seed) for row in rows)
    return [
        SuiteResult(
            suite,
            seed,
            [row for row in rows if (row.suite, row.seed) == (suite, seed)],
            [c for c in comparisons if (c.suite, c.seed) == (suite, seed)],
            (scores or {}).get((suite, seed), {}),
        )
        for suite, seed in keys
    ]


def _require_distinct(results: Sequence[SuiteResult]) -> None:
    seen = set()
    for result in results:
        if (result.suite, result.seed) in seen:
            raise DataError(f"suite {result.suite!r} at seed {result.seed} was given twice")
        seen.add((result.suite, result.seed))


def scores_to_arrays(results: Sequence[SuiteResult]) -> dict[str, np.ndarray]:
    """Every result's sums as plain arrays by name, for `numpy.savez_compressed`: columns are episode, clips,
    then wrong, first and second of each dimension; the name is JSON."""
    arrays = {}
    for result in results:
        for (encoder, target), s in result.scores.items():
            columns = [s.episodes[:, None], s.clips[:, None], s.wrong, s.first, s.second]
            key = [result.suite, result.seed, encoder, target, s.metric, s.varying.tolist()]
            arrays[json.dumps(key)] = np.concatenate(columns, axis=1).astype(np.float64)
    return arrays


def scores_from_arrays(
    arrays: Mapping[str, np.ndarray],
) -> dict[tuple[str, int], Scores]:
    """The inverse of `scores_to_arrays`: (suite, seed) → `SuiteResult.scores`."""
    found: dict[tuple[str, int], Scores] = {}
    for name, table in arrays.items():
        suite, seed, encoder, target, metric, varying = json.loads(name)
        wrong, first, second = map(np.ascontiguousarray, np.split(table[:, 2:], 3, axis=1))
        episodes, clips = table[:, 0].astype(np.int64), table[:, 1]
        sums = EpisodeSums(metric, episodes, clips, wrong, first, second, np.array(varying, dtype=bool))
        found.setdefault((suite, seed), {})[encoder, target] = sums
    return found
