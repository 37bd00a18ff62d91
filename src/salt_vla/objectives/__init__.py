"""What a prediction is held to: a regression chosen by name, optional terms beside it, explained variance.

Pure functions of tensors; knows neither models, masks nor where targets come from.
"""

from salt_vla.objectives.contrastive import info_nce
from salt_vla.objectives.regression import explained_variance, latent_regression, normalise
from salt_vla.objectives.vicreg import covariance_term, pooled, variance_term
from salt_vla.objectives.whole import check_objective, objective

__all__ = [
    "check_objective",
    "covariance_term",
    "explained_variance",
    "info_nce",
    "latent_regression",
    "normalise",
    "objective",
    "pooled",
    "variance_term",
]
