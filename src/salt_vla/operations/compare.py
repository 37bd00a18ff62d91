"""Runs beside one another: what differs in their settings, their figures at equal steps, clips and FLOPs, and
what may be said of them where seeds repeat.

Knows directories of runs; the arithmetic of seeds is in `compare_seeds`. It ranks nothing that measures
different things.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from salt_vla.config import TrainConfig, leaves
from salt_vla.errors import RunError, UserError
from salt_vla.operations.compare_seeds import Group, PairedDifference, group_runs, paired_differences
from salt_vla.operations.curves import Points, Row, is_number, points
from salt_vla.operations.overview import (
    COST,
    HIGHER_IS_BETTER,
    PROBES,
    Overview,
    all_rows,
    config_of,
    noted,
    overview,
)
from salt_vla.rundir import RunDirectory
from salt_vla.verdicts import unlike

Axis = Literal["steps", "clips", "flops"]
AXES: tuple[Axis, ...] = ("steps", "clips", "flops")
# First R² over place means, of which a loss alone tells nothing.
COLUMNS = (
    "val.r2_position_mean", "val.r2_channel_mean", "val.r2_copy_nearest", "val.loss", "train.loss",
)  # fmt: skip
CHANGES = "config_changes.jsonl"
COSTLY = ("batch_size", "masks.", "encoder.", "predictor.", "target.")  # Fields, or what they begin with.
PROBED = {"suite", "target", "metric", "value", "low", "high"}
LAST_LINES = 100
SHARES = (
    0.25,
    0.5,
    0.75,
    1.0,
)  # of what all runs have reached, where their curves are read beside one another


@dataclass(frozen=True)
class Figures:
    """What one run measured in one column: the last value, the best with its step (of a loss the lowest, of
    an R² the highest), the mean of its last 100 lines, and the mean of every epoch that has lines."""

    last: float | None = None
    best: float | None = None
    best_step: int = 0
    last_mean: float | None = None
    epoch_means: tuple[float, ...] = ()


@dataclass(frozen=True)
class Compared:
    """One of the runs. `figures`: by `kind.column`; `clips` and `flops`: a step, None where that is unknown;
    `probes`: rows as `eval --json` prints them, of the run's own encoder."""

    overview: Overview
    config: TrainConfig | None
    rows: tuple[Row, ...]
    figures: dict[str, Figures]
    clips: int | None = None
    flops: float | None = None
    probes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.overview.name

    def per_step(self, axis: Axis) -> float | None:
        return 1.0 if axis == "steps" else self.clips if axis == "clips" else self.flops

    def curve(self, column: str, axis: Axis = "steps") -> Points:
        """(x, values) of a `kind.column`; empty where the run's clips or FLOPs are unknown."""
        unit = self.per_step(axis)
        kind, _, name = column.partition(".")
        steps, values = points(self.rows, kind, name)
        return ([step * unit for step in steps], values) if unit else ([], [])


@dataclass(frozen=True)
class SettingRow:
    """A field in which the runs differ: its value in each run's order, None where a run has no settings."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class EqualRow:
    """What each run had reached at the same x: its last value at or before that; None where it had none."""

    axis: Axis
    x: float
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """`column`: what the equal points, groups and paired differences are of. `incomparable`: sentences on
    what must not be ranked, and why; `notes`: on what is unknown of a run."""

    column: str
    runs: tuple[Compared, ...]
    settings: tuple[SettingRow, ...] = ()
    equal: tuple[EqualRow, ...] = ()
    groups: tuple[Group, ...] = ()
    paired: tuple[PairedDifference, ...] = ()
    incomparable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        runs = [
            run.overview.to_json()
            | {"figures": {name: asdict(each) for name, each in run.figures.items()}}
            | {"clips_a_step": run.clips, "flops_a_step": run.flops, "probes": list(run.probes)}
            for run in self.runs
        ]
        parts = ("settings", "equal", "groups", "paired")
        tables = {part: [asdict(row) for row in getattr(self, part)] for part in parts}
        return {"column": self.column, "runs": runs, **tables} | {
            "incomparable": list(self.incomparable),
            "notes": list(self.notes),
        }


def compare(names: Sequence[str], column: str = COLUMNS[0]) -> Comparison:
    """The runs of these names beside one another. Raises `RunError` for a name that is no run and for a
    column that none of them has; a run that cannot be read is shown as such."""
    runs = [RunDirectory.named(name).require() for name in dict.fromkeys(names)]
    read = [_read(run) for run in runs]
    have = sorted({f"{row['kind']}.{name}" for run in read for row in run.rows for name in row})
    if have and column not in (*COLUMNS, *have):
        close = difflib.get_close_matches(column, have, n=3, cutoff=0.5) or COLUMNS[:2]
        raise RunError(f"none of the runs has a column {column!r}; perhaps {' or '.join(close)}")
    alike, said = _comparable(runs, read, column)
    groups = group_runs([(run.name, run.config, _value(run, column)) for run in read])
    return Comparison(
        column,
        tuple(read),
        settings=_settings(read),
        equal=_equal(read, column),
        groups=groups,
        paired=paired_differences(groups, alike),
        incomparable=tuple(said),
        notes=tuple(note for run in read for note in run.notes),
    )


def _read(run: RunDirectory) -> Compared:
    rows = all_rows(run)
    seen = overview(run, rows)
    notes = []
    try:
        config, probes = config_of(run), noted(run, PROBES)
    except (UserError, OSError) as error:
        config, probes = None, {}
        notes.append(f"{run.name}: {error}")
    clips, flops = seen.cost.get("clips_a_step", config and config.batch_size), seen.cost.get("flops_a_step")
    changed = _changes(run)
    if changed:
        clips = flops = None
        notes.append(f"{run.name} changed {', '.join(changed)} on its way: its clips and FLOPs are not known")
    elif flops is None:
        notes.append(f"{run.name} has no {COST}: what its steps cost is not known")
    an_epoch = seen.cost.get("clips_an_epoch", 0)
    a_step = clips if is_number(clips) and is_number(an_epoch) and an_epoch > 0 else 0
    return Compared(
        seen,
        config,
        tuple(rows),
        _figures(rows, a_step or 0, an_epoch),
        clips,
        flops,
        _probes(probes),
        tuple(notes),
    )


def _figures(rows: Sequence[Row], clips: float, an_epoch: int) -> dict[str, Figures]:
    """By column; with `clips` a step and `an_epoch`, the epochs' means too."""
    figures = {}
    for column in dict.fromkeys(f"{row['kind']}.{name}" for row in rows for name in row):
        kind, _, name = column.partition(".")
        steps, values = points(rows, kind, name)
        if not values or name in ("step", "kind"):
            continue
        means: dict[int, list[float]] = {}
        for step, value in zip(steps, values, strict=True) if clips else ():
            means.setdefault(int((step * clips - 1) // an_epoch), []).append(value)
        best = max(values) if name.startswith(HIGHER_IS_BETTER) else min(values)
        last = values[-LAST_LINES:]
        epochs = tuple(sum(each) / len(each) for _, each in sorted(means.items()))
        at = steps[values.index(best)]
        figures[column] = Figures(values[-1], best, at, sum(last) / len(last), epochs)
    return figures


def _probes(noted_there: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Rows as `eval` leaves them; what is none is passed over."""
    suites = noted_there.get("suites")
    rows = (
        [suite.get("rows") for suite in suites if isinstance(suite, dict)] if isinstance(suites, list) else []
    )
    found = [row for each in rows if isinstance(each, list) for row in each]
    return tuple(row for row in found if isinstance(row, dict) and row.keys() >= PROBED)


def _changes(run: RunDirectory) -> list[str]:
    """Settings that what a step costs depends on and that a resume has changed."""
    file = run.path / CHANGES
    if not file.is_file():
        return []
    fields = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            fields += [row["field"] for row in json.loads(line)["changed"]]
        except (ValueError, KeyError, TypeError):
            continue
    return sorted({field for field in fields if field.startswith(COSTLY)})


def _value(run: Compared, column: str) -> float | None:
    figures = run.figures.get(column)
    return figures.last if figures else None


def _settings(runs: Sequence[Compared]) -> tuple[SettingRow, ...]:
    fields = [dict(leaves(run.config)) if run.config else {} for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in fields for name in each):
        values = tuple(each.get(name) for each in fields)
        there = [value for value, run in zip(values, runs, strict=True) if run.config]
        rows += [SettingRow(name, values)] if any(value != there[0] for value in there) else []
    return tuple(rows)


def _equal(runs: Sequence[Compared], column: str) -> tuple[EqualRow, ...]:
    rows = []
    for axis in AXES:
        curves = [run.curve(column, axis) for run in runs]
        if not all(x for x, _ in curves):
            continue
        reached = min(x[-1] for x, _ in curves)
        for share in SHARES:
            values = tuple(_at(curve, share * reached) for curve in curves)
            rows.append(EqualRow(axis, share * reached, values))
    return tuple(rows)


def _at(curve: Points, x: float) -> float | None:
    there = [value for place, value in zip(*curve, strict=True) if place <= x * (1 + 1e-12)]
    return there[-1] if there else None


def _comparable(
    runs: Sequence[RunDirectory], read: Sequence[Compared], column: str
) -> tuple[set[frozenset[str]], list[str]]:
    """Pairs of runs whose column measures the same thing, and a sentence on each pair that does not."""
    kind, _, name = column.partition(".")
    alike: set[frozenset[str]] = set()
    said = []
    for number, (run, mine) in enumerate(zip(runs, read, strict=True)):
        for other, theirs in list(zip(runs, read, strict=True))[number + 1 :]:
            if mine.config is None or theirs.config is None:
                continue
            try:
                why = unlike(run, mine.config, other, theirs.config, kind, name)
            except (UserError, OSError) as error:
                why = [str(error)]
            if why:
                said.append(f"{column} of {run.name} and of {other.name}: {', '.join(why)}")
            else:
                alike.add(frozenset((run.name, other.name)))
    return alike, said
