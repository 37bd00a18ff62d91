"""The probe `linear`: ridge regression for quantities, a linear classifier for classes.

Chooses where the features lie while they are fitted: in memory, or on disk. Knows no encoder.
"""

from __future__ import annotations

from typing import Literal

from threadpoolctl import threadpool_limits

from salt_vla.evaluation.classes import logistic_probe
from salt_vla.evaluation.probes import LARGE, ProbeFit, Problem, fit_basis, ridge_probe
from salt_vla.evaluation.streamed import fit_streamed


class LinearProbe:
    """All targets from one rotation of the features, or one Gram matrix."""

    reads: Literal["vector", "tokens"] = "vector"
    protocols: tuple[str, ...] = ("held-out",)

    def fit(self, problem: Problem) -> dict[str, ProbeFit]:
        """Penalties are chosen by folds over training episodes; no features at all predict the mean, or the
        most frequent class.

        Many clips (`LARGE`, and no fewer than features) are read block by block.
        """
        clips, dims = problem.train.shape
        if clips > LARGE and clips >= dims > 0:
            return fit_streamed(problem)
        quantities = {name: y for name, y in problem.targets.items() if y.dtype.kind not in "UO"}
        # Up to so many clips one thread is as fast as two on an idle machine, and several times faster on a
        # busy one, where threads wait for each other at every small product.
        with threadpool_limits(limits=1 if clips <= LARGE else None):
            basis = fit_basis(problem.encoder, problem.train, problem.test)
            fits = ridge_probe(basis, quantities, problem.episodes)
            for name, labels in problem.targets.items():
                if name not in quantities:
                    fits[name] = logistic_probe(basis, labels, problem.episodes, problem.seed)
        return fits
