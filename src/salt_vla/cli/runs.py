"""`salt-vla runs …`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import RunError
from salt_vla.rundir import RunDirectory, Status, all_runs


def _summary(run: RunDirectory) -> dict[str, Any]:
    last = {f"last_{kind}": rows[-1] for kind in ("train", "val") if (rows := run.metrics(kind))}
    return {"name": run.name, **asdict(run.status()), **last}


def _summary_or_damage(run: RunDirectory) -> dict[str, Any]:
    """One damaged run must not hide the others."""
    try:
        return _summary(run)
    except RunError as error:
        return {"name": run.name, **asdict(Status("damaged", exit_reason=str(error)))}


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
        print_table(rows, ["name", "state", "step", "total_steps", "exit_reason"])


def show(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """One run's state, step and last figures.

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
        print_table([{"field": key, "value": value} for key, value in summary.items()], ["field", "value"])
