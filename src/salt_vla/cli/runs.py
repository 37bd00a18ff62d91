"""`salt-vla runs ls` and `show`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import tyro

from salt_vla.cli.printing import print_json, print_rows, print_table
from salt_vla.errors import UserError
from salt_vla.operations.evidence import explained
from salt_vla.operations.launch import events, supervision, wanted_in
from salt_vla.operations.overview import Overview, overview, overviews, with_best
from salt_vla.operations.tail import last_lines, place_of
from salt_vla.operations.words import ago, duration, number
from salt_vla.rundir import RunDirectory, root

State = Literal["queued", "running", "finished", "failed", "killed", "stopped", "damaged"]
Key = Literal["name", "updated", "step", "loss", "r2"]
COLUMNS = ("name", "state", "step", "recipe", "R²", "loss", "best R²", "best loss", "verdict", "exit_reason")
LOG_LINES = 5


def ls(
    state: tyro.conf.UseAppendAction[tuple[State, ...]] = (),
    last: int = 0,
    sort: Key = "name",
    best: bool = False,
    json: bool = False,
) -> None:
    """List the runs below SALT_VLA_ROOT.

    Example: salt-vla runs ls --state failed --sort updated --last 10

    Args:
        state: only runs in this state; repeatable.
        last: only so many, those that gave a sign of life last; default: all.
        sort: by name, last sign of life, step, held-out loss (lowest first) or R² (highest first).
        best: also each run's best held-out R² and loss, with their steps; slow the first time.
        json: print JSON instead of a table.
    """
    if last < 0:
        raise UserError(f"--last must be at least 0, not {last}; 0 lists all runs")
    runs = [run for run in overviews() if not state or run.state in state]
    if last:
        newest = {run.name for run in sorted(runs, key=lambda run: run.updated)[-last:]}
        runs = [run for run in runs if run.name in newest]
    runs = with_best(runs) if best else runs
    runs.sort(key=lambda run: _place(run, sort))
    if json:
        return print_rows(run.to_json() for run in runs)
    lines = [_line(run) for run in runs]
    said = {key for line in lines for key, text in line.items() if text} | {"name", "state", "step"}
    print_table(lines, [column for column in COLUMNS if column in said])


def _place(run: Overview, key: Key) -> tuple[Any, ...]:
    if key == "updated" or key == "step":
        return getattr(run, key), run.name
    if key == "name":
        return (run.name,)
    value = run.figure("val", "loss" if key == "loss" else "r2_position_mean")
    sign = 1 if key == "loss" else -1
    return value is None, sign * (value or 0.0), run.name


def _line(run: Overview) -> dict[str, Any]:
    def best(column: str) -> str:
        value, step = run.best.get(column, (None, 0))
        return "" if value is None else f"{number(value)} @ {step}"

    reason = run.status.exit_reason
    return {
        "name": run.name,
        "state": run.state,
        "step": f"{run.step}/{run.total_steps}",
        "recipe": run.recipe_name,
        "R²": number(run.figure("val", "r2_position_mean")),
        "loss": number(run.figure("val", "loss")),
        "best R²": best("val.r2_position_mean"),
        "best loss": best("val.loss"),
        "verdict": run.verdict.get("verdict", ""),
        "exit_reason": "" if reason == run.state else reason,
    }


def show(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """One run: how it goes or ended, its last and best figures, masks, cost, supervision, and its verdict.

    Example: salt-vla runs show demo_student --json

    Args:
        name: the run's name, or that of a job which --detach or the queue started.
        json: print JSON instead of a table.
    """
    run = place_of(name)
    is_run = run.path.parent == root() / "runs"
    if is_run:
        explained(run)  # Of one run: why it is lost, found out and written down; damage is said as an error.
    seen = overview(run)
    summary = (seen.to_json() if is_run else {"name": run.name}) | _supervised(run)
    summary |= {"log": last_lines(run.log_file, LOG_LINES)}
    if json:
        return print_json(summary)
    rows = dict(_for_people(seen) if is_run else [("name", run.name)]) | dict(_of_supervision(summary))
    rows["log"] = "\n".join(summary["log"])
    print_table([{"field": key, "value": text} for key, text in rows.items() if text], ["field", "value"])


def _supervised(run: RunDirectory) -> dict[str, Any]:
    try:
        now = supervision(run.path)
        if now is None:
            return {}
        wanted = wanted_in(run.path)
    except (UserError, OSError) as error:  # The run itself is shown all the same.
        return {"supervision_problem": str(error)}
    about = asdict(now) | {"at_work": now.is_at_work, "command": list(wanted.command)}
    return {"supervision": about, "events": events(run.path)}


def _for_people(run: Overview) -> Iterator[tuple[str, str]]:
    status = run.status
    yield "name", run.name
    yield "state", status.state + f" ({status.exit_reason})" * (status.exit_reason not in ("", status.state))
    yield "step", f"{run.step} of {run.total_steps}" + _pace(run)
    yield "process", f"pid {status.pid}" * bool(status.pid)
    yield "last seen", ago(time.time() - run.updated) if run.updated else ""
    yield "worked for", duration(status.seconds) * bool(status.seconds)
    yield "resumed from", ", ".join(map(str, status.resumed_from))
    yield "branched from", status.branched_from
    for kind, last in (("train", run.last_train), ("val", run.last_val), ("probe", run.last_probe)):
        yield f"last {kind}", _figures(last)
    yield (
        "best",
        "\n".join(f"{name} {number(value)} at step {step}" for name, (value, step) in run.best.items()),
    )
    yield "warnings", "\n".join(run.warnings)
    yield "recipe", run.recipe_name
    yield "hypothesis", run.hypothesis
    yield "verdict", "{verdict}: {reason}".format(**run.verdict) if run.verdict else ""
    yield "masks", "\n".join(run.masks.get("summary", []))
    yield "cost", _cost(run.cost)


def _pace(run: Overview) -> str:
    if run.eta_seconds is None or run.rate is None:
        return ""
    return f", {number(run.rate)} steps/s, {duration(run.eta_seconds)} left"


def _figures(row: dict[str, Any]) -> str:
    shown = {name: value for name, value in row.items() if name not in ("kind", "step")}
    text = ", ".join(f"{name} {number(value)}" for name, value in shown.items())
    return f"step {row['step']}: {text}" if row else ""


def _cost(cost: dict[str, Any]) -> str:
    try:
        size = sum(cost["parameters"].values())
        return (
            f"{size / 1e6:.1f} M parameters, {cost['flops_a_step'] / 1e12:.3g} TFLOP a step of "
            f"{cost['clips_a_step']} clips, {cost['clips_an_epoch']} clips an epoch"
        )
    except (KeyError, TypeError, AttributeError):  # None, or of another version.
        return ""


def _of_supervision(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "supervision", summary.get("supervision_problem", "")
    now = summary.get("supervision")
    if now is None:
        return
    yield "command", " ".join(["salt-vla", *now["command"]])
    lost = not now["at_work"] and now["state"] != "ended"
    said = "lost before its end" if lost else now["state"]
    yield (
        "supervision",
        f"{said}; supervisor {now['supervisor']['pid']}, {now['restarts_left']} restarts left",
    )
    lines = [
        f"{place}. pid {each['process']['pid']}: {each['reason'] or 'at work'}"
        for place, each in enumerate(now["attempts"], start=1)
    ]
    yield "attempts", "\n".join(lines)
