"""What one setting does: pairs of runs that differ in exactly that field, seed by seed.

Compares only figures that measure the same thing (`verdicts.unlike`); the interval is over seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from salt_vla.operations.compare_seeds import interval
from salt_vla.operations.handoff.facts import RunFacts
from salt_vla.verdicts import PLACES, unlike

R2_COLUMN, LOSS_COLUMN = "val.r2_position_mean", "train.loss, mean of the last rows"
MOST_EFFECTS = 20


@dataclass(frozen=True)
class Effect:
    """`column` of the runs where `field` is `after`, minus that where it is `before`: the mean over the
    `seeds` that both have (one that ran twice counts once), its interval (None below three seeds) and `note`,
    what the interval is."""

    field: str
    before: Any
    after: Any
    column: str
    runs: tuple[tuple[str, str], ...]
    seeds: int
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
    """Of all whole runs whose settings held from their first step to the last, most seeds first."""
    whole = [
        (run, _decisive(run.config)) for run in runs if run.is_whole and run.is_steady and not run.problem
    ]
    names = {name for _, settings in whole for name in settings}
    varied = [name for name in sorted(names) if len({settings.get(name) for _, settings in whole}) > 1]
    fixed = names - set(varied)
    found: list[Effect] = []
    for name in varied:
        alike: dict[str, dict[str, dict[int, list[RunFacts]]]] = {}
        for run, settings in whole:
            if name in settings and run.config is not None:
                rest = {k: v for k, v in settings.items() if k != name and k not in fixed}
                group = alike.setdefault(json.dumps([rest, run.pins, run.origin], sort_keys=True), {})
                group.setdefault(settings[name], {}).setdefault(run.config.seed, []).append(run)
        for group in alike.values():
            found += _within(name, group)
    return sorted(found, key=lambda each: (-each.seeds, each.field))[:MOST_EFFECTS]


def _within(name: str, by_value: dict[str, dict[int, list[RunFacts]]]) -> Iterator[Effect]:
    """Of runs that differ in that field and the seed alone, by the field's value and by seed."""
    for before, after in combinations(sorted(by_value, key=lambda text: (_number(text), text)), 2):
        seeds = sorted(set(by_value[before]) & set(by_value[after]))
        pairs = {seed: list(product(by_value[before][seed], by_value[after][seed])) for seed in seeds}
        for column, by_seed in _figures(pairs).items():
            used = [pair for found in by_seed.values() for pair, _ in found]
            differences = [sum(each for _, each in found) / len(found) for found in by_seed.values()]
            mean, low, high, note = interval(differences)
            names, values = tuple((a.name, b.name) for a, b in used), (json.loads(before), json.loads(after))
            yield Effect(name, *values, column, names, len(by_seed), mean, low, high, note)


Pair = tuple[RunFacts, RunFacts]


def _figures(pairs: Mapping[int, Sequence[Pair]]) -> dict[str, dict[int, list[tuple[Pair, float]]]]:
    """Column → seed → (pair, second − first) for what may be compared."""
    columns: dict[str, dict[int, list[tuple[Pair, float]]]] = {}
    for seed, pair in ((seed, pair) for seed, each in pairs.items() for pair in each):
        first, second = (_comparable(run, *pair) for run in pair)
        for column in first.keys() & second.keys():
            found = columns.setdefault(column, {}).setdefault(seed, [])
            found.append((pair, second[column] - first[column]))
    order = sorted(columns, key=lambda each: (each != R2_COLUMN, each != LOSS_COLUMN, each))
    return {column: columns[column] for column in order}


def _comparable(run: RunFacts, first: RunFacts, second: RunFacts) -> dict[str, float]:
    """Column → figure of the run, for those that measure the same thing in both runs."""
    found = _probes(run)
    if run.r2 is not None and _compares(first, second, "val", "r2_position_mean"):
        found[R2_COLUMN] = run.r2
    if run.measured.last_loss is not None and _compares(first, second, "train", "loss"):
        found[LOSS_COLUMN] = run.measured.last_loss
    return found


def _compares(first: RunFacts, second: RunFacts, kind: str, field: str) -> bool:
    if first.config is None or second.config is None:
        return False
    return not unlike(first.run, first.config, second.run, second.config, kind, field)


def _probes(run: RunFacts) -> dict[str, float]:
    """Suite, target and clips → value, of the run's own encoder."""
    return {
        f"probe {row.get('suite')}, {row.get('target')} (clips {str(row['clip_table'])[:8]})": float(
            row["value"]
        )
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
