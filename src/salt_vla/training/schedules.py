"""Rates as pure functions of the step. Source: facebookresearch/vjepa2, src/utils/schedulers.py."""

from __future__ import annotations

import math


def cosine(step: int, *, start: float, final: float, total_steps: int) -> float:
    """final + (start − final)·(1 + cos(π·step/total)) / 2; constant at `final` after the end."""
    progress = min(max(step / max(total_steps, 1), 0.0), 1.0)
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    step: int, *, start: float, peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Linear from `start` to `peak` over `warmup_steps`, then cosine to `final` at `total_steps`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return cosine(
        step - warmup_steps, start=peak, final=final, total_steps=max(total_steps - warmup_steps, 1)
    )


def warmup_cooldown(
    step: int,
    *,
    start: float,
    peak: float,
    final: float,
    warmup_steps: int,
    cooldown_steps: int,
    total_steps: int,
) -> float:
    """Linear from `start` to `peak` over `warmup_steps`, constant, then linear to `final` over the last
    `cooldown_steps` before `total_steps` (Hägele et al. 2024, arXiv:2405.18392, equation 1 with a linear
    cooldown)."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    left = max(total_steps - step, 0)
    if left >= cooldown_steps:
        return peak  # To the last bit, so that runs of any length are one up to here.
    return final + (peak - final) * left / cooldown_steps
