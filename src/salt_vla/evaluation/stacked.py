"""Rows of several arrays of one shape, one array after another, read when they are asked for.

Stands where features mapped from one file stand. Knows nothing of what the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int64, Shaped


class Stacked:
    """`kept` rows of the first array, then the same ones of the second, … . As an array it is asked for its
    length, shape and rows; made one (`numpy.asarray`), it is read whole."""

    def __init__(
        self, arrays: Sequence[Shaped[np.ndarray, " rows *dims"]], kept: Int64[np.ndarray, " kept"]
    ) -> None:
        self.arrays, self.kept = arrays, kept
        self.shape = (len(arrays) * len(kept), *arrays[0].shape[1:])
        self.dtype, self.ndim, self.size = arrays[0].dtype, arrays[0].ndim, math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int64[np.ndarray, " asked"]) -> Shaped[np.ndarray, " asked *dims"]:
        numbers = np.arange(len(self))[rows]
        which, place = np.divmod(numbers, max(len(self.kept), 1))
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for number in np.unique(which):
            mine = np.flatnonzero(which == number)
            found[mine] = self.arrays[number][self.kept[place[mine]]]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)
