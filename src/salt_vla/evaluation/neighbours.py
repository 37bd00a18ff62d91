"""The probe `knn`: what a clip's nearest training clips are, by cosine, says what it is.

The number of neighbours is chosen by folds over training episodes. Knows no encoder, only its features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from sklearn.neighbors import NearestNeighbors

from salt_vla.errors import DataError
from salt_vla.evaluation.probes import ProbeFit, Problem, deviation_floor, episode_folds
from salt_vla.evaluation.statistics import varying_dims

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
# Wu et al. 2018 (arXiv:1805.01978, section 3.4) and DINO (arXiv:2104.14294, appendix): votes weigh
# exp(cosine / τ).
TEMPERATURE = 0.07
CHOOSING_CLIPS = 20_000  # At most so many training clips are asked to choose the number of neighbours.


class NeighboursProbe:
    """Classes by vote, quantities by mean, both weighted with exp(cosine ÷ 0.07); features standardised by
    training clips first, since what all clips share would make every cosine one."""

    reads: Literal["vector", "tokens"] = "vector"
    protocols: tuple[str, ...] = ("held-out",)

    def fit(self, problem: Problem) -> dict[str, ProbeFit]:
        train, test = _directions(problem)
        counts = [count for count in COUNTS if count <= len(train)]
        coded = {name: _numbers(target) for name, target in problem.targets.items()}
        scores = {name: np.zeros(len(counts)) for name in coded}
        for fit_rows, asked in _folds(problem):
            found = _neighbours(train[fit_rows], train[asked], counts[-1])
            for name, (values, classes) in coded.items():
                truth = problem.targets[name][asked]
                answers = _said(values[fit_rows], *found, counts)
                scores[name] += [_score(each, truth, classes) for each in answers]
        found = _neighbours(train, test, counts[-1])
        fits = {}
        for name, (values, classes) in coded.items():
            best = int(np.argmax(scores[name]))
            (said,) = _said(values, *found, counts[best : best + 1])
            note = f"{counts[best]} neighbour{'s' if counts[best] > 1 else ''}"
            if classes is None:
                fits[name] = ProbeFit(said, None, note)
            else:
                fits[name] = ProbeFit(classes[said.argmax(1)], None, note, classes, said)
        return fits


def _directions(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Features of both sides, standardised by training clips, of length one (float32)."""
    train, test = np.asarray(problem.train), np.asarray(problem.test)
    for side in (train, test):
        if not np.isfinite(side).all():
            raise DataError(
                f"features of encoder {problem.encoder!r} hold NaN or infinite values; check the encoder"
            )
    mean = train.mean(0, dtype=np.float64).astype(np.float32)
    deviation = train.std(0, dtype=np.float64)
    scale = np.maximum(deviation, deviation_floor(deviation) or 1.0).astype(np.float32)
    found = []
    for side in (train, test):
        values = (np.asarray(side, np.float32) - mean) / scale
        length = np.linalg.norm(values, axis=1, keepdims=True)
        found.append(values / np.where(length > 0, length, 1))
    return found[0], found[1]


def _folds(problem: Problem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(learned from, asked) over episodes, the same for every target; at most `CHOOSING_CLIPS` are asked in
    all."""
    share = min(1.0, CHOOSING_CLIPS / len(problem.episodes))
    random = np.random.default_rng(problem.seed)
    everyone = np.arange(len(problem.episodes))
    for fold in episode_folds(problem.episodes):
        count = max(1, round(share * len(fold)))
        yield np.setdiff1d(everyone, fold), np.sort(random.permutation(fold)[:count])


def _numbers(target: Shaped[np.ndarray, " clips *dims"]) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers of classes (clips,) and the classes, or quantities as they are."""
    if target.dtype.kind not in "UO":
        return target.astype(np.float64), None
    classes, numbers = np.unique(target, return_inverse=True)
    return numbers, classes


def _neighbours(
    train: Float[np.ndarray, "clips dims"], asked: Float[np.ndarray, "asked dims"], count: int
) -> tuple[Int64[np.ndarray, "asked count"], Float[np.ndarray, "asked count"]]:
    """The nearest training clips, nearest first, and their weights exp(cosine ÷ τ).

    |a − b|² = 2 − 2 cosine for vectors of length one, and Euclidean search is the one that runs in blocks.
    """
    search = NearestNeighbors(n_neighbors=min(count, len(train)), algorithm="brute").fit(train)
    distance, rows = search.kneighbors(asked)
    weight = np.exp(-(distance.astype(np.float64) ** 2) / (2 * TEMPERATURE))  # times exp(1 / τ), left out
    return rows, weight


def _said(
    values: np.ndarray, rows: np.ndarray, weight: np.ndarray, counts: list[int]
) -> Iterator[Float[np.ndarray, "asked outputs"]]:
    """What the nearest `count` say, for each count: shares of the vote by class, or weighted means."""
    is_class = values.ndim == 1
    outputs = int(values.max()) + 1 if is_class else values.shape[1]
    for count in counts:
        chosen, mine = rows[:, :count], weight[:, :count]
        mine = mine / mine.sum(1, keepdims=True)
        said = np.zeros((len(rows), outputs))
        if is_class:
            asked = np.repeat(np.arange(len(rows)), chosen.shape[1])
            np.add.at(said, (asked, values[chosen].ravel()), mine.ravel())
        else:
            for column in range(chosen.shape[1]):
                said += mine[:, column, None] * values[chosen[:, column]]
        yield said


def _score(said: np.ndarray, truth: np.ndarray, classes: np.ndarray | None) -> float:
    """Right answers, or minus the squared error in units of each dimension's variance."""
    if classes is not None:
        known = said.argmax(1)
        return float((classes[known] == truth).sum())
    varying = varying_dims(truth)
    return -float((((said - truth) ** 2)[:, varying] / truth[:, varying].var(0)).sum())
