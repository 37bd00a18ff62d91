"""Probes equal scikit-learn's in numbers, choose inside training episodes, and cannot be fed a leak."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from salt_vla.errors import DataError
from salt_vla.evaluation import classes as classifiers
from salt_vla.evaluation import probes
from salt_vla.evaluation.classes import logistic_probe
from salt_vla.evaluation.probes import (
    FOLDS,
    PENALTIES_PER_DIM,
    Basis,
    check_classes,
    check_split,
    fit_basis,
    ridge_probe,
)
from salt_vla.evaluation.statistics import r2_sums

TRAIN, TEST = 120, 60


def planted(dims: int, noise: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features, a target linear in them with noise, and episodes of 5 clips for both sides."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((TRAIN + TEST, dims)) * random.uniform(0.5, 2, dims) + 3
    weights = random.standard_normal((dims, 2)) / np.sqrt(dims)
    target = features @ weights + noise * random.standard_normal((TRAIN + TEST, 2)) + 7
    episodes = np.arange(TRAIN + TEST) // 5
    return features.astype(np.float32), target, episodes


def split(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return array[:TRAIN], array[TRAIN:]


def standardised(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train, test = (side.astype(np.float64) for side in split(features))
    return (train - train.mean(0)) / train.std(0), (test - train.mean(0)) / train.std(0)


def classes(shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of 6 classes whose means lie `shift` apart, episode by episode."""
    random = np.random.default_rng(seed)
    episodes = np.arange(TRAIN + TEST) // 5
    kind = episodes % 6
    features = random.standard_normal((TRAIN + TEST, 20))
    features[:, :6] += shift * np.eye(6)[kind]
    return features, np.array([f"task {k}" for k in kind]), episodes


@pytest.mark.parametrize("dims", [8, 300])
def test_ridge_equals_scikit_learns_at_the_chosen_penalty(dims: int) -> None:
    features, target, episodes = planted(dims, noise=0.5)
    basis = fit_basis("encoder", *split(features))
    fit = ridge_probe(basis, {"target": target[:TRAIN]}, episodes[:TRAIN])["target"]
    train, test = standardised(features)
    expected = Ridge(alpha=fit.alpha).fit(train, target[:TRAIN]).predict(test)
    assert np.allclose(fit.predicted, expected, atol=1e-8)


@pytest.mark.parametrize("dims", [8, 300])
def test_the_penalty_is_the_one_that_refitting_every_fold_would_choose(dims: int) -> None:
    features, target, episodes = planted(dims, noise=1.0)
    train, _ = standardised(features)
    truth = target[:TRAIN]
    basis = fit_basis("encoder", *split(features))
    scores = []
    for penalty in PENALTIES_PER_DIM * dims:
        left_out = np.zeros_like(truth)
        for rows, fold in GroupKFold(FOLDS).split(train, groups=episodes[:TRAIN]):
            left_out[fold] = Ridge(alpha=penalty).fit(train[rows], truth[rows]).predict(train[fold])
        scores.append((1 - ((truth - left_out) ** 2).sum(0) / (truth.var(0) * TRAIN)).mean())
    fit = ridge_probe(basis, {"target": truth}, episodes[:TRAIN])["target"]
    assert fit.alpha == pytest.approx((PENALTIES_PER_DIM * dims)[int(np.argmax(scores))])


def test_left_out_errors_equal_those_of_refitted_folds() -> None:
    features, target, episodes = planted(30, noise=1.0)
    train, _ = standardised(features)
    truth = target[:TRAIN]
    basis = fit_basis("encoder", *split(features))
    penalties = np.array([0.1, 10.0, 1000.0])
    errors = probes._left_out_errors(basis, truth - truth.mean(0), episodes[:TRAIN], penalties)
    for penalty, mine in zip(penalties, errors, strict=True):
        expected = np.zeros(2)
        for rows, fold in GroupKFold(FOLDS).split(train, groups=episodes[:TRAIN]):
            model = Ridge(alpha=penalty).fit(train[rows], truth[rows])
            expected += ((model.predict(train[fold]) - truth[fold]) ** 2).sum(0)
        assert np.allclose(mine, expected, rtol=1e-8)


@pytest.mark.parametrize("dims", [8, 300])
def test_the_basis_reproduces_the_standardised_features(dims: int) -> None:
    features, _, _ = planted(dims, noise=0.0)
    basis = fit_basis("encoder", *split(features))
    train, test = standardised(features)
    rotated = basis.train * np.sqrt(basis.power)
    assert np.allclose(rotated @ rotated.T, train @ train.T, atol=1e-7)
    assert np.allclose(basis.test @ rotated.T, test @ train.T, atol=1e-7)
    assert np.allclose(basis.train.T @ basis.train, np.eye(len(basis.power)), atol=1e-8)
    assert (np.diff(basis.power) <= 0).all()


@pytest.mark.parametrize("dims", [8, 60])
def test_a_planted_linear_signal_is_recovered(dims: int) -> None:
    features, target, episodes = planted(dims, noise=0.05)
    basis = fit_basis("encoder", *split(features))
    fit = ridge_probe(basis, {"target": target[:TRAIN]}, episodes[:TRAIN])["target"]
    assert r2_sums(target[TRAIN:], fit.predicted, episodes[TRAIN:]).value > 0.95


def test_permuted_targets_land_at_chance() -> None:
    features, target, episodes = planted(40, noise=0.05)
    shuffled = target[np.random.default_rng(1).permutation(len(target))]
    basis = fit_basis("encoder", *split(features))
    fit = ridge_probe(basis, {"target": shuffled[:TRAIN]}, episodes[:TRAIN])["target"]
    assert -0.15 < r2_sums(shuffled[TRAIN:], fit.predicted, episodes[TRAIN:]).value < 0.1


def test_targets_are_probed_as_if_each_were_alone() -> None:
    features, target, episodes = planted(30, noise=1.0)
    noise = np.random.default_rng(2).standard_normal((TRAIN, 3))
    basis = fit_basis("encoder", *split(features))
    together = ridge_probe(basis, {"signal": target[:TRAIN], "noise": noise}, episodes[:TRAIN])
    for name, values in (("signal", target[:TRAIN]), ("noise", noise)):
        alone = ridge_probe(basis, {name: values}, episodes[:TRAIN])[name]
        assert alone.alpha == together[name].alpha
        assert np.allclose(alone.predicted, together[name].predicted)
    assert together["signal"].alpha != together["noise"].alpha


def test_a_near_constant_feature_does_not_explode() -> None:
    features, target, episodes = planted(20, noise=0.1)
    features[:, 0] = 0.5
    features[:TRAIN, 0] += 1e-6 * np.arange(TRAIN)
    features[TRAIN, 0] = 1.5
    basis = fit_basis("pixels", *split(features))
    fit = ridge_probe(basis, {"target": target[:TRAIN]}, episodes[:TRAIN])["target"]
    assert np.abs(fit.predicted[0] - target[TRAIN]).max() < 5 * target.std()
    assert r2_sums(target[TRAIN:], fit.predicted, episodes[TRAIN:]).value > 0.8


def test_mostly_constant_features_are_floored_by_the_largest() -> None:
    features, target, episodes = planted(20, noise=0.1)
    padded = np.concatenate([features, np.full((TRAIN + TEST, 60), 0.25, np.float32)], axis=1)
    padded[TRAIN:, -1] += 0.01
    fit = ridge_probe(fit_basis("pixels", *split(padded)), {"target": target[:TRAIN]}, episodes[:TRAIN])
    assert r2_sums(target[TRAIN:], fit["target"].predicted, episodes[TRAIN:]).value > 0.9


@pytest.mark.parametrize("dims", [0, 4])
def test_without_varying_features_the_training_mean_is_predicted(dims: int) -> None:
    _, target, episodes = planted(3, noise=1.0)
    basis = fit_basis("constant", np.ones((TRAIN, dims)), np.ones((TEST, dims)))
    fit = ridge_probe(basis, {"target": target[:TRAIN]}, episodes[:TRAIN])["target"]
    assert fit.alpha is None
    assert np.allclose(fit.predicted, target[:TRAIN].mean(0))
    assert r2_sums(target[TRAIN:], fit.predicted, episodes[TRAIN:]).value <= 0


def test_a_target_constant_in_training_is_predicted_as_that_constant() -> None:
    features, target, episodes = planted(10, noise=1.0)
    still = np.full((TRAIN, 1), 4.0)
    basis = fit_basis("encoder", *split(features))
    fits = ridge_probe(basis, {"still": still, "target": target[:TRAIN]}, episodes[:TRAIN])
    assert np.allclose(fits["still"].predicted, 4.0)


def test_a_choice_at_the_grids_edge_is_said() -> None:
    features, target, episodes = planted(30, noise=1.0)
    basis = fit_basis("encoder", *split(features))
    nothing = np.random.default_rng(3).standard_normal((TRAIN, 40))
    fits = ridge_probe(basis, {"signal": target[:TRAIN], "nothing": nothing}, episodes[:TRAIN])
    assert fits["signal"].note == ""
    assert fits["nothing"].alpha == pytest.approx(PENALTIES_PER_DIM[0] * 30)
    assert "grid's strongest" in fits["nothing"].note


def test_a_noiseless_target_points_at_the_weak_edge() -> None:
    features, target, episodes = planted(8, noise=0.0)
    basis = fit_basis("encoder", *split(features))
    fit = ridge_probe(basis, {"target": target[:TRAIN]}, episodes[:TRAIN])["target"]
    assert fit.alpha == pytest.approx(PENALTIES_PER_DIM[-1] * 8)
    assert "grid's weakest" in fit.note


def test_no_probe_is_ever_handed_a_held_out_target() -> None:
    for function in (ridge_probe, logistic_probe):
        assert not [name for name in inspect.signature(function).parameters if "test" in name]


def test_held_out_features_do_not_change_the_fit() -> None:
    features, target, episodes = planted(30, noise=1.0)
    train, test = split(features)
    alone = ridge_probe(fit_basis("e", train, test[:1]), {"t": target[:TRAIN]}, episodes[:TRAIN])["t"]
    among = ridge_probe(fit_basis("e", train, test * 50), {"t": target[:TRAIN]}, episodes[:TRAIN])["t"]
    assert alone.alpha == among.alpha


def test_a_leaking_episode_is_named() -> None:
    check_split(np.array([1, 2, 3]), np.array([4, 5]))
    with pytest.raises(DataError, match=r"episode 3 has clips in both .* \(1 such"):
        check_split(np.array([1, 2, 3]), np.array([3, 4, 5]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_features_name_their_encoder(value: float) -> None:
    features, _, _ = planted(4, noise=1.0)
    train, test = split(features)
    test[3, 2] = value
    with pytest.raises(DataError, match="encoder 'student' hold NaN or infinite"):
        fit_basis("student", train, test)


def test_features_of_two_widths_name_their_encoder() -> None:
    with pytest.raises(DataError, match="'student' has 3 features in training but 4 held out"):
        fit_basis("student", np.ones((5, 3)), np.ones((5, 4)))


def test_one_training_episode_cannot_choose_a_penalty() -> None:
    features, target, _ = planted(4, noise=1.0)
    with pytest.raises(DataError, match="at least 2 training episodes"):
        ridge_probe(fit_basis("e", *split(features)), {"t": target[:TRAIN]}, np.zeros(TRAIN, np.int64))


def test_separated_classes_are_recognised() -> None:
    features, labels, episodes = classes(shift=8.0)
    fit = logistic_probe(fit_basis("e", *split(features)), labels[:TRAIN], episodes[:TRAIN], seed=0)
    assert (fit.predicted == labels[TRAIN:]).mean() > 0.95


def test_permuted_classes_land_at_chance() -> None:
    features, labels, episodes = classes(shift=8.0)
    shuffled = np.random.default_rng(4).permutation(labels[:TRAIN].reshape(-1, 5)[:, 0]).repeat(5)
    fit = logistic_probe(fit_basis("e", *split(features)), shuffled, episodes[:TRAIN], seed=0)
    assert (fit.predicted == labels[TRAIN:]).mean() < 0.45


@pytest.fixture
def logistic_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salt_vla.evaluation.classes.better", lambda logistic, ridge: logistic[0])


@pytest.mark.usefixtures("logistic_alone")
def test_the_classifier_equals_scikit_learns_on_the_leading_components() -> None:
    features, labels, episodes = classes(shift=2.0)
    basis = fit_basis("e", *split(features))
    fit = logistic_probe(basis, labels[:TRAIN], episodes[:TRAIN], seed=0)
    scale = np.sqrt(TRAIN / basis.power[0])
    model = LogisticRegression(C=1 / fit.alpha, max_iter=2000, tol=1e-6)
    model.fit(basis.train * np.sqrt(basis.power) * scale, labels[:TRAIN])
    assert (model.predict(basis.test * scale) == fit.predicted).mean() > 0.98


def test_the_classifier_is_pure_in_its_seed() -> None:
    features, labels, episodes = classes(shift=1.0)
    basis = fit_basis("e", *split(features))
    once, again = (logistic_probe(basis, labels[:TRAIN], episodes[:TRAIN], seed=5) for _ in range(2))
    assert once.alpha == again.alpha
    assert np.array_equal(once.predicted, again.predicted)


@pytest.mark.usefixtures("logistic_alone")
def test_wide_features_are_cut_to_128_components() -> None:
    random = np.random.default_rng(6)
    features = random.standard_normal((300, 400))
    kind = np.arange(300) // 5 % 3
    features[:, 0] += 60 * kind
    labels = np.array(["a", "b", "c"])[kind]
    basis = fit_basis("e", features[:200], features[200:])
    fit = logistic_probe(basis, labels[:200], np.arange(200) // 5, seed=0)
    cut = Basis("e", basis.train[:, :128], basis.power[:128], basis.test[:, :128], 400)
    assert len(basis.power) > 128
    assert np.array_equal(fit.predicted, logistic_probe(cut, labels[:200], np.arange(200) // 5, 0).predicted)


def test_without_features_the_most_frequent_class_is_named() -> None:
    labels = np.array(["push"] * 3 + ["reach"] * 5)
    basis = fit_basis("constant", np.zeros((8, 0)), np.zeros((2, 0)))
    assert logistic_probe(basis, labels, np.arange(8), seed=0).predicted.tolist() == ["reach", "reach"]


def test_too_few_episodes_a_class_leave_the_penalty_unchosen_and_say_so() -> None:
    features = np.random.default_rng(7).standard_normal((10, 4))
    labels = np.array(["push"] * 5 + ["reach"] * 5)
    basis = fit_basis("e", features, features)
    fit = logistic_probe(basis, labels, np.arange(10) // 5, seed=0)
    assert "not chosen" in fit.note


def test_a_rare_class_and_a_hard_fit_raise_no_warning() -> None:
    features, labels, episodes = classes(shift=1.0)
    labels = labels[:TRAIN].copy()
    labels[0] = "rare"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logistic_probe(fit_basis("e", *split(features)), labels, episodes[:TRAIN], seed=0)


def test_a_class_missing_in_training_is_named() -> None:
    check_classes("task", np.array(["push", "reach"]), np.array(["push"]))
    with pytest.raises(DataError, match="target 'task': class 'drawer' occurs in held-out clips"):
        check_classes("task", np.array(["push", "reach"]), np.array(["drawer", "push"]))
    with pytest.raises(DataError, match="single class in training"):
        check_classes("task", np.array(["push"]), np.array(["push"]))


def test_many_clips_take_one_fold_and_single_precision_and_find_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels, episodes = classes(shift=4)
    basis = fit_basis("e", *split(features))
    small = logistic_probe(basis, labels[:TRAIN], episodes[:TRAIN], 0)
    monkeypatch.setattr(classifiers, "LARGE", 50)
    large = logistic_probe(basis, labels[:TRAIN], episodes[:TRAIN], 0)
    assert "penalty chosen on one fold" in large.note and "fold" not in small.note
    assert (large.predicted == labels[TRAIN:]).mean() > 0.85
    assert (large.predicted == small.predicted).mean() > 0.9
    assert large.shares is not None and np.allclose(large.shares.sum(1), 1, atol=1e-5)


def test_features_beyond_the_memory_are_refused_before_they_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, _, _ = planted(8, 0.1)
    monkeypatch.setattr(probes, "COPIES", 10**12)
    with pytest.raises(DataError, match=r"120 clips × 8 features needs about .* GB of memory; keep fewer"):
        fit_basis("e", *split(features))
