"""The table: every encoder on every target, each figure with an interval, and paired comparisons.

Knows what suites found as sums over episodes; neither features nor how a probe is fitted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from salt_vla.config import from_json
from salt_vla.evaluation.significance import holm_within, sign_flip_p_value
from salt_vla.evaluation.statistics import (
    MIN_EPISODES_FOR_CLAIMS as MIN_EPISODES_FOR_CLAIMS,
)
from salt_vla.evaluation.statistics import (
    EpisodeSums,
    Estimate,
    Metric,
    interval,
    paired_difference,
)

T = TypeVar("T")
PROBES_FILE = "probes.json"  # In a run's folder: what was found of its last checkpoint.
STUDENT, TEACHER, PIXELS, CONSTANT = "student", "teacher", "pixels", "constant"
# Rows that no encoder has a part in: the mean, the robot's own state, the task; `state+NAME` is both.
KNOWN_STATE, KNOWN_TASK = "state", "task"
WITHOUT_ENCODER = (CONSTANT, KNOWN_STATE, KNOWN_TASK)


@dataclass(frozen=True)
class Scored:
    """What a suite says of one encoder and target: sums that every interval, paired test and joining of seeds
    is computed from later, so that encoders may be scored on different days.

    `suite`: as tables name it, with the camera or condition (`front/grid`). `causal`: no frame after the
    moment that the target belongs to was seen. `alpha`: the probe's penalty, None where it has none.
    """

    encoder: str
    suite: str
    target: str
    sums: EpisodeSums
    alpha: float | None = None
    note: str = ""
    probe: str = "linear"
    protocol: str = "held-out"
    causal: bool = False


@dataclass(frozen=True)
class Row:
    """One figure of the table. `low` and `high` are its 95 % interval for new episodes; `alpha` is the
    probe's penalty and `note` what a reader must know of the figure (else empty)."""

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
    probe: str = "linear"
    protocol: str = "held-out"
    causal: bool = False

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """encoder − against on the same clips; `apart` says that the interval excludes zero, and
    is never claimed from fewer than `MIN_EPISODES_FOR_CLAIMS` held-out episodes.

    `p`: of a sign-flip test over episodes; `p_holm`: corrected for the suite's targets, in each of which
    these two are compared. None in files of earlier versions.
    """

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
    p: float | None = None
    p_holm: float | None = None

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


def tabulate(
    scored: Iterable[Scored],
    seed: int,
    reference: str = "random",
    against: Sequence[str] = (),
) -> list[SuiteResult]:
    """One result a suite, in order of first appearance: rows with intervals, and encoders compared in pairs
    on the same held-out episodes.

    Compared, where both are present: student and teacher with `reference`, student with teacher and with
    pixels, any other encoder with `reference` and with pixels; and all of them with those of `against`.
    """
    by_suite: dict[str, dict[str, list[Scored]]] = {}
    for one in scored:
        by_suite.setdefault(one.suite, {}).setdefault(one.target, []).append(one)
    results = []
    for suite, targets in by_suite.items():
        result = SuiteResult(suite, seed, [], [])
        for target, entries in targets.items():
            sums = {one.encoder: one.sums for one in entries}
            for one in entries:
                result.scores[one.encoder, target] = one.sums
                result.rows.append(_row(one, seed, interval(one.sums)))
            for name, other in compared_pairs([n for n in sums if n != CONSTANT], reference, against):
                if not sums[name].same_clips(sums[other]):
                    continue  # Each in its own space, say: there is no difference to speak of.
                result.comparisons.append(_compared(suite, target, name, other, sums, seed))
        results.append(replace(result, comparisons=_corrected(result.comparisons)))
    return results


def _compared(
    suite: str, target: str, name: str, against: str, sums: Mapping[str, EpisodeSums], seed: int
) -> Comparison:
    mine, theirs = sums[name], sums[against]
    found = paired_difference(mine, theirs)
    return Comparison(
        suite,
        target,
        mine.metric,
        name,
        against,
        found.value,
        found.low,
        found.high,
        seed,
        apart=found.apart and min(mine.support, theirs.support) >= MIN_EPISODES_FOR_CLAIMS,
        p=sign_flip_p_value(mine, theirs),
    )


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With `p_holm`: over all targets on which the same two were compared."""
    ps = holm_within([(item.encoder, item.against) for item in comparisons], [item.p for item in comparisons])
    return [replace(item, p_holm=p) for item, p in zip(comparisons, ps, strict=True)]


def compared_pairs(
    encoders: Sequence[str], reference: str, also: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """(encoder, against) pairs of the table, in the encoders' order. What is known without an encoder is
    compared with nothing; with one (`state+NAME`) it is compared with itself alone and with `reference`."""
    pairs = []
    for name in encoders:
        known, _, _ = name.partition("+")
        if known in WITHOUT_ENCODER:
            others = dict.fromkeys((known, f"{known}+{reference}"))
            pairs += [(name, other) for other in others if other in encoders and known != name != other]
            continue
        against = {STUDENT: (reference, TEACHER, PIXELS), TEACHER: (reference,), PIXELS: (), reference: ()}
        others = dict.fromkeys((*against.get(name, (reference, PIXELS)), *also))
        pairs += [(name, other) for other in others if other in encoders and other != name]
    return pairs


def renamed(row: str, name: str) -> str:
    """A row's name once its encoder is called `name`: `state+NAME` keeps what stands before."""
    known, plus, _ = row.partition("+")
    return f"{known}+{name}" if plus and known in WITHOUT_ENCODER else name


def _row(one: Scored, seed: int, estimate: Estimate) -> Row:
    left_out = one.sums.left_out
    still = f"dimension(s) {', '.join(map(str, left_out))} do not vary and are left out"
    return Row(
        encoder=one.encoder,
        suite=one.suite,
        target=one.target,
        metric=one.sums.metric,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        seed=seed,
        clips=int(one.sums.clips.sum()),
        episodes=len(one.sums.episodes),
        alpha=one.alpha,
        note="; ".join(filter(None, [one.note, still if left_out else ""])),
        probe=one.probe,
        protocol=one.protocol,
        causal=one.causal,
    )


def to_objects(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows, comparisons or their joins over seeds as a list of plain objects, ready for `json.dumps`."""
    return [dataclasses.asdict(entry) for entry in entries]


def from_objects(kind: type[T], objects: Sequence[Mapping[str, Any]], where: str = "report.json") -> list[T]:
    """The inverse of `to_objects`; an unknown, missing or mistyped field is named in a `ConfigError`."""
    return [from_json(kind, json.dumps(dict(o)), f"{where}[{i}]") for i, o in enumerate(objects)]
