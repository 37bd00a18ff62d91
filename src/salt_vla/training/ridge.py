"""Ridge regression of a few thousand clips at once: many targets, one penalty each, scored on other clips.

For figures that are taken while a run goes on: milliseconds, float64. Knows neither encoders nor runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64, Shaped

# Penalties a dimension of the features, which are scaled to variance 1: their Gram matrix' trace is
# clips · dims. Strongest first: on a tie the stronger wins.
PENALTIES = tuple(10.0**power for power in (3, 2, 1, 0, -1, -2))
ONE_IN = 5  # episodes that penalties are compared on
# A feature's deviation below these shares of the median and of the largest is raised to them: divided by its
# own, a feature that hardly varies would throw off the first clip that departs from it.
FLOOR_OF_MEDIAN, FLOOR_OF_LARGEST = 0.1, 0.01
CONSTANT = "_constant"
STILL = 1e-5  # of its root mean square: below it a number does not vary


@dataclass(frozen=True)
class Known:
    """What is known of some clips: numbers to regress, and classes, by target."""

    episodes: Int64[np.ndarray, " clips"]
    numbers: Mapping[str, Float32[np.ndarray, "clips dims"]] = field(default_factory=dict)
    classes: Mapping[str, Int64[np.ndarray, " clips"]] = field(default_factory=dict)


def read_out(
    fit: Float[Tensor, "fit_clips dims"], known: Known, test: Float[Tensor, "clips dims"], truth: Known
) -> dict[str, float]:
    """Fitted on `fit`, scored on `test`: `r2_TARGET` for numbers, `accuracy_TARGET` for classes and, for
    these, `accuracy_TARGET_constant`, which always names the most frequent.

    R² is 1 − SSE ÷ SSE of the mean of the clips fitted on, the mean of that over a target's dimensions: that
    mean has 0. Dimensions that do not vary over either side are left out; a target of none but such is NaN.
    """
    columns = {name: torch.from_numpy(values).double() for name, values in known.numbers.items()}
    names = {name: np.unique(codes) for name, codes in known.classes.items()}
    for name, codes in known.classes.items():
        columns[f"class {name}"] = torch.from_numpy(codes[:, None] == names[name]).double()
    if not columns:
        return {}
    predicted = ridge(fit, columns, test, known.episodes)
    figures = {}
    for name, values in known.numbers.items():
        figures[f"r2_{name}"] = _r2(values, truth.numbers[name], predicted[name].numpy())
    for name, codes in known.classes.items():
        said = names[name][predicted[f"class {name}"].argmax(dim=1).numpy()]
        frequent = names[name][np.argmax((codes[:, None] == names[name]).sum(0))]
        figures[f"accuracy_{name}"] = float((said == truth.classes[name]).mean())
        figures[f"accuracy_{name}{CONSTANT}"] = float((frequent == truth.classes[name]).mean())
    return figures


def ridge(
    fit: Float[Tensor, "fit_clips dims"],
    targets: Mapping[str, Float[Tensor, "fit_clips _"]],
    test: Float[Tensor, "clips dims"],
    episodes: Int64[np.ndarray, " fit_clips"],
) -> dict[str, Float[Tensor, "clips _"]]:
    """Predictions for `test`: Hoerl and Kennard's ridge with a free intercept, of scaled features.

    Each target's penalty is the one of `PENALTIES` with the smallest error on every fifth of the episodes,
    when it is fitted on the others; it is then fitted on all. The smaller of XᵀX and XXᵀ is solved.
    """
    mean, scale = _scaling(fit)
    x, x_test = (fit.double() - mean) / scale, (test.double() - mean) / scale
    y = torch.cat(list(targets.values()), dim=1)
    widths = [values.shape[1] for values in targets.values()]
    apart = torch.from_numpy(np.isin(episodes, np.unique(episodes)[::ONE_IN]))
    best = [len(PENALTIES) // 2] * len(widths)
    if 0 < int(apart.sum()) < len(x):
        system = _System(x[~apart], y[~apart], x[apart])
        spread = y.var(dim=0, correction=0).clamp(min=torch.finfo(y.dtype).tiny)
        errors = torch.stack([((system.solve(each) - y[apart]) ** 2).mean(0) / spread for each in PENALTIES])
        best = [int(part.sum(dim=1).argmin()) for part in errors.split(widths, dim=1)]
    whole = _System(x, y, x_test)
    found = {number: whole.solve(PENALTIES[number]).split(widths, dim=1) for number in set(best)}
    return {name: found[number][at] for at, (name, number) in enumerate(zip(targets, best, strict=True))}


class _System:
    """Clips to fit, and clips to predict, of which only the penalty is open."""

    def __init__(self, x: Tensor, y: Tensor, test: Tensor) -> None:
        self.centre, self.mean = x.mean(dim=0), y.mean(dim=0)
        x, y, test = x - self.centre, y - self.mean, test - self.centre
        if len(x) < x.shape[1]:
            self.gram, self.right, self.test = x @ x.T, y, test @ x.T
        else:
            self.gram, self.right, self.test = x.T @ x, x.T @ y, test
        self.dims = x.shape[1]

    def solve(self, penalty: float) -> Tensor:
        loaded = self.gram.clone()
        loaded.diagonal().add_(penalty * self.dims)
        return self.test @ torch.cholesky_solve(self.right, torch.linalg.cholesky(loaded)) + self.mean


def _scaling(features: Tensor) -> tuple[Tensor, Tensor]:
    deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
    floor = max(FLOOR_OF_MEDIAN * float(deviation.median()), FLOOR_OF_LARGEST * float(deviation.max()))
    return mean, deviation.clamp(min=floor or 1.0)


def _r2(
    fitted: Shaped[np.ndarray, "fit_clips dims"],
    truth: Shaped[np.ndarray, "clips dims"],
    predicted: Shaped[np.ndarray, "clips dims"],
) -> float:
    fitted, truth = fitted.astype(np.float64), truth.astype(np.float64)
    size = np.sqrt((truth**2).mean()) * STILL
    varying = (truth.std(0) > size) & (fitted.std(0) > size)
    if not varying.any():
        return float("nan")
    errors = ((predicted - truth) ** 2).mean(0)[varying]
    return float((1 - errors / ((truth - fitted.mean(0)) ** 2).mean(0)[varying]).mean())
