"""`salt-vla runs …`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import RunError
from salt_vla.jobs.start import noted_masks
from salt_vla.rundir import RunDirectory, Status, all_runs
from salt_vla.verdicts import noted_recipe, noted_verdict


def _summary(run: RunDirectory) -> dict[str, Any]:
    last = {f"last_{kind}": rows[-1] for kind in ("train", "val") if (rows := run.metrics(kind))}
    about = {"recipe": noted_recipe(run), "verdict": noted_verdict(run), "masks": noted_masks(run)}
    return {"name": run.name, **asdict(run.status()), **about, **last}


def _summary_or_damage(run: RunDirectory) -> dict[str, Any]:
    """One damaged run must not hide the others."""
    try:
        return _summary(run)
    except RunError as error:
        damaged = asdict(Status("damaged", exit_reason=str(error)))
        return {"name": run.name, **damaged, "recipe": {}, "verdict": {}, "masks": {}}


def ls(json: bool = False) -> None:
    """List the runs below SALT_VLA_ROOT.

    Example: salt-vla runs ls

    Args:
        json: print JSON instead of a table.
    """
    rows = [_summary_or_damage(run) for run in all_runs()]
    if json:
        print_json(rows)
    else:
        for row in rows:
            recipe, verdict = row["recipe"], row["verdict"]
            row["recipe"] = recipe["name"] if recipe else ""
            row["verdict"] = verdict["verdict"] if verdict else ""
        print_table(rows, ["name", "state", "step", "total_steps", "recipe", "verdict", "exit_reason"])


def show(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """One run's state, step, last figures, masks, its recipe's hypothesis and the verdict on it.

    Example: salt-vla runs show demo_student --json

    Args:
        name: the run's name.
        json: print JSON instead of a table.
    """
    run = RunDirectory.named(name)
    if run.status().state == "queued":  # A run has a state before it has measured its configuration.
        run.require()
    summary = _summary(run)
    if json:
        print_json(summary)
    else:
        summary["masks"] = "\n".join(summary["masks"]["summary"]) if summary["masks"] else {}
        rows = [{"field": key, "value": value} for key, value in summary.items() if value != {}]
        print_table(rows, ["field", "value"])
