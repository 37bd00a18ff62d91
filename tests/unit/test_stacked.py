"""Arrays one after another are asked for rows, and are what concatenating them would give."""

from __future__ import annotations

import numpy as np
import pytest

from salt_vla.evaluation.stacked import Stacked

KEPT = np.array([0, 2, 3, 6])


@pytest.fixture
def arrays() -> list[np.ndarray]:
    return [np.arange(14, dtype=np.float32).reshape(7, 2) + 100 * number for number in range(3)]


@pytest.mark.parametrize("rows", [np.array([11, 0, 4, 4]), slice(2, 9), slice(None), np.array([], np.int64)])
def test_rows_are_those_of_the_arrays_put_together(arrays: list[np.ndarray], rows: object) -> None:
    whole = np.concatenate([each[KEPT] for each in arrays])
    stacked = Stacked(arrays, KEPT)
    assert np.array_equal(stacked[rows], whole[rows])  # type: ignore[index]
    assert (len(stacked), stacked.shape, stacked.ndim, stacked.size) == (12, (12, 2), 2, 24)
    assert stacked[rows].dtype == np.float32  # type: ignore[index]


def test_as_an_array_it_is_read_whole(arrays: list[np.ndarray]) -> None:
    whole = np.concatenate([each[KEPT] for each in arrays])
    assert np.array_equal(np.asarray(Stacked(arrays, KEPT)), whole)
    assert np.asarray(Stacked(arrays, KEPT), np.float64).dtype == np.float64
    assert np.isfinite(Stacked(arrays, KEPT)).all()


def test_no_more_is_read_than_is_asked_for(arrays: list[np.ndarray]) -> None:
    class Watched(np.ndarray):
        read = 0

        def __getitem__(self, rows: object) -> np.ndarray:
            Watched.read += len(rows)  # type: ignore[arg-type]
            return np.asarray(super().__getitem__(rows))  # type: ignore[call-overload]

    stacked = Stacked([each.view(Watched) for each in arrays], KEPT)
    assert Watched.read == 0
    assert stacked[np.array([1, 9])].tolist() == [[4, 5], [204, 205]]
    assert Watched.read == 2
