"""Text embeddings that a person hands in as a file, and how they meet an encoder's features.

Knows arrays and names; neither clips nor networks, and runs nothing that a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from salt_vla.errors import DataError
from salt_vla.evaluation.probes import fit_basis, ridge_probe

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

MADE_WITH = "a list of one text a row, such as the data set's tasks or class names"


@dataclass(frozen=True)
class Texts:
    """One embedding a text."""

    names: tuple[str, ...]
    embeddings: Float[np.ndarray, "texts dims"]

    def numbers(self, labels: Sequence[str]) -> Int64[np.ndarray, " labels"]:
        """Each label's row. Raises `DataError` naming the first that has none."""
        rows = {name: row for row, name in enumerate(self.names)}
        missing = sorted(set(labels) - rows.keys())
        if missing:
            raise DataError(
                f"the file of text embeddings has none for the label {missing[0]!r} ({len(missing)} such "
                f"label(s)); it has {len(rows)} texts, the first: {self.names[0]!r}"
            )
        return np.array([rows[label] for label in labels], np.int64)


def read_texts(path: Path) -> Texts:
    """`path`: (texts, dims) floats as .npy, or as the one tensor of a .safetensors file; beside it a .json of
    the same name with the list of texts. Raises `DataError` for anything else; nothing is unpickled."""
    if not path.is_file():
        raise DataError(
            f"there is no file of text embeddings {path}; give --text a .npy or .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if len(tensors) != 1:
                raise DataError(
                    f"{path} holds {len(tensors)} tensors; text embeddings are one, (texts, dims)"
                )
            (values,) = tensors.values()
        else:
            values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no .npy or .safetensors file of numbers: {reason}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or not values.size:
        shape = values.shape if isinstance(values, np.ndarray) else "several arrays"
        raise DataError(f"{path} must hold floats of shape (texts, dims), not {shape}")
    values = values.astype(np.float32)
    is_whole = np.isfinite(values).all(1) & (np.abs(values).sum(1) > 0)
    names = _names(path.with_suffix(".json"), len(values))
    if not is_whole.all():
        raise DataError(
            f"{path}: the embedding of {names[int(np.argmin(is_whole))]!r} is zero, NaN or infinite"
        )
    return Texts(names, values)


def _names(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; it must be {MADE_WITH}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} must be {MADE_WITH}, in JSON")
    if len(names) != count:
        raise DataError(f"{path} names {len(names)} texts for {count} embeddings")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path} names {twice[0]!r} twice")
    return tuple(names)


def mapped(
    encoder: str,
    texts: Texts,
    train: Float[np.ndarray, "clips dims"],
    numbers: Int64[np.ndarray, " clips"],
    episodes: Int64[np.ndarray, " clips"],
) -> tuple[Float[np.ndarray, "texts dims"], float | None]:
    """Every text where its clips' features should lie: ridge regression of training clips' features on their
    texts' embeddings (`numbers`: rows of `texts`), the penalty chosen by folds over training episodes; and
    that penalty."""
    basis = fit_basis(f"text for {encoder}", texts.embeddings[numbers], texts.embeddings)
    fit = ridge_probe(basis, {"features": np.asarray(train, np.float64)}, episodes)["features"]
    return fit.predicted, fit.alpha
