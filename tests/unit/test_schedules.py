"""Rates are pure functions of the step, right at their ends, and torch's where torch has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR

from salt_vla.training.schedules import cosine, warmup_cooldown, warmup_cosine

RATES = {"start": 2e-4, "peak": 6.25e-4, "final": 1e-6, "warmup_steps": 10, "total_steps": 50}


def warmed(step: int, **changes: float) -> float:
    return warmup_cosine(step, **{**RATES, **changes})  # type: ignore[arg-type]


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = CosineAnnealingLR(optimizer, T_max=40, eta_min=0.02)
    for step in range(41):
        assert cosine(step, start=0.3, final=0.02, total_steps=40) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("step", "value"), [(0, 0.04), (50, 0.22), (100, 0.4), (101, 0.4), (10_000, 0.4)])
def test_cosine_begins_and_ends_as_asked_and_stays_there(step: int, value: float) -> None:
    assert cosine(step, start=0.04, final=0.4, total_steps=100) == pytest.approx(value)


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 2e-4), (5, 4.125e-4), (10, 6.25e-4), (30, (6.25e-4 + 1e-6) / 2), (50, 1e-6), (51, 1e-6)],
)
def test_warm_up_is_linear_then_cosine_to_the_end(step: int, value: float) -> None:
    assert warmed(step) == pytest.approx(value)


def test_warm_up_meets_the_cosine_without_a_step() -> None:
    slope = (RATES["peak"] - RATES["start"]) / RATES["warmup_steps"]
    assert warmed(10) - warmed(9) == pytest.approx(slope)
    assert abs(warmed(11) - warmed(10)) < slope


def test_no_warm_up_is_the_cosine_from_its_peak() -> None:
    for step in (0, 7, 50):
        expected = cosine(step, start=RATES["peak"], final=RATES["final"], total_steps=50)
        assert warmed(step, warmup_steps=0) == expected


@pytest.mark.parametrize("warmup_steps", [50, 80])
def test_warm_up_as_long_as_the_run_never_falls(warmup_steps: int) -> None:
    rates = [warmed(step, warmup_steps=warmup_steps) for step in range(50)]
    assert rates == sorted(rates) and rates[-1] < RATES["peak"]


@given(
    step=st.integers(0, 10_000),
    warmup=st.integers(0, 500),
    total=st.integers(1, 5_000),
    peak=st.floats(1e-5, 1),
)
def test_rate_stays_between_its_corners(step: int, warmup: int, total: int, peak: float) -> None:
    rate = warmup_cosine(step, start=0.0, peak=peak, final=0.0, warmup_steps=warmup, total_steps=total)
    assert 0 <= rate <= peak * (1 + 1e-12)


COOLDOWN = {**RATES, "cooldown_steps": 20}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 2e-4),
        (5, 4.125e-4),
        (10, 6.25e-4),
        (29, 6.25e-4),
        (30, 6.25e-4),
        (40, 3.13e-4),
        (50, 1e-6),
        (99, 1e-6),
    ],
)
def test_a_cooldown_is_constant_then_linear_to_the_end(step: int, value: float) -> None:
    assert warmup_cooldown(step, **COOLDOWN) == pytest.approx(value)  # type: ignore[arg-type]


def test_no_cooldown_stays_at_the_peak() -> None:
    assert warmup_cooldown(50, **COOLDOWN | {"cooldown_steps": 0}) == RATES["peak"]  # type: ignore[arg-type]


@given(st.integers(11, 49), st.integers(0, 40))
def test_before_its_cooldown_a_run_knows_nothing_of_its_length(step: int, cooldown_steps: int) -> None:
    """So one long run gives many budgets: any of its checkpoints can be cooled down."""
    if step < 50 - cooldown_steps:
        short = warmup_cooldown(step, **COOLDOWN | {"cooldown_steps": cooldown_steps})  # type: ignore[arg-type]
        assert short == warmup_cooldown(step, **COOLDOWN | {"total_steps": 10_000})  # type: ignore[arg-type]
