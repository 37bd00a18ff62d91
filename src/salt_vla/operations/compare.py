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
from salt_vla.operations.compare_seeds import (
    Entry,
    Group,
    PairedDifference,
    group_runs,
    kept_apart,
    paired_differences,
    pairs_of,
)
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
from salt_vla.verdicts import CLIPS, TEACHERS, changed_on_the_way, origin_of, unlike

Axis = Literal["steps", "clips", "flops"]
AXES: tuple[Axis, ...] = ("steps", "clips", "flops")
# First R² over place means, of which a loss alone tells nothing.
COLUMNS = (
    "val.r2_position_mean", "val.r2_channel_mean", "val.r2_copy_nearest", "val.loss", "train.loss",
)  # fmt: skip
COSTLY = ("batch_size", "masks.", "encoder.", "predictor.", "target.")  # Fields, or what they begin with.
PROBED = {"suite", "target", "metric", "value", "low", "high"}
LAST_LINES = 100
START = "start_provenance.json"
SHARES = (
    0.25,
    0.5,
    0.75,
    1.0,
)  # of what all runs have reached, where their curves are read beside one another


@dataclass(frozen=True)
class Figures:
    """What one run measured in one column: the last value, the best (of a loss the lowest, of an R² the
    highest), each with its step, the mean of its last 100 lines, and that of every epoch that has lines."""

    last: float | None = None
    last_step: int = 0
    best: float | None = None
    best_step: int = 0
    last_mean: float | None = None
    epoch_means: tuple[float, ...] = ()


@dataclass(frozen=True)
class Compared:
    """One of the runs. `figures`: by `kind.column`; `clips` and `flops`: a step, None where that is unknown;
    `probes`: rows as `eval --json` prints them, of the run's own encoder, each with the `step` and the
    `clip_table` that it is of. `apart` and `data`: as of `Entry`."""

    overview: Overview
    config: TrainConfig | None
    rows: tuple[Row, ...]
    figures: dict[str, Figures]
    clips: int | None = None
    flops: float | None = None
    probes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    apart: str = ""
    data: str = ""

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
    what must not be ranked, and why; `apart`: on what is no group or pair though settings are alike; `notes`:
    on what is unknown of a run."""

    column: str
    runs: tuple[Compared, ...]
    settings: tuple[SettingRow, ...] = ()
    equal: tuple[EqualRow, ...] = ()
    groups: tuple[Group, ...] = ()
    paired: tuple[PairedDifference, ...] = ()
    incomparable: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
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
            "apart": list(self.apart),
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
    entries = [_entry(run, column) for run in read]
    groups = group_runs(entries)
    return Comparison(
        column,
        tuple(read),
        settings=_settings(read),
        equal=_equal(read, column),
        groups=groups,
        paired=paired_differences(groups, alike & pairs_of(entries)),
        incomparable=tuple(said),
        apart=tuple(kept_apart(entries)),
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
    changed, apart, data = [], "", ""
    try:
        changed = changed_on_the_way(run)
        apart, data = _apart(run, changed), _data(run)
    except (UserError, OSError) as error:
        apart = data = str(error)  # It is like no other.
    changed = [field for field in changed if field.startswith(COSTLY)]
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
        apart,
        data,
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
        figures[column] = Figures(values[-1], steps[-1], best, at, sum(last) / len(last), epochs)
    return figures


def _probes(noted_there: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Rows as `eval` leaves them; what is none is passed over."""
    suites = noted_there.get("suites")
    return tuple(
        row | {"step": suite.get("step"), "clip_table": str(suite.get("clip_table", ""))}
        for suite in (suites if isinstance(suites, list) else [])
        if isinstance(suite, dict) and isinstance(suite.get("rows"), list)
        for row in suite["rows"]
        if isinstance(row, dict) and row.keys() >= PROBED and isinstance(row["suite"], str)
    )


def _apart(run: RunDirectory, changed: Sequence[str]) -> str:
    """How it came to its weights otherwise than its settings say, in words."""
    origin = origin_of(run)
    said = [f"began from {origin}"] * bool(origin)
    return "; ".join([*said, *[f"{run.name} changed {', '.join(changed)} on its way"] * bool(changed)])


def _data(run: RunDirectory) -> str:
    """What it learned from, and from which weights: equal only where that is the same."""
    pins = {name: noted(run, name) for name in (CLIPS, *TEACHERS, START)}
    return json.dumps({name: pin for name, pin in pins.items() if pin}, sort_keys=True)


def _entry(run: Compared, column: str) -> Entry:
    figures = run.figures.get(column, Figures())
    return Entry(run.name, run.config, figures.last, figures.last_step, run.apart, run.data)


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
