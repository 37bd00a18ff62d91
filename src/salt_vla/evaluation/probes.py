"""What a probe is; linear ones: ridge for quantities, multinomial logistic regression for classes.

Every choice (scaling, penalty, PCA) is made on training clips, the penalty by folds over training episodes;
the functions never see a held-out target. Knows no encoder, only its features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import psutil
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from salt_vla.errors import DataError
from salt_vla.evaluation.statistics import varying_dims

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

# Standard deviations below these shares of the median and of the largest one are raised to them: dividing a
# near-constant feature by its own tiny deviation would blow up the first held-out clip that departs from it.
FLOOR_OF_MEDIAN = 0.1
FLOOR_OF_LARGEST = 0.01
# Ridge penalties per feature dimension (the Gram matrix of standardised features has trace clips · dims),
# strongest first: on a tie the stronger penalty wins.
PENALTIES_PER_DIM = np.logspace(4, -3, 15)
# Inverse penalties of the logistic probe on components scaled so that the first has unit variance.
LOGISTIC_C = np.logspace(-3, 3, 7)
LOGISTIC_DIMS = 128
LOGISTIC_STEPS = 300
# With more clips than `LARGE`: more components, one fold instead of five, penalties from strong to weak each
# started where the last one ended, single precision. 174 classes of 168,000 clips are else days of work.
LARGE = 4000
LARGE_DIMS, LARGE_STEPS = 512, 100
FOLDS = 5
# Copies of the features in double precision that standardising and rotating them takes.
COPIES = 4


@dataclass(frozen=True)
class Problem:
    """One encoder's features, and what is to be read from them.

    `targets` and `episodes` are the training clips'. `held_out` are the truths of the held-out clips, given
    only under a protocol that by its definition selects on them, and never otherwise. `device`: where a probe
    that can is trained; `auto` is CUDA where there is one.
    """

    encoder: str
    train: Float[np.ndarray, " train_clips *dims"]
    test: Float[np.ndarray, " test_clips *dims"]
    targets: Mapping[str, Shaped[np.ndarray, " train_clips *dims"]]
    episodes: Int64[np.ndarray, " train_clips"]
    seed: int
    held_out: Mapping[str, Shaped[np.ndarray, " test_clips *dims"]] | None = None
    device: str = "auto"


class Probe(Protocol):
    """What an entry of the table `PROBES` makes. `reads`: one vector a clip, or all its tokens. `protocols`:
    the ways to choose that it knows."""

    @property
    def reads(self) -> Literal["vector", "tokens"]: ...

    @property
    def protocols(self) -> tuple[str, ...]: ...

    def fit(self, problem: Problem) -> dict[str, ProbeFit]:
        """Predictions for the held-out clips, by target. Text is classified, numbers regressed."""
        ...


class LinearProbe:
    """Ridge and logistic regression, all targets from one rotation of the features."""

    reads: Literal["vector", "tokens"] = "vector"
    protocols: tuple[str, ...] = ("held-out",)

    def fit(self, problem: Problem) -> dict[str, ProbeFit]:
        """Penalties are chosen by folds over training episodes; no features at all predict the mean, or the
        most frequent class."""
        quantities = {name: y for name, y in problem.targets.items() if y.dtype.kind not in "UO"}
        episodes = problem.episodes
        # Up to so many clips one thread is as fast as two on an idle machine, and several times faster on a
        # busy one, where threads wait for each other at every small product.
        with threadpool_limits(limits=1 if len(episodes) <= LARGE else None):
            basis = fit_basis(problem.encoder, problem.train, problem.test)
            fits = ridge_probe(basis, quantities, episodes)
            for name, labels in problem.targets.items():
                if name not in quantities:
                    fits[name] = logistic_probe(basis, labels, episodes, problem.seed)
        return fits


@dataclass(frozen=True)
class Basis:
    """One encoder's standardised features in the principal axes of its training clips.

    `train` has orthonormal columns U of X = U √power Vᵀ, largest power first; `test` holds the held-out
    clips' coordinates X_test V. `dims` is the number of features before rotation.
    """

    encoder: str
    train: Float[np.ndarray, "train_clips rank"]
    power: Float[np.ndarray, " rank"]
    test: Float[np.ndarray, "test_clips rank"]
    dims: int


@dataclass(frozen=True)
class ProbeFit:
    """Predictions for the held-out clips: values (clips, dims) or class names (clips,).

    `alpha` is the chosen penalty (scikit-learn's `alpha`; 1/C for classes; None without features) and `note`
    says what a reader should know of the choice, such as that it lies at the edge of the grid. Where classes
    were learned, `classes` are they and `shares` how likely each is.
    """

    predicted: Shaped[np.ndarray, " test_clips *dims"]
    alpha: float | None
    note: str = ""
    classes: Shaped[np.ndarray, " classes"] | None = None
    shares: Float[np.ndarray, "test_clips classes"] | None = None


def check_split(
    train_episodes: Int64[np.ndarray, " train"], test_episodes: Int64[np.ndarray, " test"]
) -> None:
    """Raise `DataError`, naming it, when an episode has clips on both sides."""
    shared = np.intersect1d(train_episodes, test_episodes)
    if shared.size:
        raise DataError(
            f"episode {shared[0]} has clips in both training and held-out data "
            f"({shared.size} such episode(s)); split by episode"
        )


def check_classes(
    target: str, train: Shaped[np.ndarray, " train"], test: Shaped[np.ndarray, " test"]
) -> None:
    """Raise `DataError` when a class cannot have been learned, or there is but one to learn."""
    unseen = sorted(set(test.tolist()) - set(train.tolist()))
    if unseen:
        raise DataError(
            f"target {target!r}: class {unseen[0]!r} occurs in held-out clips but in no training clip; "
            f"split every class over both sides or leave the target out"
        )
    if len(set(train.tolist())) < 2:
        raise DataError(f"target {target!r} has a single class in training; leave the target out")


def fit_basis(
    encoder: str, train: Float[np.ndarray, "train_clips dims"], test: Float[np.ndarray, "test_clips dims"]
) -> Basis:
    """Standardise by the training clips (with a floor on the deviation) and rotate to their principal axes.

    One eigendecomposition of the smaller of X Xᵀ and Xᵀ X serves every target, penalty and fold.
    """
    for values in (train, test):
        if not np.isfinite(values).all():
            raise DataError(f"features of encoder {encoder!r} hold NaN or infinite values; check the encoder")
    if train.shape[1] != test.shape[1]:
        raise DataError(
            f"encoder {encoder!r} has {train.shape[1]} features in training but {test.shape[1]} held out"
        )
    needed = 8 * COPIES * (train.size + test.size)
    if needed > psutil.virtual_memory().available:
        raise DataError(
            f"a linear probe of encoder {encoder!r} on {len(train)} clips × {train.shape[1]} features needs "
            f"about {needed / 1e9:.0f} GB of memory; keep fewer features (pooling mean or step)"
        )
    train64 = train.astype(np.float64)
    mean, deviation = train64.mean(0), train64.std(0)
    largest = float(deviation.max(initial=0.0))
    if largest == 0.0:
        return Basis(encoder, np.zeros((len(train), 0)), np.zeros(0), np.zeros((len(test), 0)), 0)
    scale = np.maximum(deviation, deviation_floor(deviation))
    x = (train64 - mean) / scale
    x_test = (test.astype(np.float64) - mean) / scale
    dual = x.shape[1] > x.shape[0]
    power, axes = np.linalg.eigh(x @ x.T if dual else x.T @ x)
    keep = np.flatnonzero(power > power[-1] * max(x.shape) * np.finfo(np.float64).eps)[::-1]
    power, axes = power[keep], axes[:, keep]
    if dual:
        return Basis(encoder, axes, power, (x_test @ x.T) @ axes / np.sqrt(power), x.shape[1])
    return Basis(encoder, (x @ axes) / np.sqrt(power), power, x_test @ axes, x.shape[1])


def deviation_floor(deviation: Float[np.ndarray, " dims"]) -> float:
    """What deviations are raised to; 0 where there is none."""
    if not len(deviation):
        return 0.0
    return max(FLOOR_OF_MEDIAN * float(np.median(deviation)), FLOOR_OF_LARGEST * float(deviation.max()))


def ridge_probe(
    basis: Basis,
    targets: Mapping[str, Float[np.ndarray, "train_clips dims"]],
    episodes: Int64[np.ndarray, " train_clips"],
) -> dict[str, ProbeFit]:
    """Ridge regression with an unpenalised intercept for all targets at once, one penalty a target.

    The penalty is the one with the best R² (mean over the target's varying dimensions) on left-out folds of
    training episodes. Features without variance predict the training mean.
    """
    if not targets:
        return {}
    stacked = np.concatenate([targets[name] for name in targets], axis=1).astype(np.float64)
    edges = np.cumsum([0, *(targets[name].shape[1] for name in targets)])
    mean = stacked.mean(0)
    if not len(basis.power):
        constant = np.broadcast_to(mean, (len(basis.test), len(mean)))
        return {n: ProbeFit(constant[:, edges[i] : edges[i + 1]], None) for i, n in enumerate(targets)}
    penalties = PENALTIES_PER_DIM * basis.dims
    errors = _left_out_errors(basis, stacked - mean, episodes, penalties)
    spread = stacked.var(0) * len(stacked)
    fits = {}
    for i, name in enumerate(targets):
        mine = np.arange(edges[i], edges[i + 1])
        varying = mine[varying_dims(targets[name])]
        # The mean over no dimension at all is not needed: every penalty then predicts the training mean.
        scores = 1 - errors[:, varying] / spread[varying]
        best = int(np.argmax(scores.sum(1)))
        weights = np.sqrt(basis.power) / (basis.power + penalties[best])
        rotated = basis.train.T @ (stacked[:, mine] - mean[mine])
        predicted = basis.test @ (weights[:, None] * rotated) + mean[mine]
        fits[name] = ProbeFit(predicted, float(penalties[best]), _edge_note(best, len(penalties)))
    return fits


def _left_out_errors(
    basis: Basis,
    centred: Float[np.ndarray, "train_clips dims"],
    episodes: Int64[np.ndarray, " train_clips"],
    penalties: Float[np.ndarray, " penalties"],
) -> Float[np.ndarray, "penalties dims"]:
    """Summed squared errors on clips of left-out folds, for every penalty.

    With H the hat matrix (intercept included), the residual of a fold g fitted without g is
    (I − H_gg)⁻¹ (y − H y)_g, exactly: no fold is fitted anew.
    """
    folds = list(episode_folds(episodes))
    rotated = basis.train.T @ centred
    errors = np.zeros((len(penalties), centred.shape[1]))
    for i, penalty in enumerate(penalties):
        shrink = basis.power / (basis.power + penalty)
        residual = centred - basis.train @ (shrink[:, None] * rotated)
        for fold in folds:
            rows = basis.train[fold]
            hat = (rows * shrink) @ rows.T + 1 / len(centred)
            errors[i] += (np.linalg.solve(np.eye(len(fold)) - hat, residual[fold]) ** 2).sum(0)
    return errors


def episode_folds(episodes: Int64[np.ndarray, " train_clips"]) -> Iterator[Int64[np.ndarray, " fold"]]:
    count = len(np.unique(episodes))
    if count < 2:
        raise DataError("choosing a probe's penalty needs at least 2 training episodes; add episodes")
    splitter = GroupKFold(n_splits=min(FOLDS, count))
    for _, fold in splitter.split(np.zeros(len(episodes)), groups=episodes):
        yield fold


def logistic_probe(
    basis: Basis,
    labels: Shaped[np.ndarray, " train_clips"],
    episodes: Int64[np.ndarray, " train_clips"],
    seed: int,
) -> ProbeFit:
    """Multinomial logistic regression on the leading principal components (at most 128; 512 for many clips).

    The inverse penalty is the one with the best accuracy on left-out folds of training episodes (stratified
    by class; one fold for many clips). Without features it names the most frequent training class.
    """
    if not len(basis.power):
        names, counts = np.unique(labels, return_counts=True)
        shares = np.broadcast_to(counts / counts.sum(), (len(basis.test), len(names)))
        return ProbeFit(np.full(len(basis.test), names[np.argmax(counts)]), None, "", names, shares)
    is_large = len(labels) > LARGE
    dims, kind = (LARGE_DIMS, np.float32) if is_large else (LOGISTIC_DIMS, np.float64)
    scale = np.sqrt(len(labels) / basis.power[0])
    train = ((basis.train * np.sqrt(basis.power))[:, :dims] * scale).astype(kind)
    test = (basis.test[:, :dims] * scale).astype(kind)
    # Small matrices: more threads than one only wait for each other.
    with threadpool_limits(limits=None if is_large else 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the note instead
        warnings.filterwarnings("ignore", "The least populated class")  # a rare class may miss a fold
        right = np.zeros(len(LOGISTIC_C))
        for fit_rows, fold in islice(_class_folds(labels, episodes, seed), 1 if is_large else FOLDS):
            model = _logistic(is_large)
            for i, c in enumerate(LOGISTIC_C):
                model.set_params(C=c).fit(train[fit_rows], labels[fit_rows])
                right[i] += (model.predict(train[fold]) == labels[fold]).sum()
        best = int(np.argmax(right))
        model = _logistic(is_large).set_params(C=LOGISTIC_C[best]).fit(train, labels)
        shares = model.predict_proba(test)
    notes = [_edge_note(best, len(LOGISTIC_C))]
    if right.max() == 0:
        notes = ["penalty not chosen: too few episodes a class"]
    if is_large:
        notes.append("penalty chosen on one fold")
    if int(np.max(model.n_iter_)) >= model.max_iter:
        notes.append(f"not converged in {model.max_iter} steps")
    predicted, note = model.classes_[shares.argmax(1)], "; ".join(filter(None, notes))
    return ProbeFit(predicted, float(1 / LOGISTIC_C[best]), note, model.classes_, shares)


def _logistic(is_large: bool) -> LogisticRegression:
    steps = LARGE_STEPS if is_large else LOGISTIC_STEPS
    return LogisticRegression(max_iter=steps, tol=1e-3, warm_start=is_large)


def _class_folds(
    labels: np.ndarray, episodes: np.ndarray, seed: int
) -> Iterator[tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " fold"]]]:
    """Folds over episodes that keep the share of classes; those leaving a single class to fit are dropped."""
    largest_class = int(np.unique(labels, return_counts=True)[1].max())
    count = min(FOLDS, len(np.unique(episodes)), largest_class)
    if count < 2:
        return
    splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    for fit_rows, fold in splitter.split(np.zeros(len(labels)), labels, groups=episodes):
        if len(np.unique(labels[fit_rows])) > 1:
            yield fit_rows, fold


def _edge_note(best: int, count: int) -> str:
    """The penalties run from strongest to weakest."""
    if best == 0:
        return "penalty at the grid's strongest: nothing linear was found, or the grid is too narrow"
    return "penalty at the grid's weakest: the grid may be too narrow" if best == count - 1 else ""
