"""Runs beside one another: what differs in their settings, their figures at equal steps, clips and FLOPs, and
what may be said of them where seeds repeat.

Knows directories of runs; the arithmetic of seeds is in `compare_seeds`. It ranks nothing that measures
different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from salt_vla.config import TrainConfig, leaves
from salt_vla.errors import RunError, UserError
from salt_vla.operations.compare_seeds import Group, PairedDifference, group_runs, paired_differences
from salt_vla.operations.curves import Follower, Points, Row, points
from salt_vla.operations.overview import PROBES, Overview, best_of, config_of, noted, overview
from salt_vla.rundir import RunDirectory
from salt_vla.verdicts import unlike

Axis = Literal["steps", "clips", "flops"]
AXES: tuple[Axis, ...] = ("steps", "clips", "flops")
# First R² over place means, of which a loss alone tells nothing.
COLUMNS = (
    "val.r2_position_mean", "val.r2_channel_mean", "val.r2_copy_nearest", "val.loss", "train.loss",
)  # fmt: skip
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
    what must not be ranked, and why."""

    column: str
    runs: tuple[Compared, ...]
    settings: tuple[SettingRow, ...] = ()
    equal: tuple[EqualRow, ...] = ()
    groups: tuple[Group, ...] = ()
    paired: tuple[PairedDifference, ...] = ()
    incomparable: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

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
            "missing": self.missing,
        }


def compare(names: Sequence[str], column: str = COLUMNS[0]) -> Comparison:
    """The runs of these names beside one another. Raises `RunError` for a name that is no run and for a
    column that none of them has; a run that cannot be read is shown as such."""
    runs = [RunDirectory.named(name).require() for name in dict.fromkeys(names)]
    read = [_read(run) for run in runs]
    if column.count(".") != 1:
        raise RunError(f"column {column!r} is not written KIND.COLUMN; give one such as {COLUMNS[0]}")
    if not any(run.curve(column)[1] for run in read):
        have = sorted({name for run in read for name in run.figures})
        if have and column not in COLUMNS:
            raise RunError(f"none of the runs has {column!r}; they have {', '.join(have)}")
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
    )


def _read(run: RunDirectory) -> Compared:
    follower = Follower(run.metrics_file)
    follower.poll()
    rows = follower.rows
    seen = overview(run, rows)
    try:
        config, probes = config_of(run), noted(run, PROBES)
    except UserError:
        config, probes = None, {}
    clips = seen.cost.get("clips_a_step", config.batch_size if config else None)
    an_epoch = seen.cost.get("clips_an_epoch", 0)
    best = best_of(rows)
    figures = {}
    for column in COLUMNS:
        kind, _, name = column.partition(".")
        steps, values = points(rows, kind, name)
        if not values:
            continue
        means: dict[int, list[float]] = {}
        for step, value in zip(steps, values, strict=True):
            if an_epoch and clips:
                means.setdefault((step * clips - 1) // an_epoch, []).append(value)
        last, found = values[-LAST_LINES:], best.get(column)
        epochs = tuple(sum(each) / len(each) for _, each in sorted(means.items()))
        figures[column] = Figures(
            values[-1], *(found or (values[-1], steps[-1])), sum(last) / len(last), epochs
        )
    flops = seen.cost.get("flops_a_step")
    probed = tuple(row for suite in probes.get("suites", []) for row in suite["rows"])
    return Compared(seen, config, tuple(rows), figures, clips, flops, probed)


def _value(run: Compared, column: str) -> float | None:
    kind, _, name = column.partition(".")
    return run.overview.figure(kind, name)


def _settings(runs: Sequence[Compared]) -> tuple[SettingRow, ...]:
    fields = [dict(leaves(run.config)) if run.config else {} for run in runs]
    names = dict.fromkeys(name for each in fields for name in each)
    rows = [SettingRow(name, tuple(each.get(name) for each in fields)) for name in names]
    return tuple(row for row in rows if any(value != row.values[0] for value in row.values))


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
            why = unlike(run, mine.config, other, theirs.config, kind, name)
            if why:
                said.append(f"{column} of {run.name} and of {other.name}: {', '.join(why)}")
            else:
                alike.add(frozenset((run.name, other.name)))
    return alike, said
