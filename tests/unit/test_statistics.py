"""Intervals cover what they promise, pairing narrows them, and R² is what its definition says."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from sklearn.metrics import r2_score

from salt_vla.errors import DataError
from salt_vla.evaluation import statistics
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    Estimate,
    accuracy_sums,
    bootstrap_scores,
    interval,
    paired_difference,
    percentile_interval,
    r2_sums,
    varying_dims,
)

EPISODES, CLIPS, DIMS = 80, 5, 2
# Two predictors err by noise of variance 0.25 and 0.25 + 0.09 on a truth of variance 1.
TRUE_FIRST, TRUE_SECOND = 0.75, 0.66


def clustered(random: np.random.Generator, scale: float, episodes: int = EPISODES) -> np.ndarray:
    """Noise of variance scale², half of it shared by the clips of an episode: (clips, dims)."""
    shared = random.standard_normal((episodes, DIMS)).repeat(CLIPS, axis=0)
    own = random.standard_normal((episodes * CLIPS, DIMS))
    return scale * np.sqrt(0.5) * (shared + own)


def two_predictors(seed: int) -> tuple[EpisodeSums, EpisodeSums]:
    """The second makes the first's errors and some of its own."""
    random = np.random.default_rng([5, seed])
    truth, error, more = clustered(random, 1.0), clustered(random, 0.5), clustered(random, 0.3)
    numbers = np.arange(EPISODES).repeat(CLIPS)
    return r2_sums(truth, truth + error, numbers), r2_sums(truth, truth + error + more, numbers)


def some_predictions(dims: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = random.standard_normal((60, dims)) * (1 + np.arange(dims)) + 5
    return truth, truth + random.standard_normal((60, dims)), np.arange(12).repeat(5)


def test_r2_equals_scikit_learns_mean_over_outputs() -> None:
    truth, predicted, episodes = some_predictions()
    assert r2_sums(truth, predicted, episodes).value == pytest.approx(r2_score(truth, predicted), abs=1e-12)


def test_r2_of_weighted_episodes_equals_r2_of_the_clips_written_out() -> None:
    truth, predicted, episodes = some_predictions()
    weights = np.random.default_rng(1).integers(0, 3, 12)
    written_out = np.concatenate([np.tile(np.flatnonzero(episodes == e), weights[e]) for e in range(12)])
    score = r2_sums(truth, predicted, episodes).score(weights[None])[0]
    assert score == pytest.approx(r2_score(truth[written_out], predicted[written_out]), abs=1e-12)


def test_episode_numbers_may_be_unsorted_and_uneven() -> None:
    truth, predicted, _ = some_predictions()
    episodes = np.random.default_rng(2).integers(100, 110, 60)
    sums = r2_sums(truth, predicted, episodes)
    assert list(sums.episodes) == sorted(set(episodes.tolist()))
    assert sums.clips.sum() == 60
    assert sums.value == pytest.approx(r2_score(truth, predicted), abs=1e-12)


def test_a_95_percent_interval_covers_the_truth_92_to_98_times_in_100() -> None:
    runs = 400
    single = paired = 0
    for run in range(runs):
        first, second = two_predictors(run)
        mine = interval(first, resamples=400, seed=run)
        difference = paired_difference(first, second, resamples=400, seed=run)
        single += mine.low <= TRUE_FIRST <= mine.high
        paired += difference.low <= TRUE_FIRST - TRUE_SECOND <= difference.high
    assert 0.92 <= single / runs <= 0.98
    assert 0.92 <= paired / runs <= 0.98


def test_an_interval_that_ignored_episodes_would_be_too_narrow() -> None:
    random = np.random.default_rng(3)
    truth = clustered(random, 1.0)
    predicted = truth + random.standard_normal((EPISODES, DIMS)).repeat(CLIPS, axis=0)
    by_episode = interval(r2_sums(truth, predicted, np.arange(EPISODES).repeat(CLIPS)))
    by_clip = interval(r2_sums(truth, predicted, np.arange(EPISODES * CLIPS)))
    assert by_episode.value == pytest.approx(by_clip.value, abs=1e-12)
    assert by_episode.high - by_episode.low > 1.3 * (by_clip.high - by_clip.low)


def test_a_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    first, second = two_predictors(0)
    paired = paired_difference(first, second, seed=0)
    unpaired = percentile_interval(
        bootstrap_scores([first], 2000, seed=0)[0] - bootstrap_scores([second], 2000, seed=1)[0]
    )
    assert paired.high - paired.low < 0.7 * (unpaired[1] - unpaired[0])
    assert paired.apart
    assert unpaired[0] < paired.low


def test_a_paired_difference_is_the_difference_of_the_values_and_changes_sign() -> None:
    first, second = two_predictors(1)
    forward, backward = paired_difference(first, second, seed=4), paired_difference(second, first, seed=4)
    assert forward.value == pytest.approx(first.value - second.value)
    assert (backward.value, backward.low, backward.high) == pytest.approx(
        (-forward.value, -forward.high, -forward.low)
    )


def test_a_predictor_does_not_differ_from_itself() -> None:
    first, _ = two_predictors(2)
    assert paired_difference(first, first) == Estimate(0.0, 0.0, 0.0)
    assert not paired_difference(first, first).apart


@pytest.mark.parametrize("constant", [0.0, 0.3, -2.0])
def test_a_constant_predictor_is_at_most_zero_in_every_resample(constant: float) -> None:
    truth = clustered(np.random.default_rng(6), 1.0)
    sums = r2_sums(truth, np.full_like(truth, constant), np.arange(EPISODES).repeat(CLIPS))
    assert sums.value <= 0
    assert (bootstrap_scores([sums], 500, seed=0) <= 1e-12).all()


def test_a_perfect_predictor_is_one_in_every_resample() -> None:
    truth, _, episodes = some_predictions()
    estimate = interval(r2_sums(truth, truth, episodes))
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_a_dimension_that_does_not_vary_is_left_out_and_named() -> None:
    truth, predicted, episodes = some_predictions()
    truth[:, 1] = 5.0 + 1e-9 * np.arange(60)
    sums = r2_sums(truth, predicted, episodes)
    assert sums.left_out == (1,)
    assert sums.value == pytest.approx(r2_score(truth[:, [0, 2]], predicted[:, [0, 2]]), abs=1e-12)


def test_a_target_that_does_not_vary_at_all_is_refused() -> None:
    still = np.full((60, 2), 0.25)
    assert not varying_dims(still).any()
    assert not varying_dims(np.zeros((60, 2))).any()
    with pytest.raises(DataError, match="varies over the held-out clips"):
        r2_sums(still, still, np.arange(60))


def test_resamples_that_miss_every_moving_episode_stay_finite() -> None:
    truth = np.zeros((20, 1))
    truth[:2, 0] = (1.0, -1.0)
    sums = r2_sums(truth, truth + 0.1, np.arange(10).repeat(2))
    assert np.isfinite(bootstrap_scores([sums], 500, seed=0)).all()


def test_accuracy_is_the_share_of_right_clips_with_an_interval_over_episodes() -> None:
    truth = np.array(["push", "reach"] * 20)
    predicted = truth.copy()
    predicted[:10] = "drawer"
    sums = accuracy_sums(truth, predicted, np.arange(8).repeat(5))
    estimate = interval(sums)
    assert sums.metric == "accuracy"
    assert estimate.value == pytest.approx(0.75)
    assert 0.25 < estimate.low < 0.75 < estimate.high <= 1.0
    assert sums.left_out == ()


def test_accuracy_intervals_cover_the_truth() -> None:
    covered = 0
    for run in range(300):
        random = np.random.default_rng([8, run])
        # An episode's own chance of a right answer is uniform in [0.4, 1]: the truth is 0.7.
        right = random.random(EPISODES * CLIPS) < random.uniform(0.4, 1, EPISODES).repeat(CLIPS)
        sums = accuracy_sums(np.ones_like(right), right, np.arange(EPISODES).repeat(CLIPS))
        estimate = interval(sums, resamples=400, seed=run)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.92 <= covered / 300 <= 0.98


def test_intervals_are_pure_in_the_seed() -> None:
    first, second = two_predictors(3)
    assert interval(first, 300, seed=1) == interval(first, 300, seed=1)
    assert interval(first, 300, seed=1) != interval(first, 300, seed=2)
    together = bootstrap_scores([first, second], 300, seed=1)
    assert np.array_equal(together[0], bootstrap_scores([first], 300, seed=1)[0])


def test_resampling_in_blocks_gives_as_many_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = two_predictors(4)
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 7 * EPISODES)
    in_blocks = bootstrap_scores([first], 100, seed=0)
    assert in_blocks.shape == (1, 100)
    assert np.array_equal(in_blocks, bootstrap_scores([first], 100, seed=0))
    assert abs(in_blocks.mean() - first.value) < 0.05


def test_two_thousand_resamples_take_milliseconds() -> None:
    first, second = two_predictors(5)
    started = time.process_time()
    for seed in range(5):
        paired_difference(first, second, resamples=2000, seed=seed)
    assert (time.process_time() - started) / 5 < 0.25


def test_one_episode_has_no_interval() -> None:
    truth, predicted, _ = some_predictions()
    with pytest.raises(DataError, match="at least 2 held-out episodes"):
        interval(r2_sums(truth, predicted, np.zeros(60, np.int64)))


def test_pairing_refuses_other_clips_and_another_truth() -> None:
    truth, predicted, episodes = some_predictions()
    sums = r2_sums(truth, predicted, episodes)
    others = (
        r2_sums(truth + np.arange(60)[:, None], predicted, episodes),
        r2_sums(truth, predicted, episodes + 1),
        dataclasses.replace(sums, metric="accuracy"),
    )
    for other in others:
        with pytest.raises(DataError, match="same clips"):
            paired_difference(sums, other)


def test_shapes_that_do_not_fit_are_refused() -> None:
    truth, predicted, episodes = some_predictions()
    with pytest.raises(DataError, match="do not fit a truth of shape"):
        r2_sums(truth, predicted[:, :2], episodes)
    with pytest.raises(DataError, match="59 episode numbers"):
        r2_sums(truth, predicted, episodes[:59])
    with pytest.raises(DataError, match="do not fit labels"):
        accuracy_sums(episodes, episodes[:3], episodes)
    first, _ = two_predictors(6)
    with pytest.raises(DataError, match="share their held-out episodes"):
        bootstrap_scores([first, r2_sums(truth, predicted, episodes)], 10, seed=0)
