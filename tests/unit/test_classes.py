"""Many hard classes are read at least as well as class means read them, and shares say how sure that is."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from salt_vla.evaluation import classes
from salt_vla.evaluation.classes import logistic_probe
from salt_vla.evaluation.probes import Basis, fit_basis

CLASSES, DIMS = 30, 100


@pytest.fixture(autouse=True)
def few_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many a share of all as 128 are of thousands."""
    monkeypatch.setattr(classes, "LOGISTIC_DIMS", 16)


def hard_classes(seed: int = 0, clips: int = 10) -> tuple[np.ndarray, ...]:
    """Classes whose means lie apart in all of many directions of equal noise: no few of them hold much."""
    random = np.random.default_rng(seed)
    means = 0.35 * random.standard_normal((CLASSES, DIMS))
    kinds = [np.repeat(np.arange(CLASSES), clips), np.repeat(np.arange(CLASSES), 10)]
    train, test = (means[kind] + random.standard_normal((len(kind), DIMS)) for kind in kinds)
    names = np.array([f"class {number:02d}" for number in range(CLASSES)])
    return train, names[kinds[0]], test, names[kinds[1]], random.permutation(len(train))


def of_means(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    mean, deviation = train.mean(0), train.std(0)
    return NearestCentroid().fit((train - mean) / deviation, labels).predict((test - mean) / deviation)


def test_hard_classes_are_read_as_well_as_their_means_do() -> None:
    train, labels, test, truth, episodes = hard_classes()
    fit = logistic_probe(fit_basis("e", train, test), labels, episodes, 0)
    mine, means = (fit.predicted == truth).mean(), (of_means(train, labels, test) == truth).mean()
    assert means > 0.15, "chance is 0.033"
    assert mine >= means - 0.03, "300 held-out clips: how two such shares differ by chance"
    assert "ridge on all components" in fit.note


def test_the_leading_components_alone_read_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other test is good for."""
    monkeypatch.setattr(classes, "better", lambda logistic, ridge: logistic[0])
    train, labels, test, truth, episodes = hard_classes()
    fit = logistic_probe(fit_basis("e", train, test), labels, episodes, 0)
    assert (fit.predicted == truth).mean() < 0.75 * (of_means(train, labels, test) == truth).mean()


def test_a_class_between_two_others_is_read_by_logistic_regression() -> None:
    """Ridge of the classes would never name it (Hastie, Tibshirani and Buja 1994: it is masked)."""
    random = np.random.default_rng(1)
    labels = np.tile(["left", "middle", "right"], 60)
    place = np.tile([-1.0, 0.0, 1.0], 60) + 0.1 * random.standard_normal(180)
    clips = place[:, None] * random.standard_normal((1, 20)) + 0.01 * random.standard_normal((180, 20))
    fit = logistic_probe(fit_basis("e", clips[:90], clips[90:]), labels[:90], np.arange(90) // 3, 0)
    assert "ridge" not in fit.note and (fit.predicted == labels[90:]).mean() > 0.95


def test_shares_are_as_sure_as_left_out_clips_bear_out() -> None:
    """Softmax of scores: in all, a clip's own class gets about the share of clips that are right."""
    train, labels, test, truth, episodes = hard_classes(clips=20)
    fit = logistic_probe(fit_basis("e", train, test), labels, episodes, 0)
    assert fit.shares is not None and fit.classes is not None
    assert np.allclose(fit.shares.sum(1), 1) and np.array_equal(fit.classes, np.unique(labels))
    assert np.array_equal(fit.classes[fit.shares.argmax(1)], fit.predicted)
    sure, right = fit.shares.max(1).mean(), (fit.predicted == truth).mean()
    assert right / 2 < sure < right * 2


def test_ridge_scores_of_left_out_folds_are_those_of_refitting() -> None:
    """The rival is chosen by what it says of clips it was not fitted to."""
    random = np.random.default_rng(3)
    train = random.standard_normal((60, 8))
    labels = np.array(["a", "b", "c"])[np.arange(60) % 3]
    basis = fit_basis("e", train, train)
    assert isinstance(basis, Basis)
    said = (labels[:, None] == np.array(["a", "b", "c"])).astype(float)
    fold = np.arange(0, 60, 5)
    rest = np.setdiff1d(np.arange(60), fold)
    residuals = classes.left_out_residuals(
        basis, said - said.mean(0), basis.train.T @ (said - said.mean(0)), fold, np.array([4.0])
    )
    x = (train - train.mean(0)) / train.std(0)
    centred = x[rest] - x[rest].mean(0)
    weights = np.linalg.solve(centred.T @ centred + 4 * np.eye(8), centred.T @ said[rest])
    expected = (x[fold] - x[rest].mean(0)) @ weights + said[rest].mean(0)
    assert np.allclose(said[fold] - residuals[0], expected)
