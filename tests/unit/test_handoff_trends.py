"""Whether a loss still falls or stands is said rightly of curves whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from salt_vla.operations.handoff.trends import STANDS_SHARE, trend

STEPS = np.arange(20, 4001, 20)  # 200 lines, as a run of 4,000 steps writes them


def noise(seed: int, deviation: float, memory: float = 0.0) -> np.ndarray:
    """Of that deviation; `memory` is what a line has of the one before."""
    drawn = np.random.default_rng(seed).normal(0, deviation, len(STEPS))
    for place in range(1, len(drawn)):
        drawn[place] = memory * drawn[place - 1] + np.sqrt(1 - memory**2) * drawn[place]
    return drawn


def test_a_straight_line_has_exactly_its_slope() -> None:
    found = trend(list(STEPS), list(5 - STEPS / 1000))
    assert found is not None
    assert (found.first, found.last) == (2020, 4000)
    assert found.change == pytest.approx(-1.98)
    assert (found.low, found.high) == (pytest.approx(-1.98), pytest.approx(-1.98))
    assert found.level == pytest.approx(5 - (2020 + 4000) / 2 / 1000, abs=0.1)
    assert found.verdict == "still falls"


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.5])
def test_a_power_law_still_falls(exponent: float) -> None:
    for seed in range(20):
        found = trend(list(STEPS), list(STEPS**-exponent * (1 + noise(seed, 0.02))))
        assert found is not None and found.verdict == "still falls"


def test_a_curve_that_has_reached_its_floor_stands() -> None:
    for seed in range(20):
        curve = 11.5 + 4 * np.exp(-STEPS / 200) + noise(seed, 0.05)
        found = trend(list(STEPS), list(curve))
        assert found is not None and found.verdict == "stands"
        assert max(abs(found.low), abs(found.high)) <= STANDS_SHARE * found.level


def test_a_flat_curve_is_rarely_said_to_fall_whatever_its_noise() -> None:
    """Less often than the 2.5 % that an interval of 95 % allows on one side; also of lines that resemble the
    one before."""
    for memory in (0.0, 0.5):
        said = [
            found.verdict
            for seed in range(400)
            if (found := trend(list(STEPS), list(1 + noise(seed, 0.3, memory)))) is not None
        ]
        assert len(said) == 400
        assert said.count("still falls") <= 14  # 2.5 % of 400 are 10; 14 is one deviation more.


def test_the_interval_is_sens_and_turns_with_the_curve() -> None:
    """Of bins whose neighbours have nothing in common, as scipy takes them."""
    compared = 0
    for seed in range(40):
        x, y = np.arange(1.0, 33.0), np.random.default_rng(seed).normal(size=32)
        found, turned = trend(list(x), list(y)), trend(list(x), list(-y))
        assert found is not None and turned is not None
        assert (turned.change, turned.low, turned.high) == (-found.change, -found.high, -found.low)
        late, values = x[16:], y[16:]
        bins, medians = late.reshape(8, 2).mean(1), np.median(values.reshape(8, 2), 1)
        slope, _, low, high = stats.theilslopes(medians, bins)
        left = medians - slope * bins
        left -= left.mean()
        if left[1:] @ left[:-1] <= 0:
            compared += 1
            assert (found.change, found.low, found.high) == pytest.approx((15 * slope, 15 * low, 15 * high))
        else:
            assert found.low <= 15 * low and 15 * high <= found.high
    assert compared >= 10


def test_noise_with_a_long_memory_is_seldom_taken_for_a_trend() -> None:
    """Bins as if they were independent are so taken in more than a third of these curves."""
    said = [
        found.verdict
        for seed in range(300)
        if (found := trend(list(STEPS), list(1 + noise(seed, 0.3, 0.95)))) is not None
    ]
    assert said.count("still falls") + said.count("rises") <= 60


def test_a_curve_without_noise_falls_though_no_line_fits_it() -> None:
    for exponent in (0.1, 0.5, 2.0):
        found = trend(list(STEPS), list(STEPS.astype(float) ** -exponent))
        assert found is not None and found.verdict == "still falls"


def test_what_noise_hides_is_not_called_a_plateau() -> None:
    found = trend(list(STEPS), list(1 + noise(0, 0.5)))
    assert found is not None and found.verdict == "cannot be told"


def test_a_rising_curve_rises() -> None:
    found = trend(list(STEPS), list(1 + STEPS / 4000 + noise(1, 0.02)))
    assert found is not None and found.verdict == "rises"


def test_spikes_and_lines_without_a_number_decide_nothing() -> None:
    curve = 11.5 + noise(2, 0.02)
    calm = trend(list(STEPS), list(curve))
    curve[[120, 150, 199]] = [1e6, np.nan, np.inf]
    spiked = trend(list(STEPS), list(curve))
    assert calm is not None and spiked is not None
    assert spiked.verdict == calm.verdict == "stands"
    assert spiked.change == pytest.approx(calm.change, abs=0.02)


@pytest.mark.parametrize("count", [0, 1, 31])
def test_of_few_lines_nothing_is_said(count: int) -> None:
    assert trend(list(STEPS[:count]), [1.0] * count) is None


def test_thirty_four_lines_are_enough() -> None:
    assert trend(list(STEPS[:34]), [1.0] * 34) is not None
