"""A comparison as tables of text, the same for a terminal and for a page.

Knows comparisons, not how tables are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from salt_vla.operations.compare import COLUMNS, Comparison, EqualRow
from salt_vla.operations.words import duration, number

LABELS = {
    "val.r2_position_mean": "held-out R² over place means",
    "val.r2_channel_mean": "held-out R² over channel means",
    "val.r2_copy_nearest": "held-out R² over the nearest visible token",
    "val.loss": "held-out loss",
    "train.loss": "training loss",
}
UNITS = {"steps": 1.0, "clips": 1.0, "flops": 1e15}


@dataclass(frozen=True)
class TextTable:
    """Rows in the columns' order; the first column names the row. `part`: what it is a table of, among
    others. `note`: what a reader must know."""

    part: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def label(column: str) -> str:
    return LABELS.get(column, column)


def tables_of(found: Comparison) -> list[TextTable]:
    """Those that have rows: the runs, their settings, figures, equal points, seeds and probes."""
    made = [_runs(found), _settings(found), *_figures(found), *_equal(found), _groups(found), _paired(found)]
    return [table for table in [*made, *_probes(found)] if table.rows]


def _runs(found: Comparison) -> TextTable:
    rows = []
    for run in found.runs:
        seen = run.overview
        seconds = seen.status.seconds
        clips = "" if run.clips is None else str(run.clips * seen.step)
        flops = "" if run.flops is None else number(run.flops * seen.step / UNITS["flops"])
        steps = f"{seen.step} of {seen.total_steps}"
        verdict = seen.verdict.get("verdict", "")
        why = seen.status.exit_reason if seen.state in ("damaged", "failed", "killed") else ""
        state = f"{seen.state}: {why}" if why else seen.state
        time = duration(seconds) if seconds else ""
        rows.append((run.name, state, steps, clips, flops, time, seen.recipe_name, verdict))
    columns = ("run", "state", "steps", "clips", "PFLOP", "worked for", "recipe", "verdict")
    return TextTable("Runs", "What was run", columns, tuple(rows), "\n".join(found.notes))


def _settings(found: Comparison) -> TextTable:
    rows = tuple((row.field, *map(_value, row.values)) for row in found.settings)
    return TextTable("Runs", "Settings that differ", ("setting", *found.names), rows)


def _figures(found: Comparison) -> Iterator[TextTable]:
    for column in dict.fromkeys((found.column, *COLUMNS)):
        rows = []
        for run in found.runs:
            each = run.figures.get(column)
            if each is not None:
                best = f"{number(each.best)} @ {each.best_step}"
                epochs = ", ".join(map(number, each.epoch_means))
                rows.append((run.name, number(each.last), best, number(each.last_mean), epochs))
        columns = ("run", "last", "best @ step", "mean of the last 100 lines", "mean of each epoch")
        yield TextTable(
            "Figures",
            _heading(column),
            columns,
            tuple(rows),
            _warning(found) if column == found.column else "",
        )


def _equal(found: Comparison) -> Iterator[TextTable]:
    names = {"steps": "steps", "clips": "clips", "flops": "PFLOP"}
    for axis, name in names.items():
        rows = [row for row in found.equal if row.axis == axis]
        title = f"{_heading(found.column)} at equal {name}"
        yield TextTable(
            "Equal points", title, (name, *found.names), tuple(map(_equal_row, rows)), _warning(found)
        )


def _heading(column: str) -> str:
    text = label(column)
    return text if text == column else _capital(text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _warning(found: Comparison) -> str:
    return "\n".join(f"Not to be ranked: {said}." for said in found.incomparable)


def _equal_row(row: EqualRow) -> tuple[str, ...]:
    x = row.x / UNITS[row.axis]
    return (f"{x:.4g}" if row.axis == "flops" else f"{x:.0f}", *map(number, row.values))


def _groups(found: Comparison) -> TextTable:
    several = any(len(group.runs) > 1 for group in found.groups)
    rows = tuple(
        (
            ", ".join(each.runs),
            ", ".join(map(str, each.seeds)),
            _mean(each.mean, each.low, each.high),
            each.note,
        )
        for each in found.groups
    )
    title = f"Where seeds repeat: last {label(found.column)}"
    is_shown = several or found.apart
    note = "\n".join(_capital(f"{said}.") for said in found.apart)
    return TextTable("Seeds", title, ("runs", "seeds", "mean", "interval"), rows if is_shown else (), note)


def _paired(found: Comparison) -> TextTable:
    rows = tuple(
        (f"{row.first} − {row.against}", ", ".join(map(str, row.seeds)), _mean(row.mean, row.low, row.high),
         row.note, "yes" if row.apart else "no" if row.low is not None else "cannot be said")
        for row in found.paired
    )  # fmt: skip
    columns = ("difference", "seeds of both", "mean", "interval", "apart from zero")
    return TextTable("Seeds", f"Seed by seed: last {label(found.column)}", columns, rows)


def _probes(found: Comparison) -> Iterator[TextTable]:
    """A table a suite and table of clips: on other clips the same target is another question."""
    suites = dict.fromkeys((row["suite"], row["clip_table"]) for run in found.runs for row in run.probes)
    for suite, clips in suites:
        cells: dict[str, dict[str, str]] = {}
        for run in found.runs:
            for row in run.probes:
                if (row["suite"], row["clip_table"]) == (suite, clips):
                    text = _mean(row["value"], row["low"], row["high"])
                    is_earlier = row["step"] is not None and row["step"] != run.overview.step
                    text += f" @ {row['step']}" * is_earlier
                    cells.setdefault(f"{row['target']} ({row['metric']})", {})[run.name] = text
        rows = tuple(
            (target, *(each.get(name, "") for name in found.names)) for target, each in cells.items()
        )
        is_told_by_clips = sum(name == suite for name, _ in suites) > 1
        title = f"Probes, {suite}" + f" (clips {clips[:8] or 'unknown'})" * is_told_by_clips
        note = "95 % over held-out episodes, of one seed of the run; of its last step where none is named."
        yield TextTable("Probes", title, ("target", *found.names), rows, note)


def _mean(mean: float | None, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    return number(mean) + interval


def _value(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=asdict)
