"""Joined seeds say what their interval covers, and it does cover it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

from salt_vla.errors import DataError
from salt_vla.evaluation.probing import ProbeSet, run_probe_suite
from salt_vla.evaluation.results import (
    Comparison,
    Row,
    SuiteResult,
    from_objects,
    to_objects,
)
from salt_vla.evaluation.seeds import (
    BOTH,
    EPISODES_ONLY,
    RANGE,
    SeedComparison,
    SeedRow,
    aggregate_seeds,
    group_results,
    joint_interval,
    scores_from_arrays,
    scores_to_arrays,
)
from salt_vla.evaluation.statistics import bootstrap_scores, percentile_interval, r2_sums

EPISODES, CLIPS = 24, 3


def suite_at(seed: int, suite: str = "corner/grid", student_noise: float = 1.0) -> SuiteResult:
    """The same data in every seed; the encoders' noise is the seed's own."""
    data, own = np.random.default_rng(0), np.random.default_rng([1, seed])
    sides = []
    for first in (0, 500):
        episodes = np.arange(first, first + EPISODES).repeat(CLIPS)
        hidden = data.standard_normal((EPISODES, 4)).repeat(CLIPS, axis=0)
        hidden += 0.3 * data.standard_normal(hidden.shape)
        features = {
            name: np.tile(hidden, 2) + noise * own.standard_normal((len(episodes), 8))
            for name, noise in (("student", student_noise), ("random", 2.0))
        }
        targets = {"action_end": hidden[:, :2], "task": np.array(["push", "reach"])[episodes % 2]}
        sides.append(ProbeSet(features, targets, episodes))
    return run_probe_suite(suite, *sides, seed=seed, bootstrap=200)


@pytest.fixture(scope="module")
def three() -> list[SuiteResult]:
    return [suite_at(seed) for seed in range(3)]


def student_row(rows: list[SeedRow]) -> SeedRow:
    return next(row for row in rows if (row.encoder, row.target) == ("student", "action_end"))


def test_the_joint_value_is_the_mean_over_seeds(three: list[SuiteResult]) -> None:
    rows, comparisons = aggregate_seeds(three)
    assert len(rows) == len(three[0].rows) and len(comparisons) == len(three[0].comparisons)
    values = [
        row.value for r in three for row in r.rows if (row.encoder, row.target) == ("student", "action_end")
    ]
    row = student_row(rows)
    assert row.value == pytest.approx(np.mean(values))
    assert (row.lowest, row.highest, row.seeds) == (min(values), max(values), 3)
    assert row.interval == BOTH
    assert row.low < row.value < row.high


def test_a_joint_comparison_counts_the_seeds_in_which_it_was_apart(three: list[SuiteResult]) -> None:
    _, comparisons = aggregate_seeds(three)
    for joined in comparisons:
        singles = [
            c
            for result in three
            for c in result.comparisons
            if (c.target, c.encoder, c.against) == (joined.target, joined.encoder, joined.against)
        ]
        assert joined.apart_in == sum(c.apart for c in singles)
        assert joined.difference == pytest.approx(np.mean([c.difference for c in singles]))
        assert joined.apart == (joined.low > 0 or joined.high < 0)


def test_an_effect_in_every_seed_is_apart_and_one_without_is_not() -> None:
    strong = aggregate_seeds([suite_at(seed, student_noise=0.5) for seed in range(3)])[1]
    absent = aggregate_seeds([suite_at(seed, student_noise=2.0) for seed in range(3)])[1]
    assert next(c for c in strong if c.target == "action_end").apart
    assert not next(c for c in absent if c.target == "action_end").apart


def test_rows_without_sums_give_the_range_of_the_seeds_and_claim_nothing(three: list[SuiteResult]) -> None:
    bare = [dataclasses.replace(result, scores={}) for result in three]
    rows, comparisons = aggregate_seeds(bare)
    row = student_row(rows)
    assert (row.low, row.high, row.interval) == (row.lowest, row.highest, RANGE)
    assert not any(c.apart for c in comparisons)
    assert row.value == student_row(aggregate_seeds(three)[0]).value


def test_seeds_with_other_held_out_episodes_give_the_range(three: list[SuiteResult]) -> None:
    moved = {
        key: dataclasses.replace(sums, episodes=sums.episodes + 1) for key, sums in three[1].scores.items()
    }
    rows, _ = aggregate_seeds([three[0], dataclasses.replace(three[1], scores=moved)])
    assert student_row(rows).interval == RANGE


def test_one_seed_is_said_to_be_one_seed(three: list[SuiteResult]) -> None:
    row = student_row(aggregate_seeds(three[:1])[0])
    assert (row.interval, row.seeds) == (EPISODES_ONLY, 1)
    assert row.low < row.value < row.high


def test_suites_are_joined_apart_from_one_another(three: list[SuiteResult]) -> None:
    other = [suite_at(seed, suite="mean", student_noise=3.0) for seed in range(2)]
    rows, _ = aggregate_seeds([*three, *other])
    seeds = {row.suite: row.seeds for row in rows}
    assert seeds == {"corner/grid": 3, "mean": 2}


def test_a_seed_given_twice_is_named(three: list[SuiteResult]) -> None:
    with pytest.raises(DataError, match="suite 'corner/grid' at seed 0 was given twice"):
        aggregate_seeds([three[0], three[0]])


def test_joining_is_deterministic(three: list[SuiteResult]) -> None:
    assert aggregate_seeds(three) == aggregate_seeds(three)


def test_seeds_that_agree_leave_the_interval_over_episodes_alone() -> None:
    samples = np.random.default_rng(0).normal(0.5, 0.01, 2000)
    agreed = joint_interval(np.full(3, 0.5), samples, seed=0)
    assert (agreed.low, agreed.high) == percentile_interval(samples)
    scattered = joint_interval(np.array([0.4, 0.5, 0.6]), samples, seed=0)
    assert scattered.high - scattered.low > 10 * (agreed.high - agreed.low)


def test_more_seeds_narrow_the_interval() -> None:
    samples = np.full(2000, 0.5)
    widths = []
    for repeats in (1, 2, 4):
        joined = joint_interval(np.tile([0.4, 0.5, 0.6], repeats), samples, seed=0)
        widths.append(joined.high - joined.low)
    assert widths[0] > 2 * widths[1] > 2 * widths[2]


def covered(run: int, spread: float) -> tuple[bool, bool]:
    """Whether the joint interval, and one that resamples the three seeds, hold the truth: predictors err by
    noise whose variance is drawn around 0.25 with standard deviation `spread` for each seed."""
    episodes, clips, dims, seeds = 60, 4, 2, 3
    random = np.random.default_rng([3, run])
    numbers = np.arange(episodes).repeat(clips)

    def clustered() -> np.ndarray:
        return random.standard_normal((episodes, dims)).repeat(clips, axis=0)

    truth = 0.7 * clustered() + np.sqrt(0.51) * random.standard_normal((episodes * clips, dims))
    shared = clustered()
    sums = []
    for _ in range(seeds):
        size = np.sqrt(max(0.05, 0.25 + spread * random.standard_normal()))
        error = size * (0.6 * shared + 0.8 * random.standard_normal(truth.shape))
        sums.append(r2_sums(truth, truth + error, numbers))
    scores = bootstrap_scores(sums, 400, seed=run)
    joint = joint_interval(np.array([s.value for s in sums]), scores.mean(0), seed=run)
    chosen = np.random.default_rng(run).integers(0, seeds, (400, seeds))
    low, high = percentile_interval(np.take_along_axis(scores.T, chosen, 1).mean(1))
    return joint.low <= 0.75 <= joint.high, low <= 0.75 <= high


@pytest.mark.parametrize("spread", [0.0, 0.08])
def test_the_joint_interval_covers_new_episodes_and_new_seeds(spread: float) -> None:
    runs = [covered(run, spread) for run in range(200)]
    assert np.mean([joint for joint, _ in runs]) >= 0.92
    if spread:
        assert np.mean([resampled for _, resampled in runs]) < 0.9


def test_sums_survive_a_file_of_plain_arrays(three: list[SuiteResult], tmp_path: Path) -> None:
    file = tmp_path / "scores.npz"
    np.savez_compressed(file, **scores_to_arrays(three))
    with np.load(file, allow_pickle=False) as arrays:
        found = scores_from_arrays(arrays)
    assert set(found) == {("corner/grid", seed) for seed in range(3)}
    for result in three:
        read = found[result.suite, result.seed]
        assert set(read) == set(result.scores)
        for key, sums in result.scores.items():
            assert read[key].same_clips(sums)
            assert read[key].value == sums.value


def test_results_read_back_from_files_join_to_the_same_figures(three: list[SuiteResult]) -> None:
    rows = json.loads(json.dumps([o for r in three for o in to_objects(r.rows)]))
    comparisons = json.loads(json.dumps([o for r in three for o in to_objects(r.comparisons)]))
    buffer = io.BytesIO()
    np.savez(buffer, **scores_to_arrays(three))
    buffer.seek(0)
    results = group_results(
        from_objects(Row, rows), from_objects(Comparison, comparisons), scores_from_arrays(np.load(buffer))
    )
    assert aggregate_seeds(results) == aggregate_seeds(three)


def test_joined_rows_and_comparisons_survive_json(three: list[SuiteResult]) -> None:
    rows, comparisons = aggregate_seeds(three)
    assert from_objects(SeedRow, json.loads(json.dumps(to_objects(rows)))) == rows
    assert from_objects(SeedComparison, json.loads(json.dumps(to_objects(comparisons)))) == comparisons
