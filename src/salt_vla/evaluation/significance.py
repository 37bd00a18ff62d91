"""P-values beside intervals: paired sign flips over episodes, and Holm's correction for several targets.

Knows sums over episodes; neither encoders nor how tables look.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from salt_vla.errors import DataError
from salt_vla.evaluation.statistics import MIN_EPISODES_FOR_CLAIMS, EpisodeSums

if TYPE_CHECKING:
    from jaxtyping import Float

EXACT_EPISODES = 13  # Up to so many all 2^episodes outcomes are counted,
DRAWN_EPISODES = 1000  # up to so many they are drawn, and above their sum is as good as normal.
DRAWS = 9_999
# Outcomes that differ from the observed one by rounding alone are as extreme.
ROUNDING = 1e-9


def sign_flip_p_value(first: EpisodeSums, second: EpisodeSums) -> float:
    """How often two predictors that were as good as each other would differ as much as these, or more.

    If they were, either could have made an episode's predictions, so each episode's part of the difference is
    as likely with the other sign (Fisher's randomisation test, two-sided; drawn outcomes count the observed
    one: Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010). A difference of R², too, is a sum over
    episodes, since both are measured against the same spread. 1 where the figure rests on fewer episodes than
    claims need (`EpisodeSums.support`): flipping the others' signs would say nothing of the few. A pure
    function. Raises `DataError` where the episodes are not the same.
    """
    if not np.array_equal(first.episodes, second.episodes):
        raise DataError("a paired test needs two predictors of the same held-out episodes")
    rests_on = min(first.support, second.support)
    if rests_on < min(MIN_EPISODES_FOR_CLAIMS, len(first.episodes)):
        return 1.0
    parts = second.shares() - first.shares()
    parts = parts[parts != 0]
    observed, count = abs(float(parts.sum())), len(parts)
    if not count:
        return 1.0
    if count > DRAWN_EPISODES:
        return float(min(1.0, 2 * norm.sf(observed / np.sqrt((parts**2).sum()))))
    outcomes = np.abs(_signs(count) @ parts)
    extreme = int((outcomes >= observed * (1 - ROUNDING)).sum())
    drawn = count > EXACT_EPISODES
    return (extreme + drawn) / (len(outcomes) + drawn)


@lru_cache(maxsize=4)
def _signs(count: int) -> Float[np.ndarray, "outcomes episodes"]:
    """All ways to flip so many signs, or `DRAWS` of them, the same ones always."""
    if count <= EXACT_EPISODES:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        bits = np.random.default_rng(count).integers(0, 2, (DRAWS, count), np.int8)
    return np.asarray(bits * 2.0 - 1, np.float32)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, in their own order (Holm, Scand. J. Statist. 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    highest = 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min((len(order) - rank) * p_values[at], 1.0))
        corrected[at] = highest
    return [float(p) for p in corrected]


def holm_within(families: Sequence[Hashable], p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected within their families; None for those that are none."""
    places: dict[Hashable, list[int]] = {}
    for place, (family, p) in enumerate(zip(families, p_values, strict=True)):
        if p is not None:
            places.setdefault(family, []).append(place)
    found: list[float | None] = [None] * len(p_values)
    for mine in places.values():
        for place, p in zip(mine, holm([p_values[at] or 0.0 for at in mine]), strict=True):
            found[place] = p
    return found
