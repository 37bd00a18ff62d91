"""Recall and average precision against a count by hand and against every possible order of the answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from salt_vla.errors import DataError
from salt_vla.evaluation.ranking import METRICS, Lookup, by_chance, ranked

NOBODY = np.full(1, -1)


def lookup(queries: list[int], gallery: list[int], own: list[int] | None = None) -> Lookup:
    asked = [-1] * len(queries) if own is None else own
    return Lookup(np.array(queries), np.array(gallery), np.array(asked))


def at_angles(degrees: list[float]) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1) * np.arange(1, len(degrees) + 1)[:, None]


def test_figures_by_hand() -> None:
    """From 0°: 10° (wrong), 20° (right), 30° (wrong), 40° (right): right at ranks 2 and 4."""
    found = ranked(at_angles([0]), at_angles([30, 20, 10, 40]), lookup([7], [1, 7, 2, 7]))
    assert {metric: value.tolist() for metric, value in found.items()} == {
        "recall_at_1": [0.0],
        "recall_at_5": [1.0],
        "mean_average_precision": [pytest.approx((1 / 2 + 2 / 4) / 2)],
    }


def test_planted_duplicates_are_always_found() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 8))
    found = ranked(rows, rows[::-1] * 3, lookup(list(range(300)), list(range(299, -1, -1))))
    assert all((found[metric] == 1).all() for metric in METRICS)


def test_average_precision_is_scikit_learns() -> None:
    random = np.random.default_rng(1)
    queries, gallery = random.normal(size=(40, 5)), random.normal(size=(90, 5))
    codes, classes = random.integers(0, 4, 40), random.integers(0, 4, 90)
    found = ranked(queries, gallery, Lookup(codes, classes, np.full(40, -1)))["mean_average_precision"]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, gallery)]
    expected = [
        average_precision_score(classes == code, near)
        for code, near in zip(codes, unit[0] @ unit[1].T, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_tie_is_no_win() -> None:
    """Features that have collapsed to a point find nothing, wherever the right answer stands in the table."""
    found = ranked(np.zeros((3, 4)), np.zeros((9, 4)), lookup([0, 4, 8], list(range(9))))
    assert found["recall_at_1"].tolist() == found["recall_at_5"].tolist() == [0, 0, 0]
    assert found["mean_average_precision"] == pytest.approx(1 / 9)


def test_nobody_finds_itself() -> None:
    rows = at_angles([0, 5, 90, 95])
    itself = lookup([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 2, 3])
    assert ranked(rows, rows, itself)["mean_average_precision"].tolist() == [1, 1, 1, 1]
    alone = lookup([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3])
    assert not any(values.any() for values in ranked(rows, rows, alone).values())
    assert alone.counts()[0].tolist() == [0, 0, 0, 0] and itself.counts()[1].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("right", "wrong"), [(1, 5), (2, 5), (3, 3), (6, 0), (1, 1)])
def test_chance_is_the_mean_over_all_orders(right: int, wrong: int) -> None:
    gallery = [1] * right + [0] * wrong
    found = by_chance(lookup([1], gallery))
    orders = np.array(sorted(set(itertools.permutations(gallery))))
    places = np.arange(1, len(gallery) + 1)
    precision = (orders * np.cumsum(orders, 1) / places).sum(1) / right
    assert found["recall_at_1"] == pytest.approx(orders[:, :1].any(1).mean())
    assert found["recall_at_5"] == pytest.approx(orders[:, :5].any(1).mean())
    assert found["mean_average_precision"] == pytest.approx(precision.mean())


def test_random_features_are_at_chance() -> None:
    random = np.random.default_rng(2)
    asked = Lookup(random.integers(0, 10, 4000), random.integers(0, 10, 60), np.full(4000, -1))
    found = ranked(random.normal(size=(4000, 16)), random.normal(size=(60, 16)), asked)
    for metric, expected in by_chance(asked).items():
        assert found[metric].mean() == pytest.approx(expected.mean(), abs=0.04), metric


def test_who_is_itself_in_the_gallery_has_one_answer_less() -> None:
    asked = lookup([1, 1, 2], [1, 1, 2, 2], [0, 1, -1])
    right, total = asked.counts()
    assert right.tolist() == [1, 1, 2] and total.tolist() == [3, 3, 4]
    assert by_chance(asked)["recall_at_1"] == pytest.approx([1 / 3, 1 / 3, 1 / 2])


def test_widths_must_agree() -> None:
    with pytest.raises(DataError, match="cannot be looked up"):
        ranked(np.zeros((1, 3)), np.zeros((1, 4)), Lookup(NOBODY, NOBODY, NOBODY))


def test_equal_answers_tie_wherever_they_stand() -> None:
    """A product of matrices rounds by place: two equal rows may come out unequal in the last bit."""
    random = np.random.default_rng(0)
    for _ in range(100):
        gallery = random.normal(size=(int(random.integers(20, 400)), int(random.integers(8, 800))))
        equal = [0, len(gallery) // 2, len(gallery) - 2, len(gallery) - 1]
        gallery[equal] = gallery[0]
        query = gallery[:1] + 0.01 * random.normal(size=gallery.shape[1])
        for right in equal:
            found = ranked(query, gallery, lookup([right], [*range(len(gallery))]))
            assert found["recall_at_1"] == 0
