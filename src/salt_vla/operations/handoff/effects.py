"""What one setting does: pairs of runs that differ in exactly that field, seed by seed.

Compares only figures that measure the same thing (`verdicts.unlike`); the interval is over seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from salt_vla.operations.compare_seeds import interval
from salt_vla.operations.handoff.facts import RunFacts
from salt_vla.verdicts import PLACES, unlike

R2_COLUMN, LOSS_COLUMN = "val.r2_position_mean", "train.loss, mean of the last rows"
MOST_EFFECTS = 20


@dataclass(frozen=True)
class Effect:
    """`column` of the runs where `field` is `after`, minus that where it is `before`: the mean over the seeds
    that both have, its interval (None below three seeds) and `note`, what the interval is."""

    field: str
    before: Any
    after: Any
    column: str
    runs: tuple[tuple[str, str], ...]
    mean: float
    low: float | None
    high: float | None
    note: str

    @property
    def is_apart(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def sentence(self) -> str:
        spread = f" [{self.low:+.4g}, {self.high:+.4g}]" if self.low is not None else ""
        if self.low is None:
            means = f"nothing is shown ({self.note})"
        elif not self.is_apart:
            means = "no difference is shown"
        else:
            better = (self.mean > 0) != (self.column == LOSS_COLUMN)
            means = f"{'better' if better else 'worse'} ({self.note})"
        pairs = ", ".join(f"{new} − {old}" for old, new in self.runs[:4])
        more = f" and {len(self.runs) - 4} more" if len(self.runs) > 4 else ""
        return (
            f"from {_said(self.before)} to {_said(self.after)}: {self.column} "
            f"{self.mean:+.4g}{spread}: {means}; {pairs}{more}"
        )


def _said(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def effects(runs: Sequence[RunFacts]) -> list[Effect]:
    """Of all whole runs, most seeds first."""
    whole = [(run, _decisive(run.config)) for run in runs if run.is_whole and not run.problem]
    names = {name for _, settings in whole for name in settings}
    varied = [name for name in sorted(names) if len({settings.get(name) for _, settings in whole}) > 1]
    fixed = names - set(varied)
    found: list[Effect] = []
    for name in varied:
        alike: dict[str, dict[str, dict[int, RunFacts]]] = {}
        for run, settings in whole:
            if name in settings and run.config is not None:
                rest = {k: v for k, v in settings.items() if k != name and k not in fixed}
                group = alike.setdefault(json.dumps([rest, run.pins], sort_keys=True), {})
                group.setdefault(settings[name], {})[run.config.seed] = run
        for group in alike.values():
            found += _within(name, group)
    return sorted(found, key=lambda each: (-len(each.runs), each.field))[:MOST_EFFECTS]


def _within(name: str, by_value: dict[str, dict[int, RunFacts]]) -> Iterator[Effect]:
    """Of runs that differ in that field and the seed alone, by the field's value and by seed."""
    for before, after in combinations(sorted(by_value, key=lambda text: (_number(text), text)), 2):
        seeds = sorted(set(by_value[before]) & set(by_value[after]))
        pairs = [(by_value[before][seed], by_value[after][seed]) for seed in seeds]
        for column, old, new in _figures(pairs):
            mean, low, high, note = interval([b - a for a, b in zip(old, new, strict=True)])
            names = tuple((a.name, b.name) for a, b in pairs)
            yield Effect(name, json.loads(before), json.loads(after), column, names, mean, low, high, note)


def _figures(pairs: Sequence[tuple[RunFacts, RunFacts]]) -> Iterator[tuple[str, list[float], list[float]]]:
    """(column, of the runs before, of the runs after) for what every pair has and what compares."""
    if not pairs:
        return
    if all(_compares(a, b, "val", "r2_position_mean") for a, b in pairs):
        old = [(a.r2 or {}).get("r2_position_mean") for a, _ in pairs]
        new = [(b.r2 or {}).get("r2_position_mean") for _, b in pairs]
        yield from _there(R2_COLUMN, old, new)
    if all(_compares(a, b, "train", "loss") for a, b in pairs):
        yield from _there(LOSS_COLUMN, [a.last_loss for a, _ in pairs], [b.last_loss for _, b in pairs])
    for key in sorted({key for a, b in pairs for key in _probes(a).keys() & _probes(b).keys()}):
        old, new = ([_probes(pair[side]).get(key) for pair in pairs] for side in (0, 1))
        yield from _there(f"probe {key}", old, new)


def _there(
    column: str, old: list[float | None], new: list[float | None]
) -> Iterator[tuple[str, list[float], list[float]]]:
    if None not in old and None not in new:
        yield column, [each for each in old if each is not None], [each for each in new if each is not None]


def _compares(first: RunFacts, second: RunFacts, kind: str, field: str) -> bool:
    if first.config is None or second.config is None:
        return False
    return not unlike(first.run, first.config, second.run, second.config, kind, field)


def _probes(run: RunFacts) -> dict[str, float]:
    """Suite, target and clips → value, of the run's own encoder."""
    return {
        f"{row.get('suite')}, {row.get('target')} (clips {str(row['clip_table'])[:8]})": float(row["value"])
        for row in run.probes
        if "against" not in row and type(row.get("value")) in (int, float)
    }


def _number(text: str) -> float:
    value = json.loads(text)
    return float(value) if type(value) in (int, float) else 0.0


def _decisive(config: Any, prefix: str = "") -> dict[str, str]:
    """Every field that decides what is computed, seed and folders aside, as JSON."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if field.metadata.get("free") or name in PLACES or name == "runtime":
            continue
        if dataclasses.is_dataclass(value):
            found |= _decisive(value, f"{name}.")
        else:
            found[name] = json.dumps(value, default=dataclasses.asdict, sort_keys=True)
    return found
