"""Retrieval by cosine: where the right answers of each query rank, and what mere chance would give.

Knows features and which answers are right; neither clips nor encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import xxhash
from scipy.special import gammaln

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

    from salt_vla.evaluation.statistics import Metric

QUERIES_AT_ONCE = 256
# A row shorter than this share of the longest one points nowhere: that is what rounding leaves.
SMALLEST_SHARE = 1e-6
RankedBy = Literal["recall_at_1", "recall_at_5", "mean_average_precision"]
CUTS: dict[RankedBy, int] = {"recall_at_1": 1, "recall_at_5": 5}
METRICS: tuple[Metric, ...] = (*CUTS, "mean_average_precision")


@dataclass(frozen=True)
class Lookup:
    """Who asks, who may answer, and which answers are right, as codes: an answer is right for a query of the
    same code. `own` is the gallery's number of the query itself, which may not answer (−1: not there)."""

    queries: Int64[np.ndarray, " queries"]
    gallery: Int64[np.ndarray, " gallery"]
    own: Int64[np.ndarray, " queries"]

    def right(self, rows: slice | Int64[np.ndarray, " rows"]) -> Bool[np.ndarray, "rows gallery"]:
        right = self.queries[rows, None] == self.gallery
        asked = self.own[rows]
        there = np.flatnonzero(asked >= 0)
        right[there, asked[there]] = False
        return right

    def counts(self) -> tuple[Int64[np.ndarray, " queries"], Int64[np.ndarray, " queries"]]:
        """Right answers and possible answers of each query."""
        codes, per_code = np.unique(self.gallery, return_counts=True)
        place = np.minimum(np.searchsorted(codes, self.queries), len(codes) - 1)
        found = np.where(codes[place] == self.queries, per_code[place], 0)
        is_there = self.own >= 0
        same = np.zeros(len(found), bool)
        same[is_there] = self.gallery[self.own[is_there]] == self.queries[is_there]
        return found - same, len(self.gallery) - is_there.astype(np.int64)


def unit_rows(values: Float[np.ndarray, "rows dims"]) -> Float[np.ndarray, "rows dims"]:
    """Every row of length 1. A row that is zero but for rounding becomes zeros, near to nothing."""
    values = np.asarray(values, np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    is_zero = lengths <= SMALLEST_SHARE * lengths.max(initial=0)
    return np.where(is_zero, 0, values / np.where(is_zero, 1, lengths))


def ranked(
    queries: Float[np.ndarray, "queries dims"],
    gallery: Float[np.ndarray, "gallery dims"],
    lookup: Lookup,
) -> dict[Metric, Float[np.ndarray, " queries"]]:
    """Each query's recall at 1 and at 5 (is a right answer among them?) and average precision (the mean, over
    its right answers, of the share of right ones down to there), by cosine. A tie is no win: of answers that
    are equally near the wrong ones come first.
    """
    if queries.shape[1:] != gallery.shape[1:]:
        raise DataError(f"queries of {queries.shape[1:]} numbers cannot be looked up in {gallery.shape[1:]}")
    wanted, answers = unit_rows(queries), unit_rows(gallery)
    found: dict[Metric, np.ndarray] = {metric: np.empty(len(wanted)) for metric in METRICS}
    ranks = np.arange(1, len(answers) + 1)
    one_each, same = _alike(answers)
    for first in range(0, len(wanted), QUERIES_AT_ONCE):
        rows = slice(first, min(first + QUERIES_AT_ONCE, len(wanted)))
        right = lookup.right(rows)
        # One of the query itself stands behind all others, and counts for nothing.
        near = (wanted[rows] @ answers[one_each].T)[:, same]
        asked = lookup.own[rows]
        there = np.flatnonzero(asked >= 0)
        near[there, asked[there]] = -np.inf
        hits = np.take_along_axis(right, np.lexsort((right, -near), axis=-1), axis=1)
        for metric, cut in CUTS.items():
            found[metric][rows] = hits[:, :cut].any(1)
        precision = hits * np.cumsum(hits, axis=1) / ranks
        found["mean_average_precision"][rows] = precision.sum(1) / np.maximum(hits.sum(1), 1)
    return found


def _alike(
    rows: Float[np.ndarray, "rows dims"],
) -> tuple[Int64[np.ndarray, " kinds"], Int64[np.ndarray, " rows"]]:
    """One of each kind of equal rows, and each row's kind: a product of matrices rounds by place, so that
    equal rows, each multiplied, may come out unequal."""
    hashes = [xxhash.xxh3_128_digest(row) for row in np.ascontiguousarray(rows + 0.0)]  # −0 is 0.
    kinds: dict[bytes, int] = {}
    same = np.array([kinds.setdefault(each, len(kinds)) for each in hashes], np.int64)
    return np.unique(same, return_index=True)[1], same


def by_chance(lookup: Lookup) -> dict[Metric, Float[np.ndarray, " queries"]]:
    """The expected values of `ranked` where answers stand in random order.

    With R right ones of N: recall at k is 1 − C(N − R, k) ÷ C(N, k); a right one at rank k (probability R/N)
    has (k − 1)(R − 1)/(N − 1) other right ones before it on average, so average precision is
    1/N · Σₖ (1 + (k − 1)(R − 1)/(N − 1)) / k.
    """
    right, total = (each.astype(np.float64) for each in lookup.counts())
    found: dict[Metric, np.ndarray] = {}
    for metric, cut in CUTS.items():
        k = np.minimum(cut, total)
        wrong = total - right
        none = gammaln(wrong + 1) - gammaln(np.maximum(wrong - k, 0) + 1)
        none -= gammaln(total + 1) - gammaln(total - k + 1)
        found[metric] = 1 - np.where(wrong >= k, np.exp(none), 0.0)
    harmonic = np.cumsum(1 / np.arange(1, int(total.max()) + 1))[total.astype(np.int64) - 1]
    others = (right - 1) / np.maximum(total - 1, 1)
    found["mean_average_precision"] = (harmonic + others * (total - harmonic)) / total
    return found
