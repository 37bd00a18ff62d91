"""An encoder that says the same of every clip, but for rounding, is not one of full rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from salt_vla.errors import DataError
from salt_vla.evaluation.diagnostics import cka, spectrum
from salt_vla.evaluation.suites.dynamics import _side_by_side
from salt_vla.training.metrics import centred_rank, effective_rank


@pytest.fixture
def collapsed() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (3.3 * (1 + 1e-7 * rng.normal(size=(50, 300)))).astype(np.float32)


def test_a_point_has_no_spectrum_and_is_like_nothing(collapsed: np.ndarray) -> None:
    assert spectrum(collapsed).effective_rank < 1.5 and not spectrum(collapsed).shares.any()
    other = np.random.default_rng(1).normal(size=(50, 20))
    with pytest.raises(DataError, match="features that vary from clip to clip; leave out first"):
        cka(collapsed, other)
    assert spectrum(collapsed + 1e-3 * np.random.default_rng(2).normal(size=(50, 300))).effective_rank > 40


def test_a_point_has_rank_one_in_training_too(collapsed: np.ndarray) -> None:
    rows = torch.from_numpy(collapsed)
    assert effective_rank(rows - rows.mean(dim=0)) > 40, "what the rounding alone would say"
    assert centred_rank(rows) == 1
    spread = torch.from_numpy(np.random.default_rng(3).normal(size=(64, 5)))
    assert centred_rank(spread) == effective_rank(spread - spread.mean(dim=0)) > 4


def test_tokens_of_two_moments_are_told_apart_and_vectors_are_one() -> None:
    rng = np.random.default_rng(0)
    now, later = rng.normal(size=(2, 3, 4, 5)).astype(np.float16)
    both, swapped = _side_by_side(now, later), _side_by_side(later, now)
    assert both.shape == (3, 8, 6) and both.dtype == np.float16
    assert both[:, :4, 5].max() == 0 and both[:, 4:, 5].min() == 1
    as_sets = [{tuple(token) for token in clips[0].tolist()} for clips in (both, swapped)]
    assert as_sets[0] != as_sets[1]
    assert _side_by_side(now[:, 0], later[:, 0]).shape == (3, 10)
