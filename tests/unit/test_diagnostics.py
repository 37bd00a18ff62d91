"""Spectrum, CKA, latency and the regression over runs are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from salt_vla.errors import DataError
from salt_vla.evaluation.diagnostics import cka, latency, likeness, spectrum
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.regression import FEWEST_RUNS, regress
from salt_vla.geometry import ClipGeometry


def noise(clips: int = 60, dims: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([1, seed]).standard_normal((clips, dims))


def by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of HSIC, summed over all sets of different clips."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        total = 0.0
        for i in range(n):
            for j in set(range(n)) - {i}:
                total += k[i, j] * m[i, j] / (n * (n - 1))
                for q in set(range(n)) - {i, j}:
                    total -= 2 * k[i, j] * m[i, q] / (n * (n - 1) * (n - 2))
                    for r in set(range(n)) - {i, j, q}:
                        total += k[i, j] * m[q, r] / (n * (n - 1) * (n - 2) * (n - 3))
        return total

    kernels = [each @ each.T for each in (first, second)]
    pairs = (kernels, [kernels[0]] * 2, [kernels[1]] * 2)
    both, one, other = (hsic(*pair) for pair in pairs)
    return both / np.sqrt(one * other)


def test_cka_equals_the_sum_over_all_sets_of_four_clips() -> None:
    first, second = noise(6, 3), noise(6, 5, seed=1) + noise(6, 3) @ noise(3, 5, seed=2)
    assert cka(first, second) == pytest.approx(by_hand(first, second), abs=1e-10)


def test_cka_does_not_see_rotation_scale_or_a_shift() -> None:
    features = noise()
    rotation = np.linalg.qr(noise(8, 8, seed=3))[0]
    assert cka(features, 7 * features @ rotation + 5) == pytest.approx(1.0)
    assert cka(features, features) == pytest.approx(1.0)


def test_unrelated_wide_features_are_not_alike() -> None:
    # The plain estimate would be near 1 here: 2,000 dimensions of 40 clips.
    found = [cka(noise(40, 2000, seed=n), noise(40, 2000, seed=100 + n)) for n in range(20)]
    assert abs(np.mean(found)) < 0.05


def test_likeness_falls_with_noise() -> None:
    features = noise()
    found = likeness({"a": features, "b": features + 0.3 * noise(seed=4), "c": features + 3 * noise(seed=5)})
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "b"] > 0.8 > found["a", "c"]


def test_cka_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(DataError, match="the same 4 clips"):
        cka(noise(3), noise(3))
    with pytest.raises(DataError, match="the same 4 clips"):
        cka(noise(9), noise(8))
    with pytest.raises(DataError, match="vary from clip to clip"):
        cka(noise(), np.ones((60, 4)))


@pytest.mark.parametrize(("clips", "dims"), [(500, 6), (5, 40)])
def test_a_spectrum_is_that_of_principal_components(clips: int, dims: int) -> None:
    features = noise(clips, dims) * (1 + np.arange(dims))
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False)
    found = spectrum(features)
    np.testing.assert_allclose(found.shares[: len(singular)], singular**2 / (singular**2).sum(), atol=1e-9)
    shares = singular[singular > 1e-9] / singular.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert found.dims == dims


def test_features_of_one_direction_have_rank_one_and_still_ones_none() -> None:
    line = noise(50, 1) @ noise(1, 12, seed=2)
    assert spectrum(line).effective_rank == pytest.approx(1.0, abs=1e-3)
    assert spectrum(np.ones((5, 3))).effective_rank == 0.0
    with pytest.raises(DataError, match="2 clips or more"):
        spectrum(noise(1))


class Counting(Pixels):
    """Remembers the clips that it was asked for."""

    def __init__(self, geometry: ClipGeometry) -> None:
        super().__init__(geometry)
        self.seen: list[np.ndarray] = []

    def latents(self, frames_uint8):  # type: ignore[no-untyped-def]
        self.seen.append(frames_uint8.numpy().copy())
        return super().latents(frames_uint8)


def test_a_stream_moves_by_one_tubelet_a_clip() -> None:
    model = Counting(ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16))
    found = latency(model, repeats=5)
    assert 0 < found.p50 <= found.p95
    assert found.stride == 2
    assert 0 < found.frames_per_second <= 2 / min(found.p50, found.p95) * 5
    for before, after in zip(model.seen[3:], model.seen[4:], strict=False):
        assert np.array_equal(before[:, 2:], after[:, :-2])
        assert not np.array_equal(before[:, :2], after[:, :2])


def runs(count: int, noise_size: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([2, seed])
    x = random.uniform(0, 1, count)
    return x, 2 - 3 * x + noise_size * random.standard_normal(count)


def test_a_regression_is_scipys_line() -> None:
    x, y = runs(12, 0.3)
    found, line = regress(x, y), stats.linregress(x, y)
    assert (found.slope, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert (found.pearson, found.r2) == pytest.approx((line.rvalue, line.rvalue**2))
    assert 0 <= found.low <= found.r2 <= found.high <= 1
    assert found == regress(x, y)


def test_a_law_without_noise_is_found_whole() -> None:
    found = regress(*runs(6, 0.0))
    assert (found.r2, found.r2_left_out) == pytest.approx((1.0, 1.0))
    assert found.low == pytest.approx(1.0)


@pytest.mark.parametrize("count", [5, 10, 20])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.0])
def test_the_interval_over_runs_holds_the_truth(count: int, share: float) -> None:
    """Few runs, and no law at all, are where percentiles of resamples miss it."""
    hits = []
    for repeat in range(200):
        random = np.random.default_rng([count, repeat])
        x, away = random.standard_normal((2, count))
        found = regress(x, np.sqrt(share) * x + np.sqrt(1 - share) * away)
        assert 0 <= found.low <= found.r2 <= found.high <= 1
        hits.append(found.low <= share <= found.high)
    assert np.mean(hits) > 0.91, "95 % less three standard errors of 200 draws"


def test_the_interval_over_runs_is_fishers_jackknife_by_hand() -> None:
    x, y = np.array([0.0, 1, 2, 3, 4]), np.array([0.1, 0.9, 2.3, 2.8, 4.2])
    z = [np.arctanh(stats.pearsonr(np.delete(x, n), np.delete(y, n))[0]) for n in range(5)]
    reach = stats.t.ppf(0.975, 3) * np.sqrt(4 * np.var(z))
    middle = np.arctanh(stats.pearsonr(x, y)[0])
    found = regress(x, -y)
    expected = np.tanh([middle - reach, middle + reach]) ** 2
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_where_there_is_no_law_left_out_runs_are_not_foretold() -> None:
    random = np.random.default_rng(3)
    found = [regress(random.standard_normal(8), random.standard_normal(8)) for _ in range(20)]
    assert np.mean([each.r2_left_out for each in found]) < 0
    assert np.mean([each.high - each.low for each in found]) > 0.4


def test_too_few_runs_and_figures_that_do_not_vary_are_refused() -> None:
    with pytest.raises(DataError, match=f"{FEWEST_RUNS} runs or more"):
        regress(*runs(3, 0.1))
    with pytest.raises(DataError, match="same in every run"):
        regress(np.ones(5), np.arange(5.0))
    with pytest.raises(DataError, match="numbers"):
        regress(np.array([1, 2, 3, np.nan]), np.arange(4.0))
