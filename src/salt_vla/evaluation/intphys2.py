"""Whether possible films surprise less than impossible ones: relative accuracy, its interval and its p-value.

Knows paired numbers and the scenes that they belong to; neither films nor models, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.statistics import EpisodeSums, share_sums

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    Surprises = Sequence[float] | Float[np.ndarray, " pairs"]
    Groups = Sequence[Hashable] | np.ndarray

RESAMPLES = 2000
AT_ONCE = 500


def relative_accuracy(
    possible: Surprises,
    impossible: Surprises,
    groups: Groups | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(value, low, high): the share of pairs in which the possible film surprises strictly less than its
    impossible twin, and the middle 95 % of it over `resamples` draws of whole groups with replacement.

    Ties are not wins. `groups`: what a pair belongs to, such as its scene; None: every pair stands alone.
    One group tells nothing of others, so its interval is 0 … 1. Raises `DataError` for no pairs, lengths that
    differ, and surprises that are no numbers. Source: Bordes et al., arXiv:2506.09849, section 4.
    """
    sums = pair_sums(possible, impossible, groups)
    count = len(sums.episodes)
    if count < 2:
        return sums.value, 0.0, 1.0
    random = np.random.default_rng(seed)
    blocks = []
    for start in range(0, resamples, AT_ONCE):
        rows = min(AT_ONCE, resamples - start)
        weights = random.multinomial(count, np.full(count, 1 / count), size=rows)
        blocks.append(1 - (weights @ sums.wrong[:, 0]) / (weights @ sums.clips))
    low, high = np.quantile(np.concatenate(blocks), [0.025, 0.975])
    return sums.value, float(low), float(high)


def pair_sums(possible: Surprises, impossible: Surprises, groups: Groups | None = None) -> EpisodeSums:
    """Wins and pairs of each group, as the tables keep them. Raises as `relative_accuracy`."""
    first, second, where = _checked(possible, impossible, groups)
    return share_sums("relative_accuracy", first < second, where)


def chance_p_value(possible: Surprises, impossible: Surprises, groups: Groups | None = None) -> float:
    """How often chance alone would give as many wins less losses, or more (one-sided).

    If surprise knew nothing of possibility, the labels of a scene's films could be swapped, and its wins less
    losses would be as likely with the other sign. All pairs of a group are swapped together, since they share
    a scene: an exact sign-flip test over groups, every one of the 2^groups outcomes counted by adding the
    groups' two-point distributions. Ties tell nothing for either side. Where each pair is its own group this
    is the sign test. Raises as `relative_accuracy`.
    """
    first, second, where = _checked(possible, impossible, groups)
    balance = np.zeros(int(where.max()) + 1, np.int64)
    np.add.at(balance, where, (first < second).astype(np.int64) - (first > second))
    steps = np.abs(balance[balance != 0])
    chances = np.ones(1)
    for step in steps:  # `chances[k]`: of a sum of k − (len − 1) / 2; grows by `step` on either side.
        wider = np.zeros(len(chances) + 2 * step)
        wider[: len(chances)] += chances / 2
        wider[2 * step :] += chances / 2
        chances = wider
    middle = (len(chances) - 1) // 2
    return float(min(chances[middle + int(balance.sum()) :].sum(), 1.0))


def _numbers(groups: Groups) -> Int64[np.ndarray, " pairs"]:
    """Equal groups have one number; numpy would make 1 and "1" equal, and (1, 2) two groups."""
    numbers: dict[Hashable, int] = {}
    try:
        return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
    except TypeError as error:
        raise DataError(f"a pair's group is one name, number or tuple: {error}") from error


def _checked(
    possible: Surprises, impossible: Surprises, groups: Groups | None
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Both sides as float64, and the number of each pair's group."""
    sides = []
    for name, values in (("possible", possible), ("impossible", impossible)):
        try:
            side = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"surprises of {name} films must be numbers: {error}") from error
        if side.ndim != 1:
            raise DataError(f"surprises of {name} films are one number a pair, not of shape {side.shape}")
        if not np.isfinite(side).all():
            at = int(np.flatnonzero(~np.isfinite(side))[0])
            raise DataError(
                f"the surprise of the {name} film of pair {at} is {side[at]}; leave the pair out or mend it"
            )
        sides.append(side)
    first, second = sides
    where = np.arange(len(first)) if groups is None else _numbers(groups)
    if not len(first) == len(second) == len(where):
        raise DataError(
            f"{len(first)} possible and {len(second)} impossible films with {len(where)} groups make no "
            "pairs: give one of each a pair"
        )
    if not len(first):
        raise DataError("relative accuracy needs at least one pair of films")
    return first, second, where
