"""`runs regress`: whether a held-out loss or R² of runs foretells what `eval` found of them.

Knows run directories; neither how figures were measured nor how they are printed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from salt_vla.config import TrainConfig, from_json
from salt_vla.errors import RunError
from salt_vla.evaluation.regression import Regression, regress
from salt_vla.evaluation.results import PROBES_FILE
from salt_vla.rundir import RunDirectory, read_json
from salt_vla.verdicts import last_figure, unlike


@dataclass(frozen=True)
class LossToAccuracy:
    """`points`: an object a run with `run`, `x` and `y`; `notes`: runs that lack one of the two."""

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
    """The runs' last `column` (KIND.FIELD of metrics.jsonl) against their own row of this suite and target.

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
        x, row = last_figure(run, kind, field), _row(run, suite, target)
        if x is None or row is None:
            lacking = column if x is None else f"{target} of {suite} (`salt-vla eval {run.name}`)"
            notes.append(f"{run.name} is left out: it has no {lacking}")
            continue
        points.append({"run": run.name, "x": x, "y": row["value"]})
        metrics.add(str(row["metric"]))
        tables.add(str(row["clip_table"]))
    if len(tables) > 1:
        raise RunError(
            f"{target} of {suite} was measured on other clips in some of these runs; eval them anew"
        )
    x_of, y_of = (np.array([point[axis] for point in points], np.float64) for axis in ("x", "y"))
    found = regress(x_of, y_of)
    return LossToAccuracy(column, suite, target, min(metrics), points, found, notes)


def _row(run: RunDirectory, suite: str, target: str) -> dict[str, Any] | None:
    """The run's own row as `eval` left it."""
    file = run.path / PROBES_FILE
    if not file.is_file():
        return None
    try:
        for each in read_json(file, dict)["suites"]:
            for row in each["rows"]:
                if (row["suite"], row["target"]) == (suite, target):
                    return dict(row) | {"clip_table": each["clip_table"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(f"{file} is damaged; `salt-vla eval {run.name}` writes it anew: {error}") from error
    return None
