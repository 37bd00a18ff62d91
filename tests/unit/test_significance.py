"""P-values are uniform where nothing is to be found, exact for few episodes, and corrected for several."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from salt_vla.errors import DataError
from salt_vla.evaluation.probing import ProbeSet, probe_suite, run_probe_suite
from salt_vla.evaluation.significance import EXACT_EPISODES, holm, sign_flip_p_value
from salt_vla.evaluation.statistics import EpisodeSums, r2_sums, share_sums

CLIPS = 3


def two(run: int, episodes: int, worse: float = 0.0) -> tuple[EpisodeSums, EpisodeSums]:
    """Two predictors of one truth; the second errs by so much more."""
    random = np.random.default_rng([1, run])
    numbers = np.arange(episodes).repeat(CLIPS)
    truth = random.standard_normal((episodes * CLIPS, 2))
    errors = [
        random.standard_normal((episodes, 2)).repeat(CLIPS, axis=0) * size for size in (0.5, 0.5 + worse)
    ]
    first, second = (r2_sums(truth, truth + error, numbers) for error in errors)
    return first, second


def test_few_episodes_are_counted_exactly() -> None:
    first, second = two(0, 6)
    parts = second.shares() - first.shares()
    outcomes = [abs(np.dot(signs, parts)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.array(outcomes) >= abs(parts.sum()) - 1e-12)
    assert sign_flip_p_value(first, second) == pytest.approx(expected)
    assert sign_flip_p_value(second, first) == pytest.approx(expected)


@pytest.mark.parametrize("episodes", [10, 40])
def test_p_is_uniform_between_equals(episodes: int) -> None:
    p = [sign_flip_p_value(*two(run, episodes)) for run in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) < 0.05) < 0.08


@pytest.mark.parametrize("episodes", [EXACT_EPISODES, 40, 1200])
def test_a_predictor_that_is_worse_in_every_episode_is_found(episodes: int) -> None:
    assert sign_flip_p_value(*two(2, episodes, worse=2.0)) < 0.01


def test_drawn_flips_and_the_normal_law_agree() -> None:
    first, second = two(3, 900, worse=0.01)
    parts = second.shares() - first.shares()
    expected = 2 * stats.norm.sf(abs(parts.sum()) / np.sqrt((parts**2).sum()))
    assert sign_flip_p_value(first, second) == pytest.approx(expected, abs=0.02)


def test_a_predictor_does_not_differ_from_itself() -> None:
    first, _ = two(4, 20)
    assert sign_flip_p_value(first, first) == 1.0


def test_other_episodes_are_refused() -> None:
    with pytest.raises(DataError, match="same held-out episodes"):
        sign_flip_p_value(two(5, 8)[0], two(5, 9)[0])


def test_few_wins_of_equal_size_are_the_sign_test() -> None:
    numbers = np.arange(8)
    first = share_sums("accuracy", np.ones(8), numbers)
    second = share_sums("accuracy", np.array([0, 0, 0, 0, 0, 0, 0, 1.0]), numbers)
    assert sign_flip_p_value(first, second) == pytest.approx(2 / 2**7)


def sides(run: int, permuted: bool, episodes: int = 24) -> tuple[ProbeSet, ProbeSet]:
    """Two encoders that each see the hidden state with noise of their own. `permuted`: targets come from
    other episodes."""
    random = np.random.default_rng([6, run])
    found = []
    for start in (0, 1000):
        numbers = np.arange(start, start + episodes).repeat(CLIPS)
        hidden = random.standard_normal((episodes, 3)).repeat(CLIPS, axis=0)
        hidden += 0.3 * random.standard_normal(hidden.shape)
        features = {
            name: np.tile(hidden, 2) + random.standard_normal((len(numbers), 6)) for name in ("a", "random")
        }
        order = random.permutation(episodes) if permuted else np.arange(episodes)
        moved = hidden.reshape(episodes, CLIPS, 3)[order].reshape(hidden.shape)
        task = np.array(["push", "reach"])[(moved[:, 0].reshape(-1, CLIPS).mean(1) > 0).astype(int)]
        found.append(ProbeSet(features, {"hand": moved[:, :2], "task": task.repeat(CLIPS)}, numbers))
    return found[0], found[1]


def of_target(sets: tuple[ProbeSet, ProbeSet], name: str) -> tuple[ProbeSet, ProbeSet]:
    first, second = (replace(side, targets={name: side.targets[name]}) for side in sets)
    return first, second


def test_with_labels_permuted_by_episode_the_whole_path_finds_nothing() -> None:
    values, p = [], []
    for run in range(60):
        result = run_probe_suite("null", *of_target(sides(run, permuted=True), "hand"), seed=run)
        values += [row.value for row in result.rows if row.encoder == "a"]
        p += [pair.p for pair in result.comparisons]
    assert len(values) == len(p) == 60
    assert np.mean(values) <= 0.0
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_with_classes_permuted_by_episode_accuracy_is_at_chance() -> None:
    right = np.array(
        [
            one.sums.value
            for run in range(10)
            for one in probe_suite("null", *of_target(sides(run, permuted=True), "task"), seed=run)
            if one.encoder != "constant"
        ]
    )
    assert abs(right.mean() - 0.5) < 3 * right.std() / np.sqrt(len(right))


def test_with_the_true_labels_the_same_path_finds_them() -> None:
    found = {
        (one.encoder, one.target): one.sums.value
        for one in probe_suite("true", *sides(0, permuted=False), seed=0)
    }
    assert found["a", "hand"] > 0.5
    assert found["a", "task"] > 0.7


def test_holm_is_computed_over_the_targets_on_which_two_are_compared() -> None:
    result = run_probe_suite("true", *sides(1, permuted=False), seed=0)
    pairs = [pair for pair in result.comparisons if (pair.encoder, pair.against) == ("a", "random")]
    assert {pair.target for pair in pairs} == {"hand", "task"}
    p = [pair.p for pair in pairs]
    assert None not in p
    smaller, larger = sorted(each or 0.0 for each in p)
    corrected = sorted(pair.p_holm or 0.0 for pair in pairs)
    assert corrected == pytest.approx([min(1.0, 2 * smaller), max(min(1.0, 2 * smaller), larger)])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
