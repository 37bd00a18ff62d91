"""The k-NN probe equals scikit-learn's with the same weights, and chooses k across episodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from salt_vla.errors import DataError
from salt_vla.evaluation import neighbours
from salt_vla.evaluation.neighbours import COUNTS, TEMPERATURE, NeighboursProbe
from salt_vla.evaluation.probes import Problem

TRAIN, TEST, DIMS = 200, 60, 8


def problem(seed: int = 0, spread: float = 0.6) -> tuple[Problem, dict[str, np.ndarray]]:
    """Four classes around directions of their own, and a quantity that turns with the direction."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 4, TRAIN + TEST)
    x = np.eye(4, DIMS)[kind] + spread * random.normal(size=(TRAIN + TEST, DIMS))
    targets = {"kind": np.array([f"c{k}" for k in kind]), "place": x[:, :2] @ random.normal(size=(2, 3))}
    cut = {name: y[:TRAIN] for name, y in targets.items()}
    given = Problem(
        "e", x[:TRAIN].astype(np.float32), x[TRAIN:].astype(np.float32), cut, np.arange(TRAIN) // 4, 0
    )
    return given, {name: y[TRAIN:] for name, y in targets.items()}


def test_it_equals_scikit_learns_at_the_chosen_count() -> None:
    given, truth = problem()
    fits = NeighboursProbe().fit(given)
    mean, scale = given.train.mean(0), given.train.std(0)
    train, test = ((side - mean) / scale for side in (given.train, given.test))

    def weigh(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    for name, kind in (("kind", KNeighborsClassifier), ("place", KNeighborsRegressor)):
        count = int(fits[name].note.split()[0])
        assert count in COUNTS and count > 1
        model = kind(count, weights=weigh, metric="cosine", algorithm="brute").fit(train, given.targets[name])
        expected = model.predict(test)
        if name == "kind":
            assert np.array_equal(fits[name].predicted, expected)
            shares = fits[name].shares
            assert shares is not None and np.allclose(shares, model.predict_proba(test), atol=1e-5)
            assert (expected == truth[name]).mean() > 0.5
        else:
            assert np.allclose(fits[name].predicted, expected, atol=1e-4)


def test_random_labels_stay_at_chance() -> None:
    given, _ = problem()
    random = np.random.default_rng(1)
    hits = []
    for seed in range(5):
        labels = random.choice(["a", "b"], TRAIN + TEST)
        fit = NeighboursProbe().fit(replace(given, targets={"y": labels[:TRAIN]}, seed=seed))["y"]
        hits.append((fit.predicted == labels[TRAIN:]).mean())
    assert abs(np.mean(hits) - 0.5) < 0.1  # 300 answers: a standard error of 2.9 points


def test_the_count_is_chosen_across_episodes() -> None:
    """Clips of an episode are near copies and share a label that says nothing: one neighbour is perfect
    within an episode and useless across episodes."""
    random = np.random.default_rng(0)
    episodes = np.arange(TRAIN) // 4
    noise = random.normal(size=(50, DIMS)).repeat(4, axis=0)
    common = random.choice([-1.0, 1.0], 50).repeat(4)
    x = noise + 0.01 * random.normal(size=(TRAIN, DIMS))
    x[:, :4] = 2 * common[:, None] + 0.1 * noise[:, :4]
    flipped = np.where(random.random(50) < 0.3, -1, 1).repeat(4)
    labels = np.where(common * flipped > 0, "up", "down")
    given = Problem("e", x.astype(np.float32), x[:4].astype(np.float32), {"y": labels}, episodes, 0)
    assert int(NeighboursProbe().fit(given)["y"].note.split()[0]) >= 5


def test_only_so_many_are_asked_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = problem()
    monkeypatch.setattr(neighbours, "CHOOSING_CLIPS", 50)
    asked = [rows for _, rows in neighbours._folds(given)]
    assert sum(map(len, asked)) == 50 and len(asked) == 5
    for fit_rows, rows in neighbours._folds(given):
        assert not set(given.episodes[fit_rows]) & set(given.episodes[rows])


def test_features_that_are_not_numbers_are_named() -> None:
    given, _ = problem()
    broken = given.train.copy()
    broken[3, 3] = np.inf
    with pytest.raises(DataError, match="features of encoder 'e' hold NaN or infinite"):
        NeighboursProbe().fit(replace(given, train=broken))


def test_a_feature_that_all_clips_share_does_not_blunt_the_cosine() -> None:
    given, truth = problem()
    plain = NeighboursProbe().fit(given)["kind"].predicted
    shifted = replace(given, train=given.train + 100, test=given.test + 100)
    moved = NeighboursProbe().fit(shifted)["kind"].predicted
    assert (moved == plain).mean() > 0.95 and (moved == truth["kind"]).mean() > 0.5
