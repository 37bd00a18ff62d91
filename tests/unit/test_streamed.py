"""Linear probes read block by block give the figures of those in memory, and of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from salt_vla.errors import DataError
from salt_vla.evaluation import classes, linear, streamed
from salt_vla.evaluation.linear import LinearProbe
from salt_vla.evaluation.probes import PENALTIES_PER_DIM, Problem
from salt_vla.evaluation.streamed import fit_streamed

TRAIN, TEST, DIMS = 400, 100, 20


def problem_of(dims: int = DIMS, seed: int = 0) -> Problem:
    """Two quantities and a class, linear in features of unequal size, with noise; episodes of 5 clips."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((TRAIN + TEST, dims)) * random.uniform(0.5, 20, dims) + 30
    read = (features - 30) @ random.standard_normal((dims, 5)) / dims
    noisy = read + 0.5 * read.std() * random.standard_normal(read.shape)
    targets = {
        "position": noisy[:TRAIN, :2] + 7,
        "noise": random.standard_normal((TRAIN, 1)),
        "task": np.array(["push", "pull", "lift"])[noisy[:TRAIN, 2:].argmax(1)],
    }
    values = features.astype(np.float32)
    return Problem("student", values[:TRAIN], values[TRAIN:], targets, np.arange(TRAIN) // 5, 0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 8 * DIMS * 64)  # the last block is a smaller one


@pytest.mark.usefixtures("small_blocks")
def test_ridge_has_the_figures_of_the_one_in_memory_and_of_scikit_learn() -> None:
    problem = problem_of()
    whole, found = LinearProbe().fit(problem), fit_streamed(problem)
    train = (problem.train - problem.train.mean(0, dtype=np.float64)) / problem.train.std(0, dtype=np.float64)
    test = (problem.test - problem.train.mean(0, dtype=np.float64)) / problem.train.std(0, dtype=np.float64)
    for name in ("position", "noise"):
        assert found[name].alpha == whole[name].alpha and found[name].note == whole[name].note
        assert np.allclose(found[name].predicted, whole[name].predicted, rtol=0, atol=1e-8)
        model = Ridge(alpha=found[name].alpha or 0).fit(train, problem.targets[name])
        assert np.allclose(found[name].predicted, model.predict(test).reshape(TEST, -1), atol=1e-5)
    assert found["position"].alpha != found["noise"].alpha


@pytest.mark.usefixtures("small_blocks")
def test_classes_have_those_of_the_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    whole, found = LinearProbe().fit(problem)["task"], fit_streamed(problem)["task"]
    assert found.alpha == whole.alpha and found.note == whole.note
    assert (found.predicted == whole.predicted).mean() > 0.98
    assert found.shares is not None and np.allclose(found.shares, whole.shares, atol=1e-3)


@pytest.mark.usefixtures("small_blocks")
def test_ridge_of_classes_stands_in_as_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "LOGISTIC_DIMS", 2)
    problem = problem_of()
    whole, found = LinearProbe().fit(problem)["task"], fit_streamed(problem)["task"]
    assert "ridge on all components" in found.note and found.note == whole.note
    assert found.alpha == whole.alpha and np.array_equal(found.predicted, whole.predicted)
    assert found.shares is not None and np.allclose(found.shares, whole.shares, atol=1e-8)


def test_many_clips_are_read_from_their_file_and_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more rows are asked for at once than a block has."""
    asked: list[int] = []

    class Watched(np.memmap):
        def __getitem__(self, rows: object) -> np.ndarray:
            found = np.asarray(super().__getitem__(rows))
            asked.append(len(found))
            return found

    problem = problem_of()
    problem.train.tofile(tmp_path / "rows")
    mapped = Watched(tmp_path / "rows", np.float32, "r", shape=problem.train.shape)
    monkeypatch.setattr(linear, "LARGE", 300)
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 8 * DIMS * 64)
    found = LinearProbe().fit(replace(problem, train=mapped))
    assert max(asked) == 64 and sum(asked) >= 3 * TRAIN
    assert np.allclose(found["position"].predicted, fit_streamed(problem)["position"].predicted)


def test_features_that_do_not_vary_predict_the_mean_and_the_most_frequent_class() -> None:
    problem = replace(problem_of(), train=np.full((TRAIN, 4), 0.1, np.float32), test=np.ones((TEST, 4)))
    found = fit_streamed(problem)
    assert np.allclose(found["position"].predicted, problem.targets["position"].mean(0), atol=1e-6)
    names, counts = np.unique(problem.targets["task"], return_counts=True)
    assert set(found["task"].predicted) == {names[counts.argmax()]}


def nan_in(side: np.ndarray) -> np.ndarray:
    damaged = side.copy()
    damaged[77, 3] = np.nan
    return damaged


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: replace(p, test=nan_in(p.test)), "encoder 'student' hold NaN or infinite"),
        (lambda p: replace(p, test=p.test[:, 1:]), "has 20 features in training but 19 held out"),
        (lambda p: replace(p, episodes=np.zeros(TRAIN, np.int64)), "at least 2 training episodes"),
    ],
)
def test_what_cannot_be_fitted_is_a_sentence(damage: Callable[[Problem], Problem], said: str) -> None:
    with pytest.raises(DataError, match=said):
        fit_streamed(damage(problem_of()))


def test_matrices_beyond_the_memory_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "MATRICES", 10**12)
    with pytest.raises(DataError, match=r"20 features needs .* matrices of 27 × 27, .* GB of memory; keep"):
        fit_streamed(problem_of())


def test_the_strongest_and_the_weakest_penalty_are_those_of_the_grid() -> None:
    fits = fit_streamed(problem_of())
    assert fits["noise"].alpha == pytest.approx(PENALTIES_PER_DIM[0] * DIMS, rel=10)
    assert fits["position"].alpha is not None and fits["position"].alpha < fits["noise"].alpha  # type: ignore[operator]
