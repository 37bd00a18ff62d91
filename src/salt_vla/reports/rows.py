"""What a result row means: the order and names of encoders and targets, and how seeds are pooled.

Rows of single seeds (with `seed`) are pooled here; rows already joined over seeds (with `seeds` and
`interval`) are taken as they are. Every metric is one where higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from salt_vla.errors import DataError

Row = Mapping[str, Any]

# Report order; encoders not named here follow in the order of their rows.
ENCODERS = ("student", "teacher", "random", "pixels", "constant")
_ENCODER_LABELS = {"random": "random init"}
_METRIC_LABELS = {"r2": "R²"}
SIGNIFICANT = 0.05
ONE_SEED = "95 %, over held-out episodes"
EVERY_SEED = "from the lowest to the highest of the seeds' 95 % intervals"


@dataclass(frozen=True)
class Score:
    """One encoder on one target, over seeds. `spread` says what `low` and `high` are; `note` is what a reader
    must know of the figure."""

    encoder: str
    suite: str
    target: str
    metric: str
    value: float
    low: float
    high: float
    seeds: int
    spread: str = ONE_SEED
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """`encoder` minus `against` on the same held-out episodes, over seeds.

    `apart`: the paired interval excludes zero; where seeds are pooled here, in each and on the same side.
    `p_holm`: corrected for all targets on which the two were compared (the largest of the seeds'), None where
    none was computed.
    """

    encoder: str
    against: str
    suite: str
    target: str
    metric: str
    difference: float
    low: float
    high: float
    apart: bool
    seeds: int
    spread: str = ONE_SEED
    p_holm: float | None = None

    @property
    def is_sure(self) -> bool:
        """Apart, and so even if all of the suite's targets are taken together."""
        return self.apart and self.p_holm is not None and self.p_holm < SIGNIFICANT

    @property
    def ahead(self) -> bool:
        return self.apart and self.difference > 0

    @property
    def behind(self) -> bool:
        return self.apart and self.difference < 0

    def flipped(self) -> Difference:
        """The same comparison, told from the other side."""
        return Difference(
            self.against, self.encoder, self.suite, self.target, self.metric,
            -self.difference, -self.high, -self.low, self.apart, self.seeds, self.spread, self.p_holm,
        )  # fmt: skip


def pool_scores(rows: Iterable[Row]) -> list[Score]:
    """One `Score` an (encoder, suite, target, metric), in the order of first appearance.

    Raises `DataError` when one seed has two rows for the same thing.
    """
    pooled = []
    for key, group in _grouped(rows, ("encoder", "suite", "target", "metric")).items():
        encoder, suite, target, metric = key
        value, low, high = _mean(group, "value"), _lowest(group), _highest(group)
        note = "; ".join(dict.fromkeys(str(row["note"]) for row in group if row.get("note")))
        pooled.append(Score(encoder, suite, target, metric, value, low, high, *_seeds(group), note))
    return pooled


def pool_differences(comparisons: Iterable[Row]) -> list[Difference]:
    """One `Difference` an (encoder, against, suite, target, metric); raises as `pool_scores` does."""
    pooled = []
    for key, group in _grouped(comparisons, ("encoder", "against", "suite", "target", "metric")).items():
        encoder, against, suite, target, metric = key
        sides = {_as_float(row["difference"]) > 0 for row in group}
        apart = all(bool(row["apart"]) for row in group) and len(sides) == 1
        value, low, high = _mean(group, "difference"), _lowest(group), _highest(group)
        ps = [row.get("p_holm") for row in group]
        p_holm = None if None in ps else max(map(_as_float, ps))
        pooled.append(
            Difference(
                encoder, against, suite, target, metric, value, low, high, apart, *_seeds(group), p_holm
            )
        )
    return pooled


def told_from(encoder: str, differences: Iterable[Difference]) -> list[Difference]:
    """The comparisons that involve `encoder`, each as `encoder` minus the other, each once."""
    found: dict[tuple[str, ...], Difference] = {}
    for item in differences:
        if encoder in (item.encoder, item.against):
            told = item if item.encoder == encoder else item.flipped()
            found.setdefault((told.against, told.suite, told.target, told.metric), told)
    return list(found.values())


def suites_of(items: Iterable[Row]) -> list[str]:
    """The suites in the order of their first row."""
    return list(dict.fromkeys(str(row["suite"]) for row in items))


def in_report_order(encoders: Iterable[str]) -> list[str]:
    """Known encoders first, in `ENCODERS`' order; the rest as they came; each once."""
    seen = list(dict.fromkeys(encoders))
    return [name for name in ENCODERS if name in seen] + [name for name in seen if name not in ENCODERS]


def encoder_label(encoder: str) -> str:
    return _ENCODER_LABELS.get(encoder, encoder)


def target_label(target: str) -> str:
    return target.replace("_", " ")


def metric_label(metric: str) -> str:
    return _METRIC_LABELS.get(metric, metric.replace("_", " "))


def number(value: float, signed: bool = False) -> str:
    """Three decimals, fewer where the figure is large, a true minus sign, a dash for what is not a number."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    decimals = 3 if size < 10 else 1 if size < 1000 else 0
    text = f"{size:,.{decimals}f}"
    if not any(digit in "123456789" for digit in text):
        return text
    sign = "−" if value < 0 else "+" if signed else ""
    return sign + text


def interval(low: float, high: float, signed: bool = False) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(low, signed)}, {number(high, signed)}]"


def _grouped(rows: Iterable[Row], fields: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        missing = [name for name in fields if name not in row]
        if "seeds" not in row and "seed" not in row:
            missing.append("seed")
        if missing:
            raise DataError(f"a result row lacks {', '.join(missing)}: {dict(row)}")
        group = groups.setdefault(tuple(str(row[name]) for name in fields), [])
        if any("seeds" in other or "seeds" in row or other["seed"] == row["seed"] for other in group):
            what = ", ".join(f"{name} {row[name]}" for name in fields)
            raise DataError(f"two rows of the same seeds for {what}; put what differs into the suite")
        group.append(row)
    return groups


def _seeds(group: Sequence[Row]) -> tuple[int, str]:
    """How many seeds stand behind a group, and what its interval is."""
    if "seeds" in group[0]:
        return int(group[0]["seeds"]), str(group[0]["interval"])
    return len(group), ONE_SEED if len(group) == 1 else EVERY_SEED


def _as_float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(group: Sequence[Row], name: str) -> float:
    return sum(_as_float(row[name]) for row in group) / len(group)


def _lowest(group: Sequence[Row]) -> float:
    lows = [_as_float(row["low"]) for row in group]
    return math.nan if any(map(math.isnan, lows)) else min(lows)


def _highest(group: Sequence[Row]) -> float:
    highs = [_as_float(row["high"]) for row in group]
    return math.nan if any(map(math.isnan, highs)) else max(highs)
