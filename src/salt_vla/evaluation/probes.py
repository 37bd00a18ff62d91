"""What a probe is; features in their principal axes, and ridge regression on these.

Every choice (scaling, penalty, PCA) is made on training clips, the penalty by folds over training episodes;
the functions never see a held-out target. Knows no encoder, only its features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import psutil
from sklearn.model_selection import GroupKFold

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
# With more clips than so many probes do with less: docs/evaluation.md, "How a probe is fitted".
LARGE = 4000
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
    train64, test64 = np.asarray(train, np.float64), np.asarray(test, np.float64)
    for values in (train64, test64):
        if not np.isfinite(values).all():
            raise DataError(f"features of encoder {encoder!r} hold NaN or infinite values; check the encoder")
    mean, deviation = train64.mean(0), train64.std(0)
    largest = float(deviation.max(initial=0.0))
    if largest == 0.0:
        return Basis(encoder, np.zeros((len(train), 0)), np.zeros(0), np.zeros((len(test), 0)), 0)
    scale = np.maximum(deviation, deviation_floor(deviation))
    x = (train64 - mean) / scale
    x_test = (test64 - mean) / scale
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
        fits[name] = ProbeFit(predicted, float(penalties[best]), edge_note(best, len(penalties)))
    return fits


def _left_out_errors(
    basis: Basis,
    centred: Float[np.ndarray, "train_clips dims"],
    episodes: Int64[np.ndarray, " train_clips"],
    penalties: Float[np.ndarray, " penalties"],
) -> Float[np.ndarray, "penalties dims"]:
    """Summed squared errors on clips of left-out folds, for every penalty."""
    rotated = basis.train.T @ centred
    errors = np.zeros((len(penalties), centred.shape[1]))
    for fold in episode_folds(episodes):
        errors += (left_out_residuals(basis, centred, rotated, fold, penalties) ** 2).sum(1)
    return errors


def left_out_residuals(
    basis: Basis,
    centred: Float[np.ndarray, "train_clips dims"],
    rotated: Float[np.ndarray, "rank dims"],
    fold: Int64[np.ndarray, " fold"],
    penalties: Float[np.ndarray, " penalties"],
) -> Float[np.ndarray, "penalties fold dims"]:
    """What ridge regression on the other clips leaves of a fold's targets, for every penalty.

    With H the hat matrix (intercept included), the residual of a fold g fitted without g is
    (I − H_gg)⁻¹ (y − H y)_g, exactly: no fold is fitted anew. `rotated` is `basis.train`ᵀ times the targets.
    """
    rows = basis.train[fold]
    residuals = np.empty((len(penalties), len(fold), centred.shape[1]))
    for i, penalty in enumerate(penalties):
        shrink = basis.power / (basis.power + penalty)
        residual = centred[fold] - rows @ (shrink[:, None] * rotated)
        hat = (rows * shrink) @ rows.T + 1 / len(centred)
        residuals[i] = np.linalg.solve(np.eye(len(fold)) - hat, residual)
    return residuals


def episode_folds(episodes: Int64[np.ndarray, " train_clips"]) -> Iterator[Int64[np.ndarray, " fold"]]:
    count = len(np.unique(episodes))
    if count < 2:
        raise DataError("choosing a probe's penalty needs at least 2 training episodes; add episodes")
    splitter = GroupKFold(n_splits=min(FOLDS, count))
    for _, fold in splitter.split(np.zeros(len(episodes)), groups=episodes):
        yield fold


def edge_note(best: int, count: int) -> str:
    """The penalties run from strongest to weakest."""
    if best == 0:
        return "penalty at the grid's strongest: nothing linear was found, or the grid is too narrow"
    return "penalty at the grid's weakest: the grid may be too narrow" if best == count - 1 else ""
