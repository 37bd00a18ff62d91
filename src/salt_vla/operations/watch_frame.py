"""How a moment looks in a terminal, from 60 columns on: bars, sparklines, and sentences.

Knows moments, not where they come from.
"""

from __future__ import annotations

import re
import time

from rich.console import Group, RenderableType
from rich.text import Text

from salt_vla.operations.queue import Job
from salt_vla.operations.watch import Moment, Watched
from salt_vla.operations.words import ago, duration, number, sparkline

STYLES = {
    "running": "cyan",
    "finished": "green",
    "failed": "bold red",
    "killed": "bold red",
    "damaged": "bold red",
}
NARROW = 60
LABEL = 6  # columns of a curve's name
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # A name or a reason gives a terminal no orders.


def frame(moment: Moment, width: int) -> RenderableType:
    """Everything, at most `width` columns wide."""
    width = max(width, NARROW)
    lines: list[RenderableType] = []
    for run in moment.runs:
        lines += [*_run(run, moment.time, width), Text()]
    if not moment.runs:
        lines += [Text("no run yet; `salt-vla train RECIPE` starts one"), Text()]
    if moment.more:
        lines += [Text(f"and {moment.more} more at work; name those that you want to see"), Text()]
    if moment.jobs or moment.paused or moment.queue_problem:
        lines += _queue(moment, width)
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment.time))
    return Group(*lines, Text(clock, style="dim"))


def _run(run: Watched, now: float, width: int) -> list[Text]:
    seen = run.overview
    recipe = seen.recipe_name
    title = Text.assemble(
        (seen.state, STYLES.get(seen.state, "yellow")),  # First, since a long name is cut.
        ("  ", ""),
        (_clean(seen.name), "bold"),
        (f"  {_clean(recipe)}" * (recipe not in ("", seen.name)), "dim"),
    )
    lines = [_cut(title, width), _cut(_bar(run, width), width), _cut(_pace(run, now), width)]
    lines += _curves(run, width)
    lines += [_fold(f"! {warning}", width, "yellow") for warning in seen.warnings]
    if not seen.is_running and seen.status.exit_reason not in ("", seen.state):
        lines.append(_fold(seen.status.exit_reason, width, STYLES.get(seen.state, "")))
    return lines


def _curves(run: Watched, width: int) -> list[Text]:
    there = [each for each in (("loss", run.loss, min), ("R²", run.r2, max)) if each[1]]
    figures = [f"  {number(values[-1])}, best {number(best(values))}" for _, values, best in there]
    room = width - LABEL - max(map(len, figures), default=0)
    return [
        Text.assemble(f"{name:<{LABEL}}", (f"{sparkline(values, room):<{room}}", "cyan"), said)
        for (name, values, _), said in zip(there, figures, strict=True)
    ]


def _bar(run: Watched, width: int) -> Text:
    seen = run.overview
    figures = f" {seen.step}/{seen.total_steps}  {seen.share:.0%}"
    room = max(10, width - len(figures))
    done = round(room * seen.share)
    return Text.assemble(("━" * done, "cyan"), ("─" * (room - done), "dim"), figures)


def _pace(run: Watched, now: float) -> Text:
    seen, parts = run.overview, []
    if seen.is_running:
        parts += [f"{number(seen.rate)} steps/s"] if seen.rate else []
        parts += [f"{duration(seen.eta_seconds)} left"] if seen.eta_seconds is not None else []
    parts += [f"{number(seen.clips_per_s)} clips/s"] if seen.clips_per_s else []
    parts += [f"waits for data {seen.data_wait_share:.0%}"] if seen.data_wait_share is not None else []
    parts += [f"{number(seen.memory_gb)} GB"] if seen.memory_gb is not None else []
    parts += [f"seen {ago(max(0.0, now - seen.updated))}"] if seen.updated else []
    return Text(" · ".join(parts), style="dim")


def _queue(moment: Moment, width: int) -> list[RenderableType]:
    said = moment.queue_problem or ("paused" if moment.paused else "")
    lines = [_fold(f"queue{': ' * bool(said)}{said}", width, "bold")]
    return [*lines, *(_job(job, width) for job in moment.jobs), Text()]


def _job(job: Job, width: int) -> Text:
    waits = "; ".join(map(str, job.conditions)) if job.state == "waiting" else ""
    text = f"  {job.name}  {'held' if job.held else job.state}  {job.reason or waits}"
    return _fold(text.rstrip(), width, "")


def _clean(text: str) -> str:
    return _CONTROL.sub(" ", text)


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _fold(text: str, width: int, style: str) -> Text:
    """On as many lines as it takes: what is said of a failure is never cut."""
    return Text(_clean(text), style=style, overflow="fold")
