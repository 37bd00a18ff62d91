"""Relative accuracy by hand-computed cases: ties, scenes of several sizes, intervals, chance, bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from salt_vla.errors import DataError
from salt_vla.evaluation.intphys2 import chance_p_value, relative_accuracy


def test_share_of_pairs_in_which_the_possible_film_surprises_less() -> None:
    value, low, high = relative_accuracy([0.1, 0.2, 0.3, 0.9], [0.2, 0.3, 0.4, 0.1])
    assert value == 0.75
    assert 0 <= low < value < high <= 1


def test_a_tie_is_not_a_win() -> None:
    assert relative_accuracy([1.0, 1.0, 1.0], [1.0, 2.0, 1.0])[0] == pytest.approx(1 / 3)
    assert relative_accuracy([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0)


def test_every_pair_counts_once_however_large_its_scene_is() -> None:
    # Scene a: 3 pairs, all won; scene b: one pair, lost. Not the mean of scenes, which would be 0.5.
    value, *_ = relative_accuracy([0, 0, 0, 1], [1, 1, 1, 0], ["a", "a", "a", "b"])
    assert value == 0.75


def test_interval_resamples_whole_scenes() -> None:
    # Two scenes, one won and one lost throughout: a resample holds none, one or two of either.
    groups = [0] * 50 + [1] * 50
    possible, impossible = np.zeros(100), np.repeat([1.0, -1.0], 50)
    assert relative_accuracy(possible, impossible, groups) == (0.5, 0.0, 1.0)
    alone = relative_accuracy(possible, impossible)
    assert 0.39 < alone[1] < 0.42
    assert 0.58 < alone[2] < 0.61


def test_interval_of_unequal_scenes_weighs_pairs() -> None:
    # Resamples of {3 won, 1 lost}: all won (1), all lost (0), or both scenes (3 of 4).
    _, low, high = relative_accuracy([0, 0, 0, 1], [1, 1, 1, 0], [5, 5, 5, 9])
    assert (low, high) == (0.0, 1.0)


def test_one_scene_says_nothing_of_others() -> None:
    assert relative_accuracy([1, 2], [2, 3], ["only", "only"]) == (1.0, 0.0, 1.0)


def test_the_same_call_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    possible, impossible = rng.random(60), rng.random(60)
    assert relative_accuracy(possible, impossible) == relative_accuracy(list(possible), list(impossible))


def test_groups_may_be_of_any_kind() -> None:
    possible, impossible = [0, 0, 1, 1], [1, 1, 0, 2]
    names = relative_accuracy(possible, impossible, ["s1", "s1", "s2", "s2"])
    assert names == relative_accuracy(possible, impossible, np.array([7, 7, 100, 100]))
    assert names == relative_accuracy(
        possible, impossible, [("Main", 1), ("Main", 1), ("Main", 2), ("Main", 2)]
    )
    assert names == relative_accuracy(possible, impossible, [1, 1, "1", "1"])
    with pytest.raises(DataError, match="one name, number or tuple"):
        relative_accuracy(possible, impossible, [["a"], ["a"], ["b"], ["b"]])


def test_chance_covers_half_at_the_published_size() -> None:
    """506 pairs of 253 scenes: the standard error that the facts name is 2.2 points."""
    rng = np.random.default_rng(3)
    value, low, high = relative_accuracy(rng.random(506), rng.random(506), np.repeat(np.arange(253), 2))
    assert low < 0.5 < high
    assert (high - low) / 3.92 == pytest.approx(0.022, abs=0.003)
    assert value == pytest.approx(0.5, abs=0.07)


def flipped(possible: list[float], impossible: list[float], groups: list[int]) -> float:
    """The p-value by trying every swap of labels, scene by scene."""
    pairs = list(zip(possible, impossible, groups, strict=True))
    names = sorted(set(groups))

    def balance(signs: dict[int, int]) -> int:
        return sum(signs[g] * ((p < i) - (p > i)) for p, i, g in pairs)

    observed = balance(dict.fromkeys(names, 1))
    swaps = [dict(zip(names, s, strict=True)) for s in itertools.product((1, -1), repeat=len(names))]
    return sum(balance(signs) >= observed for signs in swaps) / len(swaps)


@pytest.mark.parametrize("seed", range(6))
def test_chance_is_counted_as_by_trying_every_swap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = sorted(rng.integers(0, 7, 14).tolist())
    possible, impossible = (rng.integers(0, 4, 14).astype(float).tolist() for _ in "ab")
    assert chance_p_value(possible, impossible, groups) == pytest.approx(
        flipped(possible, impossible, groups)
    )


def test_without_scenes_it_is_the_sign_test() -> None:
    assert chance_p_value([0] * 5, [1] * 5) == 1 / 32
    assert chance_p_value([0, 0, 0, 1], [1, 1, 1, 0]) == pytest.approx(5 / 16)
    # Ties tell nothing for either side.
    assert chance_p_value([0] * 5 + [1, 1], [1] * 5 + [1, 1]) == 1 / 32
    assert chance_p_value([1, 1], [1, 1]) == 1.0


def test_pairs_of_a_scene_are_no_further_evidence() -> None:
    assert chance_p_value([0] * 6, [1] * 6, [0, 0, 1, 1, 2, 2]) == 1 / 8


def test_p_values_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 2)
    found = [chance_p_value(rng.random(60), rng.random(60), groups) for _ in range(400)]
    assert np.mean(np.array(found) <= 0.05) <= 0.08


def test_many_scenes_stay_exact() -> None:
    p = chance_p_value(np.zeros(506), np.ones(506), np.repeat(np.arange(253), 2))
    assert p == pytest.approx(2.0**-253, rel=1e-6)


@pytest.mark.parametrize(
    ("possible", "impossible", "groups", "said"),
    [
        ([], [], None, "at least one pair"),
        ([1.0], [1.0, 2.0], None, "1 possible and 2 impossible"),
        ([1.0, 2.0], [1.0, 2.0], ["a"], "with 1 groups"),
        ([1.0, float("nan")], [1.0, 2.0], None, "possible film of pair 1 is nan"),
        ([1.0], [float("inf")], None, "impossible film of pair 0 is inf"),
        ([[1.0]], [[2.0]], None, "one number a pair"),
        (["high"], ["low"], None, "must be numbers"),
    ],
)
def test_bad_input_is_a_sentence(possible: list, impossible: list, groups: list | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        relative_accuracy(possible, impossible, groups)
    with pytest.raises(DataError, match=said):
        chance_p_value(possible, impossible, groups)


def test_it_needs_no_torch() -> None:
    code = "import sys; import salt_vla.evaluation.intphys2; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
