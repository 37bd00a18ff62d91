"""`runs regress`: whether a held-out loss or R² of runs foretells what `eval` found of them.

Knows run directories; neither how figures were measured nor how they are printed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from salt_vla.config import TrainConfig, from_json
from salt_vla.errors import DataError, RunError
from salt_vla.evaluation.regression import FEWEST_RUNS, Regression, regress
from salt_vla.evaluation.results import PROBES_FILE
from salt_vla.rundir import RunDirectory, read_json
from salt_vla.verdicts import last_figure, unlike


@dataclass(frozen=True)
class LossToAccuracy:
    """`points`: an object a run with `run`, `x` and `y`; `notes`: runs that lack one of the two, or
    have trained on since they were evaluated."""

    column: str
    suite: str
    target: str
    metric: str
    points: list[dict[str, Any]]
    found: Regression
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def loss_to_accuracy(names: list[str], column: str, suite: str, target: str) -> LossToAccuracy:
    """The runs' `column` (KIND.FIELD of metrics.jsonl), the last up to the step that was evaluated, against
    their own row of this suite and target.

    Raises `RunError` for runs whose `column` measures another thing in each: losses on other targets, masks
    or clips are no one scale; and `DataError` where fewer than four have both figures.
    """
    kind, _, field = column.partition(".")
    runs = [RunDirectory.named(name).require() for name in dict.fromkeys(names)]
    configs = [from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file)) for run in runs]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        if reasons := unlike(runs[0], configs[0], run, config, kind, field):
            raise RunError(
                f"{column} of {runs[0].name} and {run.name} does not measure the same thing "
                f"({', '.join(reasons)}); regress runs of one kind at a time"
            )
    points, notes, metrics = [], [], set()
    tables: set[str] = set()
    for run in runs:
        row = _row(run, suite, target)
        # A run that has trained on since has another loss than the weights that were asked.
        x = None if row is None else last_figure(run, kind, field, row["step"])
        if x is None or row is None:
            notes.append(f"{run.name} is left out: it has no {_lacking(run, row, column, suite, target)}")
            continue
        if x != last_figure(run, kind, field):
            notes.append(f"{run.name} has trained on: its figures are those of step {row['step']}")
        points.append({"run": run.name, "x": x, "y": row["value"]})
        metrics.add(str(row["metric"]))
        tables.add(str(row["clip_table"]))
    if len(tables) > 1:
        raise RunError(
            f"{target} of {suite} was measured on other clips in some of these runs; eval them anew"
        )
    x_of, y_of = (np.array([point[axis] for point in points], np.float64) for axis in ("x", "y"))
    if len(points) < FEWEST_RUNS:
        raise DataError(
            f"a regression over runs needs {FEWEST_RUNS} runs or more with both figures, not {len(points)}"
            f"{': ' * bool(notes)}{'; '.join(notes)}"
        )
    found = regress(x_of, y_of)
    return LossToAccuracy(column, suite, target, min(metrics), points, found, notes)


def _lacking(run: RunDirectory, row: dict[str, Any] | None, column: str, suite: str, target: str) -> str:
    if row is not None:
        return f"{column} up to step {row['step']}" if row["step"] is not None else column
    known = sorted({f"{each['target']} of {each['suite']}" for each in _rows(run)})
    there = f"; it has {', '.join(known[:8])}{' …' * (len(known) > 8)}" if known else ""
    return f"{target} of {suite} (`salt-vla eval {run.name}`{there})"


def _row(run: RunDirectory, suite: str, target: str) -> dict[str, Any] | None:
    """The run's own row as `eval` left it, with the step that was asked (None in files that do not say)."""
    return next((row for row in _rows(run) if (row["suite"], row["target"]) == (suite, target)), None)


def _rows(run: RunDirectory) -> list[dict[str, Any]]:
    file = run.path / PROBES_FILE
    if not file.is_file():
        return []
    try:
        return [
            {"suite": row["suite"], "target": row["target"], "metric": row["metric"], "value": row["value"]}
            | {"clip_table": each["clip_table"], "step": each.get("step")}
            for each in read_json(file, dict)["suites"]
            for row in each["rows"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(
            f"{file} is damaged ({error!r}); remove it, and `salt-vla eval {run.name}` writes it anew"
        ) from error
