"""Intervals cover what they promise, pairing narrows them, and R² is what its definition says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from salt_vla.errors import DataError
from salt_vla.evaluation.results import Scored, tabulate
from salt_vla.evaluation.significance import sign_flip_p_value
from salt_vla.evaluation.statistics import (
    LOWEST_R2,
    MIN_EPISODES_FOR_CLAIMS,
    EpisodeSums,
    Estimate,
    accuracy_sums,
    auroc_sums,
    interval,
    joint_interval,
    paired_difference,
    r2_sums,
    share_sums,
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


def uneven(random: np.random.Generator, episodes: int) -> np.ndarray:
    """Each clip's episode: 1 to 8 clips in every one."""
    return np.arange(episodes).repeat(random.integers(1, 9, episodes))


def spread_out(random: np.random.Generator, numbers: np.ndarray, scale: float) -> np.ndarray:
    """As `clustered`, for episodes of uneven size."""
    shared = random.standard_normal((numbers[-1] + 1, DIMS))[numbers]
    return scale * np.sqrt(0.5) * (shared + random.standard_normal(shared.shape))


def one_r2(random: np.random.Generator, episodes: int) -> tuple[Estimate, float]:
    numbers = uneven(random, episodes)
    truth, error = spread_out(random, numbers, 1.0), spread_out(random, numbers, 0.5)
    return interval(r2_sums(truth, truth + error, numbers)), 0.75


def one_difference(random: np.random.Generator, episodes: int) -> tuple[Estimate, float]:
    numbers = uneven(random, episodes)
    truth, error, more = (spread_out(random, numbers, scale) for scale in (1.0, 0.5, 0.3))
    pair = (r2_sums(truth, truth + each, numbers) for each in (error, error + more))
    return paired_difference(*pair), 0.09


def one_accuracy(random: np.random.Generator, episodes: int) -> tuple[Estimate, float]:
    numbers = uneven(random, episodes)
    right = random.random(len(numbers)) < random.beta(2, 1, episodes)[numbers]
    return interval(accuracy_sums(np.ones_like(right), right, numbers)), 2 / 3


def one_high_accuracy(random: np.random.Generator, episodes: int) -> tuple[Estimate, float]:
    numbers = uneven(random, episodes)
    right = random.random(len(numbers)) < random.beta(9, 1, episodes)[numbers]
    return interval(share_sums("accuracy", right, numbers)), 0.9


def one_relative_accuracy(random: np.random.Generator, episodes: int) -> tuple[Estimate, float]:
    numbers = np.arange(episodes).repeat(2)
    right = random.random(len(numbers)) < random.uniform(0.25, 0.85, episodes)[numbers]
    return interval(share_sums("relative_accuracy", right, numbers)), 0.55


@pytest.mark.parametrize("episodes", [20, 60, 120])
@pytest.mark.parametrize(
    "draw", [one_r2, one_difference, one_accuracy, one_high_accuracy, one_relative_accuracy]
)
def test_a_95_percent_interval_covers_the_truth_93_to_97_times_in_100(
    draw: Callable[[np.random.Generator, int], tuple[Estimate, float]],
    episodes: int,
    times: Callable[[int, int], int],
) -> None:
    runs = times(1000, 20_000)
    covered = 0
    for run in range(runs):
        estimate, truth = draw(np.random.default_rng([9, episodes, run]), episodes)
        covered += estimate.low <= truth <= estimate.high
    assert 0.93 <= covered / runs <= 0.97


@pytest.mark.parametrize("draw", [one_r2, one_difference, one_accuracy])
def test_at_ten_episodes_the_fewest_for_claims_intervals_still_cover(
    draw: Callable[[np.random.Generator, int], tuple[Estimate, float]],
) -> None:
    estimates = [draw(np.random.default_rng([10, run]), 10) for run in range(500)]
    assert np.mean([each.low <= truth <= each.high for each, truth in estimates]) >= 0.92


def test_an_interval_is_students_with_the_jackknifes_error() -> None:
    first, second = two_predictors(0)
    without = np.array([first.score(w)[0] - second.score(w)[0] for w in 1 - np.eye(EPISODES)[:, None]])
    error = np.sqrt((EPISODES - 1) ** 2 / EPISODES) * without.std(ddof=1)
    found = paired_difference(first, second)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    few, many = (stats.t.ppf(0.975, freedom) * error for freedom in (EPISODES - 1, 5))
    assert few * (1 - 1e-9) <= found.high - found.value <= many


def test_leaving_one_episode_out_equals_scoring_without_it() -> None:
    truth, predicted, episodes = some_predictions()
    right = np.abs(truth - predicted)[:, 0] < 1
    for sums in (r2_sums(truth, predicted, episodes), share_sums("accuracy", right, episodes)):
        np.testing.assert_allclose(sums.left_one_out(), sums.score(1 - np.eye(12)), atol=1e-12)


def test_shares_of_the_episodes_add_up_to_what_is_missing() -> None:
    truth, predicted, episodes = some_predictions()
    for sums in (r2_sums(truth, predicted, episodes), accuracy_sums(episodes % 3, episodes % 2, episodes)):
        assert 1 - sums.shares().sum() == pytest.approx(sums.value, abs=1e-12)


def test_all_right_is_not_certain_and_all_wrong_neither() -> None:
    numbers = np.arange(20).repeat(3)
    for right, low, high in (
        (1.0, stats.beta.ppf(0.025, 20, 1), 1.0),
        (0.0, 0.0, stats.beta.ppf(0.975, 1, 20)),
    ):
        found = interval(share_sums("accuracy", np.full(60, right), numbers))
        assert (found.value, found.low, found.high) == pytest.approx((right, low, high))


@pytest.mark.parametrize(("episodes", "each"), [(2, 0.5), (20, 0.75)])
def test_episodes_that_score_alike_are_not_certain_either(episodes: int, each: float) -> None:
    """Two scenes with one of two pairs right each say nothing sharp about the share."""
    numbers = np.arange(episodes).repeat(4)
    right = np.tile(np.arange(4) < 4 * each, episodes)
    found = interval(share_sums("relative_accuracy", right, numbers))
    count = each * episodes
    expected = stats.beta.ppf([0.025, 0.975], [count, count + 1], [episodes - count + 1, episodes - count])
    assert (found.value, found.low, found.high) == pytest.approx((each, *expected))
    assert found.low < each < found.high


def areas(k: int, repeat: int, events: int) -> list[EpisodeSums]:
    """Of two predictors that know nothing, where something happens once in `events` of 60 episodes."""
    random = np.random.default_rng([k, repeat])
    truth = np.zeros((60, 4))
    truth[random.permutation(60)[:events], 0] = 1
    numbers = np.arange(60).repeat(4)
    return [auroc_sums(truth.reshape(-1, 1), random.standard_normal((240, 1)), numbers) for _ in range(2)]


@pytest.mark.parametrize("events", [1, 2, 4, 12])
def test_an_area_is_no_surer_than_the_few_episodes_where_it_happens(events: int) -> None:
    held, differ = [], []
    for repeat in range(120):
        first, second = areas(1, repeat, events)
        assert first.support == events
        estimate, gap = interval(first), paired_difference(first, second)
        held.append(estimate.low <= 0.5 <= estimate.high and gap.low <= 0 <= gap.high)
        differ.append(sign_flip_p_value(first, second) < 0.05)
        assert gap.low >= -1 and gap.high <= 1, "nor does any end leave what a difference can be"
    assert np.mean(held) > 0.85, "of both at once 90 %, less two standard errors"
    assert np.mean(differ) <= (0.12 if events >= MIN_EPISODES_FOR_CLAIMS else 0)


def test_nothing_is_claimed_of_areas_that_few_episodes_decide() -> None:
    """One event that one of the two ranks first, the other last: as far apart as can be."""
    truth, numbers = np.zeros((80, 1)), np.arange(20).repeat(4)
    truth[0] = 1
    scored = [
        Scored(name, "s", "t", auroc_sums(truth, sign * truth, numbers))
        for name, sign in (("student", 1), ("random", -1))
    ]
    (result,) = tabulate(scored, 0)
    (gap,) = result.comparisons
    assert (gap.difference, gap.apart, gap.p) == (1.0, False, 1.0)


@pytest.mark.parametrize(("episodes", "first", "second"), [(20, 1.0, 0.0), (10, 1.0, 0.5), (12, 1.0, 1.0)])
def test_episodes_that_differ_alike_are_not_certain_either(
    episodes: int, first: float, second: float
) -> None:
    """As many others as could have been missed may differ by all that there is."""
    numbers = np.arange(episodes).repeat(2)
    sums = [share_sums("accuracy", np.full(2 * episodes, share), numbers) for share in (first, second)]
    found, gap = paired_difference(*sums), first - second
    missed = 1 - 0.025 ** (1 / episodes)
    ends = ((1 - missed) * gap - missed, (1 - missed) * gap + missed)
    assert (found.value, found.low, found.high) == pytest.approx((gap, *ends))
    assert found.apart == (gap > 0)


def test_ends_stay_where_a_metric_can_be() -> None:
    random = np.random.default_rng(11)
    for _ in range(50):
        numbers = uneven(random, 2)
        right = random.random(len(numbers)) < 0.9
        share = interval(share_sums("accuracy", right, numbers))
        assert 0 <= share.low <= share.value <= share.high <= 1
        truth = spread_out(random, numbers, 1.0)
        if len(numbers) > 2:
            found = interval(r2_sums(truth, truth + spread_out(random, numbers, 3.0), numbers))
            assert LOWEST_R2 <= found.low <= found.value <= found.high <= 1


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
    paired, ones, others = paired_difference(first, second), interval(first), interval(second)
    unpaired = np.hypot(ones.high - ones.low, others.high - others.low)
    assert paired.high - paired.low < 0.7 * unpaired
    assert paired.apart


def test_a_paired_difference_is_the_difference_of_the_values_and_changes_sign() -> None:
    first, second = two_predictors(1)
    forward, backward = paired_difference(first, second), paired_difference(second, first)
    assert forward.value == pytest.approx(first.value - second.value)
    assert (backward.value, backward.low, backward.high) == pytest.approx(
        (-forward.value, -forward.high, -forward.low)
    )


def test_a_predictor_does_not_differ_from_itself() -> None:
    first, _ = two_predictors(2)
    assert paired_difference(first, first) == Estimate(0.0, 0.0, 0.0)
    assert not paired_difference(first, first).apart


@pytest.mark.parametrize("constant", [0.0, 0.3, -2.0])
def test_a_constant_predictor_is_at_most_zero_whoever_is_left_out(constant: float) -> None:
    truth = clustered(np.random.default_rng(6), 1.0)
    sums = r2_sums(truth, np.full_like(truth, constant), np.arange(EPISODES).repeat(CLIPS))
    assert sums.value <= 0
    assert (sums.left_one_out() <= 1e-12).all()


def test_a_perfect_predictor_is_one_and_no_less() -> None:
    truth, _, episodes = some_predictions()
    estimate = interval(r2_sums(truth, truth, episodes))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-8)


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


def test_figures_without_the_only_moving_episode_stay_finite() -> None:
    truth = np.zeros((20, 1))
    truth[:2, 0] = (1.0, -1.0)  # All of episode 0.
    sums = r2_sums(truth, truth + 0.1, np.arange(10).repeat(2))
    assert np.isfinite(sums.left_one_out()).all()
    found = interval(sums)
    assert np.isfinite([found.low, found.high]).all()


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


def test_intervals_are_pure_functions() -> None:
    first, second = two_predictors(3)
    assert interval(first) == interval(first)
    assert paired_difference(first, second) == paired_difference(first, second)


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
        joint_interval([first, r2_sums(truth, predicted, episodes)])


def test_what_tables_show_as_zero_is_claimed_by_nobody() -> None:
    assert Estimate(0.0006, 0.0002, 0.0009).apart and Estimate(-0.0006, -0.0009, -0.0002).apart
    assert not Estimate(0.0004, 0.0002, 0.0006).apart
    assert not Estimate(0.2, -0.1, 0.5).apart
