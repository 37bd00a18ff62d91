"""Statistics by episode, merged, equal those of all frames at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.data.lerobot_statistics import merge_statistics, summarise


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_merged_statistics_equal_those_of_everything(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(), 2, (length, 3)).astype(np.float32) for length in lengths]
    merged = merge_statistics([summarise(part) for part in parts])
    everything = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(merged.mean, everything.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(merged.std, everything.std(axis=0), atol=1e-9)
    np.testing.assert_array_equal(merged.minimum, everything.min(axis=0))
    np.testing.assert_array_equal(merged.maximum, everything.max(axis=0))
    assert merged.count == sum(lengths)


@pytest.mark.parametrize("low_high", [(0, 256), (7, 9), (0, 1), (255, 256)])
def test_images_are_summarised_per_channel(low_high: tuple[int, int]) -> None:
    film = np.random.default_rng(0).integers(*low_high, (5, 6, 8, 3)).astype(np.uint8)
    statistics = summarise(film)
    pixels = film.reshape(-1, 3) / 255
    for figure, expected in (
        (statistics.minimum, pixels.min(axis=0)),
        (statistics.maximum, pixels.max(axis=0)),
        (statistics.mean, pixels.mean(axis=0)),
        (statistics.std, pixels.std(axis=0)),
    ):
        assert figure.shape == (3, 1, 1)
        np.testing.assert_allclose(figure.ravel(), expected, atol=1e-7)
    assert statistics.count == 5


def test_booleans_and_scalars_are_one_entry_wide() -> None:
    statistics = summarise(np.array([False, True, True, True]))
    assert statistics.to_json() == {
        "min": [0.0],
        "max": [1.0],
        "mean": [0.75],
        "std": [pytest.approx(np.sqrt(3) / 4)],
        "count": [4],
    }


def test_large_offsets_do_not_drown_the_spread() -> None:
    parts = [np.full(10, 1e6) + spread for spread in (0.0, 0.001)]
    merged = merge_statistics([summarise(part) for part in parts])
    assert merged.std[0] == pytest.approx(0.0005, rel=1e-3)
