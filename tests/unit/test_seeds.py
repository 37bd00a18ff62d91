"""Joined seeds say what their interval covers, and it does cover it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
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
    ONE_SIDE,
    RANGE,
    SeedComparison,
    SeedRow,
    aggregate_seeds,
    group_results,
    scores_from_arrays,
    scores_to_arrays,
)
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    interval,
    joint_difference,
    joint_interval,
    joint_p_value,
    r2_sums,
    share_sums,
)

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
    return run_probe_suite(suite, sides[0], sides[1], seed=seed)


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


def test_the_joint_p_value_is_below_a_twentieth_where_the_interval_excludes_zero(
    three: list[SuiteResult],
) -> None:
    for results in (three, [suite_at(seed, student_noise=1.9) for seed in range(3)], three[:2]):
        _, comparisons = aggregate_seeds(results)
        assert comparisons
        for c in comparisons:
            assert c.p is not None and c.p_holm is not None and c.p <= c.p_holm <= 1
            assert (c.p < 0.05) == (c.low > 0 or c.high < 0), c
    (alone, *_) = aggregate_seeds(three[:1])[1]
    assert alone.p == three[0].comparisons[0].p
    bare = [dataclasses.replace(result, scores={}) for result in three]
    assert {c.p for c in aggregate_seeds(bare)[1]} == {c.p_holm for c in aggregate_seeds(bare)[1]} == {None}


def test_seeds_that_are_alike_reject_a_true_null_at_the_stated_rate() -> None:
    """Three seeds of two predictors that are as good as each other: one in twenty, and few seeds cost."""
    rejected, runs = 0, 200
    for run in range(runs):
        noise = np.random.default_rng(run)
        episodes, sums = np.arange(40), []
        for _ in range(2):
            own = 0.1 * noise.normal(size=3)
            sums.append([share_of(own[seed] + noise.normal(size=40), episodes) for seed in range(3)])
        rejected += joint_p_value(*sums) < 0.05
    assert rejected / runs < 0.09


def share_of(ability: np.ndarray, episodes: np.ndarray) -> EpisodeSums:
    return share_sums("accuracy", 1 / (1 + np.exp(-ability)), episodes)


def test_of_one_runs_seeds_nothing_is_said(three: list[SuiteResult]) -> None:
    """Probes of another seed are not another training of their encoder."""
    rows, comparisons = aggregate_seeds(three, {"random"})
    by_name = {row.encoder: row for row in rows if row.target == "action_end"}
    assert (by_name["random"].interval, by_name["random"].seeds) == (EPISODES_ONLY, 1)
    assert (by_name["student"].interval, by_name["student"].seeds) == (BOTH, 3)
    between = {c.interval for c in comparisons if {c.encoder, c.against} == {"student", "random"}}
    assert between == {ONE_SIDE}
    _, comparisons = aggregate_seeds(three, {"random", "student"})
    pair = next(c for c in comparisons if {c.encoder, c.against} == {"student", "random"})
    assert (pair.interval, pair.seeds) == (EPISODES_ONLY, 1)


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


EPISODES_HERE, CLIPS_HERE = 30, 4
NUMBERS = np.arange(EPISODES_HERE).repeat(CLIPS_HERE)


def predictors(run: int, errors: list[float]) -> list[EpisodeSums]:
    """Of the same episodes, erring by these variances; half of an error is the same for all."""
    random = np.random.default_rng([3, run])

    def clustered() -> np.ndarray:
        shared = random.standard_normal((EPISODES_HERE, 2))[NUMBERS]
        return np.sqrt(0.5) * (shared + random.standard_normal(shared.shape))

    truth, common = clustered(), clustered()
    return [r2_sums(truth, truth + np.sqrt(error / 2) * (common + clustered()), NUMBERS) for error in errors]


def test_seeds_that_agree_add_nothing_and_those_that_do_not_widen() -> None:
    (one,) = predictors(0, [0.25])
    alone, thrice = interval(one), joint_interval([one, one, one])
    assert (thrice.low, thrice.high) == pytest.approx((alone.low, alone.high), abs=0.003)
    apart = joint_interval(predictors(0, [0.1, 0.25, 0.4]))
    assert apart.high - apart.low > 2 * (alone.high - alone.low)


def test_more_seeds_narrow_the_interval() -> None:
    widths = []
    for repeats in (1, 2, 4):
        joined = joint_interval(predictors(0, [0.1, 0.25, 0.4] * repeats))
        widths.append(joined.high - joined.low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


def drawn(run: int, spread: float, mean: float, seeds: int = 3) -> list[EpisodeSums]:
    random = np.random.default_rng([4, run, int(100 * mean)])
    return predictors(run, np.maximum(0.03, mean + spread * random.standard_normal(seeds)).tolist())


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.08])
def test_the_joint_interval_covers_new_episodes_and_new_seeds(
    spread: float, times: Callable[[int, int], int]
) -> None:
    runs = times(150, 5000)
    figures = differences = 0
    for run in range(runs):
        ones, others = drawn(run, spread, 0.25), drawn(run, spread, 0.3)
        joint, difference = joint_interval(ones), joint_difference(ones, others)
        figures += joint.low <= 0.75 <= joint.high
        differences += difference.low <= 0.05 <= difference.high
    assert figures / runs >= 0.93
    assert differences / runs >= 0.93


def test_an_interval_of_the_seeds_alone_would_claim_too_much() -> None:
    runs = [(drawn(run, 0.08, 0.25), run) for run in range(100)]
    alone = [np.mean([sums.value for sums in ones]) for ones, _ in runs]
    within = [interval(ones[0]) for ones, _ in runs]
    covered = np.mean(
        [abs(mean - 0.75) < (each.high - each.low) / 2 for mean, each in zip(alone, within, strict=True)]
    )
    joint = np.mean([each.low <= 0.75 <= each.high for each in (joint_interval(ones) for ones, _ in runs)])
    assert covered < joint


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
