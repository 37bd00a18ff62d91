"""Linear probes of more clips than fit into memory: features are read a block at a time, never held.

All that ridge regression needs is the Gram matrix of features and targets, of all clips and of each left-out
fold. Knows features as rows of an array; neither encoders nor clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
from scipy.linalg import eigh, solve
from sklearn.preprocessing import StandardScaler

from salt_vla.errors import DataError
from salt_vla.evaluation.classes import (
    better,
    class_folds,
    fit_class_ridge,
    fit_logistic,
    logistic_dims,
    logistic_probe,
)
from salt_vla.evaluation.probes import (
    PENALTIES_PER_DIM,
    Basis,
    ProbeFit,
    Problem,
    deviation_floor,
    edge_note,
    episode_folds,
)
from salt_vla.evaluation.statistics import varying_dims

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    Rows = Int64[np.ndarray, " rows"]

BLOCK_BYTES = 64 << 20
ROUNDING = 1e-10  # a deviation below this share of the mean is what adding up leaves of one that is 0
# Square matrices of all features and targets that lie in memory at once: of all clips, of those without a
# fold, the one being solved, and what a block adds.
MATRICES = 4


def fit_streamed(problem: Problem) -> dict[str, ProbeFit]:
    """The linear probe's fits by target: the figures of `ridge_probe` and `logistic_probe` (to rounding), in
    memory that does not grow with the number of clips but for 512 components of each.

    Raises `DataError` for features that are not finite, and where the matrices do not fit.
    """
    outputs = {name: _coded(target) for name, target in problem.targets.items()}
    streamed = _Streamed.of(problem, np.concatenate([*outputs.values()], axis=1))
    total = streamed.moments(np.arange(len(problem.train)))
    edges = np.cumsum([0, *(each.shape[1] for each in outputs.values())])
    places = {name: np.arange(edges[i], edges[i + 1]) for i, name in enumerate(outputs)}
    is_class = {name: target.dtype.kind in "UO" for name, target in problem.targets.items()}
    quantities = {name: mine for name, mine in places.items() if not is_class[name]}
    fits = _quantities(streamed, total, problem, quantities) if quantities else {}
    for name, mine in places.items():
        if is_class[name]:
            fits[name] = _classes(streamed, total, problem, name, mine)
    return fits


def _coded(target: np.ndarray) -> Float[np.ndarray, "clips outputs"]:
    """Quantities as they are; 1 for a clip's class and 0 for the others (single precision holds both)."""
    if target.dtype.kind not in "UO":
        return target.astype(np.float64)
    names, codes = np.unique(target, return_inverse=True)
    return np.asarray(codes[:, None] == np.arange(len(names)), np.float32)


@dataclass(frozen=True)
class _Streamed:
    """Both sides' features as they lie, how training clips standardise them, and training clips' outputs."""

    train: np.ndarray
    test: np.ndarray
    mean: Float[np.ndarray, " dims"]
    scale: Float[np.ndarray, " dims"]
    outputs: Float[np.ndarray, "clips outputs"]

    @staticmethod
    def of(problem: Problem, outputs: np.ndarray) -> _Streamed:
        dims = problem.train.shape[1]
        if dims != problem.test.shape[1]:
            raise DataError(
                f"encoder {problem.encoder!r} has {dims} features in training but {problem.test.shape[1]} "
                "held out"
            )
        size = dims + outputs.shape[1] + 1
        needed = MATRICES * 8 * size**2
        if needed > psutil.virtual_memory().available:
            raise DataError(
                f"a linear probe of encoder {problem.encoder!r} on {dims} features needs {MATRICES} matrices "
                f"of {size} × {size}, {needed / 1e9:.3g} GB of memory; keep fewer features (--poolings mean "
                "or step)"
            )
        scaler = StandardScaler()
        for side in (problem.train, problem.test):
            for rows in _blocks(np.arange(len(side)), dims):
                block = np.asarray(side[rows], np.float64)
                if not np.isfinite(block).all():
                    raise DataError(
                        f"features of encoder {problem.encoder!r} hold NaN or infinite values; check the "
                        "encoder"
                    )
                if side is problem.train:
                    scaler.partial_fit(block)
        deviation = np.sqrt(scaler.var_)
        deviation[deviation < ROUNDING * np.abs(scaler.mean_)] = 0
        floor = deviation_floor(deviation) or 1.0
        scale = np.maximum(deviation, floor)
        return _Streamed(problem.train, problem.test, scaler.mean_, scale, outputs)

    @property
    def dims(self) -> int:
        return len(self.mean)

    def blocks(self, side: np.ndarray, rows: Rows) -> Iterator[tuple[Rows, Float[np.ndarray, "block dims"]]]:
        """These rows of a side, standardised, some at a time."""
        for part in _blocks(rows, self.dims):
            yield part, (np.asarray(side[part], np.float64) - self.mean) / self.scale

    def moments(self, rows: Rows) -> Float[np.ndarray, "size size"]:
        """Zᵀ Z of Z = [features, outputs, 1] over these training clips."""
        size = self.dims + self.outputs.shape[1] + 1
        found = np.zeros((size, size))
        for part, x in self.blocks(self.train, rows):
            z = np.concatenate([x, self.outputs[part], np.ones((len(part), 1))], axis=1)
            found += z.T @ z
        return found

    def solved(
        self, moments: Float[np.ndarray, "size size"], penalties: Float[np.ndarray, " penalties"]
    ) -> tuple[Float[np.ndarray, "dims penalties outputs"], Float[np.ndarray, "penalties outputs"]]:
        """Weights and intercepts of ridge regression of all outputs, on the clips that `moments` are of."""
        dims = self.dims
        mean = moments[-1, :-1] / moments[-1, -1]
        gram = moments[:dims, :dims] - np.outer(mean[:dims], moments[-1, :dims])
        cross = moments[:dims, dims:-1] - np.outer(mean[:dims], moments[-1, dims:-1])
        weights = np.empty((dims, len(penalties), cross.shape[1]))
        for i, penalty in enumerate(penalties):
            loaded = gram.copy()
            loaded[np.diag_indices(dims)] += penalty
            weights[:, i] = solve(loaded, cross, assume_a="pos", overwrite_a=True, check_finite=False)
        return weights, mean[dims:] - np.einsum("d,dpo->po", mean[:dims], weights)

    def said(
        self, side: np.ndarray, rows: Rows, weights: np.ndarray, intercepts: np.ndarray
    ) -> Iterator[tuple[Rows, Float[np.ndarray, "penalties block outputs"]]]:
        """What such a fit says of these rows of a side."""
        flat = weights.reshape(self.dims, -1)
        for part, x in self.blocks(side, rows):
            values = (x @ flat).reshape(len(part), *intercepts.shape) + intercepts
            yield part, values.transpose(1, 0, 2)

    def predicted(self, moments: np.ndarray, penalty: float) -> Float[np.ndarray, "test_clips outputs"]:
        fitted = self.solved(moments, np.array([penalty]))
        everyone = np.arange(len(self.test))
        return np.concatenate([values[0] for _, values in self.said(self.test, everyone, *fitted)])


def _blocks(rows: Rows, dims: int) -> Iterator[Rows]:
    at_once = max(1, BLOCK_BYTES // (8 * max(dims, 1)))
    for start in range(0, len(rows), at_once):
        yield rows[start : start + at_once]


def _quantities(
    streamed: _Streamed, total: np.ndarray, problem: Problem, places: dict[str, np.ndarray]
) -> dict[str, ProbeFit]:
    """As `ridge_probe`."""
    penalties = PENALTIES_PER_DIM * streamed.dims
    errors = np.zeros((len(penalties), streamed.outputs.shape[1]))
    for fold in episode_folds(problem.episodes):
        fitted = streamed.solved(total - streamed.moments(fold), penalties)
        for rows, values in streamed.said(streamed.train, fold, *fitted):
            errors += ((values - streamed.outputs[rows]) ** 2).sum(1)
    spread = streamed.outputs.var(0, dtype=np.float64) * len(problem.train)
    fits = {}
    for name, mine in places.items():
        varying = mine[varying_dims(problem.targets[name])]
        best = int(np.argmax((1 - errors[:, varying] / spread[varying]).sum(1)))
        predicted = streamed.predicted(total, float(penalties[best]))[:, mine]
        fits[name] = ProbeFit(predicted, float(penalties[best]), edge_note(best, len(penalties)))
    return fits


def _classes(
    streamed: _Streamed, total: np.ndarray, problem: Problem, name: str, mine: np.ndarray
) -> ProbeFit:
    """As `logistic_probe`."""
    labels, dims = problem.targets[name], streamed.dims
    power, axes = eigh(
        total[:dims, :dims], subset_by_index=[max(dims - logistic_dims(len(labels)), 0), dims - 1]
    )
    if power[-1] <= 0:  # Nothing varies.
        none = Basis(
            problem.encoder, np.zeros((len(labels), 0)), np.zeros(0), np.zeros((len(streamed.test), 0)), 0
        )
        return logistic_probe(none, labels, problem.episodes, problem.seed)
    scale = np.sqrt(len(labels) / power[-1])
    train, test = (
        _coordinates(streamed.blocks(side, np.arange(len(side))), len(side), axes[:, ::-1] * scale)
        for side in (streamed.train, streamed.test)
    )
    folds = class_folds(labels, problem.episodes, problem.seed)
    found = fit_logistic(train, test, labels, folds)
    if not folds:
        return found[0]
    rests = [(fold, total - streamed.moments(fold)) for _, fold in folds]

    def left_out(penalties: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for fold, rest in rests:
            for rows, values in streamed.said(streamed.train, fold, *streamed.solved(rest, penalties)):
                yield rows, values[:, :, mine]

    def predict(penalty: float) -> np.ndarray:
        return streamed.predicted(total, penalty)[:, mine]

    return better(found, fit_class_ridge(labels, PENALTIES_PER_DIM * dims, left_out, predict))


def _coordinates(
    blocks: Iterator[tuple[Rows, np.ndarray]], count: int, axes: Float[np.ndarray, "dims kept"]
) -> Float[np.ndarray, "clips kept"]:
    found = np.empty((count, axes.shape[1]), np.float32)
    for rows, x in blocks:
        found[rows] = x @ axes
    return found
