"""Linear classifiers: logistic regression on leading components, or ridge on all where that reads more.

Everything is chosen on left-out training episodes. Knows components and left-out scores; neither encoders nor
where features lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from salt_vla.evaluation.probes import (
    FOLDS,
    LARGE,
    PENALTIES_PER_DIM,
    Basis,
    ProbeFit,
    edge_note,
    left_out_residuals,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

    Split = tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " fold"]]
    # For some penalties: rows of a left-out fold, and their scores of all classes under each penalty.
    LeftOut = Callable[
        [Float[np.ndarray, " penalties"]],
        Iterable[tuple[Int64[np.ndarray, " rows"], Float[np.ndarray, "penalties rows classes"]]],
    ]

# Inverse penalties of the logistic probe on components scaled so that the first has unit variance.
LOGISTIC_C = np.logspace(-3, 3, 7)
LOGISTIC_DIMS = 128
LOGISTIC_STEPS = 300
# With more clips than `LARGE`: more components, one fold instead of five, penalties from strong to weak each
# started where the last one ended, single precision. 174 classes of 168,000 clips are else days of work.
LARGE_DIMS, LARGE_STEPS = 512, 100
SHARPNESS = np.logspace(-1, 1.5, 26)


def logistic_dims(clips: int) -> int:
    return LARGE_DIMS if clips > LARGE else LOGISTIC_DIMS


def logistic_probe(
    basis: Basis,
    labels: Shaped[np.ndarray, " train_clips"],
    episodes: Int64[np.ndarray, " train_clips"],
    seed: int,
) -> ProbeFit:
    """Multinomial logistic regression on the leading principal components (at most 128; 512 for many clips).

    The inverse penalty is the one with the best accuracy on left-out folds of training episodes (stratified
    by class; one fold for many clips). What tells classes apart may lie in the other components: ridge
    regression of the classes on all of them stands in where it names more of the left-out clips. Every
    encoder has both, so that none is read by more than another. Without features the most frequent training
    class is named.
    """
    if not len(basis.power):
        names, counts = np.unique(labels, return_counts=True)
        shares = np.broadcast_to(counts / counts.sum(), (len(basis.test), len(names)))
        return ProbeFit(np.full(len(basis.test), names[np.argmax(counts)]), None, "", names, shares)
    dims, scale = logistic_dims(len(labels)), np.sqrt(len(labels) / basis.power[0])
    train = (basis.train[:, :dims] * np.sqrt(basis.power[:dims])) * scale
    folds = class_folds(labels, episodes, seed)
    found = fit_logistic(train, basis.test[:, :dims] * scale, labels, folds)
    if not folds:
        return found[0]
    names, codes = np.unique(labels, return_inverse=True)
    said = (codes[:, None] == np.arange(len(names))).astype(np.float64)
    mean = said.mean(0)
    rotated = basis.train.T @ (said - mean)

    def left_out(penalties: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _, fold in folds:
            yield fold, said[fold] - left_out_residuals(basis, said - mean, rotated, fold, penalties)

    def predict(penalty: float) -> np.ndarray:
        weights = np.sqrt(basis.power) / (basis.power + penalty)
        return basis.test @ (weights[:, None] * rotated) + mean

    return better(found, fit_class_ridge(labels, PENALTIES_PER_DIM * basis.dims, left_out, predict))


def class_folds(labels: np.ndarray, episodes: np.ndarray, seed: int) -> list[Split]:
    """Folds over episodes that keep the share of classes, one of many clips; those leaving a single class to
    fit are dropped."""
    largest_class = int(np.unique(labels, return_counts=True)[1].max())
    count = min(FOLDS, len(np.unique(episodes)), largest_class)
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # a rare class may miss a fold
        splits = splitter.split(np.zeros(len(labels)), labels, groups=episodes)
        usable = (each for each in splits if len(np.unique(labels[each[0]])) > 1)
        return list(islice(usable, 1 if len(labels) > LARGE else FOLDS))


def fit_logistic(
    train: Float[np.ndarray, "train_clips dims"],
    test: Float[np.ndarray, "test_clips dims"],
    labels: Shaped[np.ndarray, " train_clips"],
    folds: Sequence[Split],
) -> tuple[ProbeFit, int]:
    """The fit, and how many left-out clips its penalty named rightly."""
    is_large = len(labels) > LARGE
    kind = np.float32 if is_large else np.float64
    train, test = train.astype(kind, copy=False), test.astype(kind, copy=False)
    right = np.zeros(len(LOGISTIC_C), np.int64)
    # Small matrices: more threads than one only wait for each other.
    with threadpool_limits(limits=None if is_large else 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the note instead
        for fit_rows, fold in folds:
            model = _logistic(is_large)
            for i, c in enumerate(LOGISTIC_C):
                model.set_params(C=c).fit(train[fit_rows], labels[fit_rows])
                right[i] += (model.predict(train[fold]) == labels[fold]).sum()
        best = int(np.argmax(right))
        model = _logistic(is_large).set_params(C=LOGISTIC_C[best]).fit(train, labels)
        shares = model.predict_proba(test)
    notes = [edge_note(best, len(LOGISTIC_C))]
    if right.max() == 0:
        notes = ["penalty not chosen: too few episodes a class"]
    if is_large:
        notes.append("penalty chosen on one fold")
    if int(np.max(model.n_iter_)) >= model.max_iter:
        notes.append(f"not converged in {model.max_iter} steps")
    predicted, note = model.classes_[shares.argmax(1)], "; ".join(filter(None, notes))
    return ProbeFit(predicted, float(1 / LOGISTIC_C[best]), note, model.classes_, shares), int(right[best])


def _logistic(is_large: bool) -> LogisticRegression:
    steps = LARGE_STEPS if is_large else LOGISTIC_STEPS
    return LogisticRegression(max_iter=steps, tol=1e-3, warm_start=is_large)


def fit_class_ridge(
    labels: Shaped[np.ndarray, " train_clips"],
    penalties: Float[np.ndarray, " penalties"],
    left_out: LeftOut,
    predict: Callable[[float], Float[np.ndarray, "test_clips classes"]],
) -> tuple[ProbeFit, int]:
    """Ridge regression of classes (1 for a clip's own, 0 for the others) and how many left-out clips it names
    rightly. Under a strong penalty its scores are inner products with class means, under a weak one Fisher's
    discriminant (Hastie, Tibshirani and Buja 1994, section 3).

    Scores become shares of classes as a softmax of them, as sharp as makes left-out clips' own classes most
    likely.
    """
    names, codes = np.unique(labels, return_inverse=True)
    right = np.zeros(len(penalties), np.int64)
    for rows, scores in left_out(penalties):
        right += (scores.argmax(2) == codes[rows]).sum(1)
    best = int(np.argmax(right))
    held = list(left_out(penalties[best : best + 1]))
    truth = np.concatenate([codes[rows] for rows, _ in held])
    said = np.concatenate([scores[0] for _, scores in held])
    spread = max(float((said - said.mean(0)).std()), np.finfo(np.float64).tiny)

    def likelihood(sharpness: float) -> float:
        return float(log_softmax(said * (sharpness / spread), axis=1)[np.arange(len(truth)), truth].sum())

    sharpness = max(SHARPNESS, key=likelihood)
    shares = np.exp(log_softmax(predict(float(penalties[best])) * (sharpness / spread), axis=1))
    notes = [edge_note(best, len(penalties)), "ridge on all components: leading ones read less"]
    note = "; ".join(filter(None, notes))
    fit = ProbeFit(names[shares.argmax(1)], float(penalties[best]), note, names, shares)
    return fit, int(right[best])


def better(first: tuple[ProbeFit, int], second: tuple[ProbeFit, int]) -> ProbeFit:
    """That which named more of the left-out clips; the first on a tie."""
    return second[0] if second[1] > first[1] else first[0]
