"""`salt-vla runs sync`, and `runs send`, which it starts"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import ConfigError, UserError
from salt_vla.operations.trackers.base import TRACKERS, require_trackers
from salt_vla.operations.trackers.journal import Mirror
from salt_vla.operations.trackers.keeper import PATIENCE, Work, is_open, keep, work_of
from salt_vla.operations.trackers.sender import send as send_rows
from salt_vla.operations.trackers.sender import without_secrets_in_output
from salt_vla.rundir import RunDirectory, all_runs


def sync(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    tracker: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    follow: bool = False,
    beside: str = "",
    patience: float = PATIENCE,
    json: bool = False,
) -> int:
    """Send trackers what they have not been sent, from metrics.jsonl; exit code 1 when some is left.

    Nothing is sent twice: each run remembers what every tracker has. Where a tracker was given up, or a run
    had none, this sends later, to where the tracker's own variables point (WANDB_MODE, TRACKIO_SPACE_ID, …).

    Example: salt-vla runs sync demo_student --tracker wandb

    Args:
        names: the runs; default: all that have been tracked.
        tracker: wandb, trackio or tensorboard; repeatable; default: those that a run has had.
        follow: go on while the run works (`train --track` starts this).
        beside: which process works on the run, as that process itself says.
        patience: seconds after which a tracker that does not answer is given up.
        json: print JSON instead of a table.
    """
    require_trackers(tracker)
    if not 0 <= patience < float("inf"):
        raise ConfigError(f"--patience must be a number of seconds from 0 on, not {patience}")
    # A run's own process has it followed before there is anything in its directory.
    named = [RunDirectory.named(name) for name in names]
    runs = named if follow else [run.require() for run in named] or all_runs()
    rows = [
        _synced(run, one, work_of(run, follow, beside), patience)
        for run in runs
        for one in tracker or _trackers_of(run)
    ]
    if json:
        print_json(rows)
    elif rows:
        print_table(rows, ["run", "tracker", "outcome", "left", "destination", "why"])
    else:
        print("no run has a tracker; `salt-vla runs sync NAME --tracker wandb` gives it one")
    return int(any(row["outcome"] != "sent" for row in rows))


def _trackers_of(run: RunDirectory) -> list[str]:
    return [name for name in TRACKERS if Mirror(run, name).place_file.is_file()]


def _synced(run: RunDirectory, tracker: str, work: Work, patience: float) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name, "tracker": tracker, "outcome": "failed", "left": None}
    row |= {"destination": "", "why": ""}
    try:  # One damaged run must not hide the others.
        require_trackers([tracker])
        mirror = Mirror(run, tracker)
        row["outcome"] = keep(run, tracker, work, patience)
        row |= {"left": mirror.left(), "destination": mirror.place().destination}
        if row["outcome"] == "given up":
            row["why"] = f"{mirror.log_file} says it"
    except UserError as error:
        row["why"] = str(error)
    return row


def send(
    name: Annotated[str, tyro.conf.Positional],
    tracker: Annotated[str, tyro.conf.Positional],
) -> None:
    """Send one tracker what it has not been sent, and what comes until the end of the input (`runs sync`
    starts this, and ends it where it hangs).

    Example: salt-vla runs send demo_student wandb < /dev/null

    Args:
        name: the run's name.
        tracker: wandb, trackio or tensorboard.
    """
    without_secrets_in_output()
    require_trackers([tracker])
    send_rows(RunDirectory.named(name), tracker, lambda: is_open(sys.stdin.fileno()))
