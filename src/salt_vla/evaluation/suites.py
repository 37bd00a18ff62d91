"""The probe table: every encoder on every target, each figure with an interval, and paired comparisons.

Joins probes and statistics; knows features as arrays by encoder name, not where they came from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from salt_vla.config import from_json
from salt_vla.errors import DataError
from salt_vla.evaluation.probes import (
    ProbeFit,
    check_classes,
    check_split,
    fit_basis,
    logistic_probe,
    ridge_probe,
)
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    Estimate,
    Metric,
    accuracy_sums,
    bootstrap_scores,
    percentile_interval,
    r2_sums,
    varying_dims,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

T = TypeVar("T")
# Up to so many training clips one thread is as fast as two on an idle machine, and several times faster on a
# busy one, where threads wait for each other at every small product.
SINGLE_THREAD_CLIPS = 4000
# Below this many held-out episodes percentile intervals are far too narrow: nothing is called apart.
MIN_EPISODES_FOR_CLAIMS = 10
STUDENT, TEACHER, PIXELS, CONSTANT = "student", "teacher", "pixels", "constant"


@dataclass(frozen=True)
class ProbeSet:
    """One side of a split: features by encoder (clips, dims), targets by name, and each clip's episode.

    A target of text (clips,) is classified, one of numbers (clips, dims) regressed.
    """

    features: Mapping[str, Float[np.ndarray, "clips dims"]]
    targets: Mapping[str, Shaped[np.ndarray, " clips *dims"]]
    episodes: Int64[np.ndarray, " clips"]

    def __post_init__(self) -> None:
        clips = len(self.episodes)
        if not clips:
            raise DataError("a probe needs clips on both sides of the split, and one side has none")
        for kind, arrays in (("features of encoder", self.features), ("target", self.targets)):
            for name, array in arrays.items():
                if len(array) != clips:
                    raise DataError(f"{kind} {name!r} has {len(array)} rows for {clips} clips")


@dataclass(frozen=True)
class Row:
    """One figure of the table. `low` and `high` bound the middle 95 % of resamples of held-out episodes;
    `alpha` is the probe's penalty and `note` what a reader must know of the figure (else empty)."""

    encoder: str
    suite: str
    target: str
    metric: Metric
    value: float
    low: float
    high: float
    seed: int
    clips: int
    episodes: int
    alpha: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """encoder − against on the same resamples; `apart` says that the interval excludes zero, and
    is never claimed from fewer than `MIN_EPISODES_FOR_CLAIMS` held-out episodes."""

    suite: str
    target: str
    metric: Metric
    encoder: str
    against: str
    difference: float
    low: float
    high: float
    seed: int
    apart: bool

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SuiteResult:
    """A suite at one seed. `scores` (encoder, target → sums) is what seeds are later joined by; `notes` names
    targets that were left out and why."""

    suite: str
    seed: int
    rows: list[Row]
    comparisons: list[Comparison]
    scores: dict[tuple[str, str], EpisodeSums] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run_probe_suite(
    suite: str, train: ProbeSet, test: ProbeSet, seed: int, bootstrap: int = 2000, reference: str = "random"
) -> SuiteResult:
    """Probe every encoder on every target both sides offer; the `constant` predictor is always in the table.

    Compared in pairs, where both are present: student and teacher with `reference`, student with teacher and
    with pixels, and any other encoder with `reference` and with pixels.
    """
    check_split(train.episodes, test.episodes)
    targets, notes = _common_targets(train, test)
    encoders = [name for name in train.features if name != CONSTANT]
    absent = sorted(set(train.features) ^ set(test.features))
    if absent:
        raise DataError(f"encoder {absent[0]!r} has features on one side of the split only")
    fits: dict[tuple[str, str], ProbeFit] = {}
    for encoder in [*encoders, CONSTANT]:
        for target, fit in _probe(encoder, train, test, targets, seed).items():
            fits[encoder, target] = fit
    scores = {
        (encoder, target): _sums(test.targets[target], fit, test.episodes)
        for (encoder, target), fit in fits.items()
    }
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    pairs = compared_pairs(encoders, reference)
    for target in targets:
        mine = {encoder: scores[encoder, target] for encoder in [*encoders, CONSTANT]}
        samples = dict(zip(mine, bootstrap_scores(list(mine.values()), bootstrap, seed), strict=True))
        for name, sums in mine.items():
            estimate = Estimate(sums.value, *percentile_interval(samples[name]))
            rows.append(_row(name, suite, target, seed, sums, estimate, fits[name, target]))
        for name, against in pairs:
            difference = mine[name].value - mine[against].value
            estimate = Estimate(difference, *percentile_interval(samples[name] - samples[against]))
            names = (suite, target, mine[name].metric, name, against)
            apart = estimate.apart and len(mine[name].episodes) >= MIN_EPISODES_FOR_CLAIMS
            comparisons.append(Comparison(*names, difference, estimate.low, estimate.high, seed, apart))
    return SuiteResult(suite, seed, rows, comparisons, scores, notes)


def compared_pairs(encoders: Sequence[str], reference: str) -> list[tuple[str, str]]:
    """(encoder, against) pairs of the table, in the encoders' order."""
    pairs = []
    for name in encoders:
        against = {STUDENT: (reference, TEACHER, PIXELS), TEACHER: (reference,), PIXELS: (), reference: ()}
        others = dict.fromkeys(against.get(name, (reference, PIXELS)))
        pairs += [(name, other) for other in others if other in encoders]
    return pairs


def _common_targets(train: ProbeSet, test: ProbeSet) -> tuple[list[str], list[str]]:
    """Targets that both sides offer and that can be scored, and a sentence on each that is left out."""
    targets, notes = [], []
    for name in [*train.targets, *(n for n in test.targets if n not in train.targets)]:
        if name not in train.targets or name not in test.targets:
            notes.append(f"target {name!r} is left out: only one side of the split has it")
        elif _is_class(test.targets[name]):
            check_classes(name, train.targets[name], test.targets[name])
            targets.append(name)
        elif not varying_dims(test.targets[name]).any():
            notes.append(f"target {name!r} is left out: it is the same on every held-out clip")
        else:
            targets.append(name)
    if not targets:
        raise DataError(f"nothing to probe: {'; '.join(notes) or 'no target was given'}")
    return targets, notes


def _is_class(target: Shaped[np.ndarray, " clips *dims"]) -> bool:
    return target.dtype.kind in "UO"


def _probe(
    encoder: str, train: ProbeSet, test: ProbeSet, targets: Sequence[str], seed: int
) -> dict[str, ProbeFit]:
    """All of one encoder's probes, from one rotation of its features."""
    nothing = (np.zeros((len(train.episodes), 0)), np.zeros((len(test.episodes), 0)))
    both = nothing if encoder == CONSTANT else (train.features[encoder], test.features[encoder])
    quantities = {t: train.targets[t] for t in targets if not _is_class(train.targets[t])}
    with threadpool_limits(limits=1 if len(train.episodes) <= SINGLE_THREAD_CLIPS else None):
        basis = fit_basis(encoder, *both)
        fits = ridge_probe(basis, quantities, train.episodes)
        for target in targets:
            if target not in quantities:
                fits[target] = logistic_probe(basis, train.targets[target], train.episodes, seed)
    return fits


def _sums(truth: Shaped[np.ndarray, " clips *dims"], fit: ProbeFit, episodes: np.ndarray) -> EpisodeSums:
    make = accuracy_sums if _is_class(truth) else r2_sums
    return make(truth, fit.predicted, episodes)


def _row(
    encoder: str, suite: str, target: str, seed: int, sums: EpisodeSums, estimate: Estimate, fit: ProbeFit
) -> Row:
    still = f"dimension(s) {', '.join(map(str, sums.left_out))} do not vary and are left out"
    note = "; ".join(filter(None, [fit.note, still if sums.left_out else ""]))
    return Row(
        encoder=encoder,
        suite=suite,
        target=target,
        metric=sums.metric,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        seed=seed,
        clips=int(sums.clips.sum()),
        episodes=len(sums.episodes),
        alpha=fit.alpha,
        note=note,
    )


def to_objects(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows, comparisons or their joins over seeds as a list of plain objects, ready for `json.dumps`."""
    return [dataclasses.asdict(entry) for entry in entries]


def from_objects(kind: type[T], objects: Sequence[Mapping[str, Any]], where: str = "report.json") -> list[T]:
    """The inverse of `to_objects`; an unknown, missing or mistyped field is named in a `ConfigError`."""
    return [from_json(kind, json.dumps(dict(o)), f"{where}[{i}]") for i, o in enumerate(objects)]
