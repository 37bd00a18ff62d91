"""Whether what a job waits for is there: asked of the queue, of run directories, of caches, of the machine.

Every answer has its reason in words; nothing here changes anything.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from salt_vla.config import Criterion
from salt_vla.errors import UserError
from salt_vla.operations.conditions import Condition, Figure, Kind, in_clock, parse_figure
from salt_vla.operations.launch import supervision
from salt_vla.operations.overview import glance
from salt_vla.operations.queue import Job
from salt_vla.operations.slots import free_gpu_bytes
from salt_vla.rundir import RunDirectory, read_json, root

MANIFEST = "manifest.json"
ENDED_WELL = "finished"
# What reading a run can raise whose files hold what nobody wrote there: it shall never end a runner.
UNREADABLE = (UserError, OSError, ValueError, TypeError, KeyError, ArithmeticError)


@dataclass(frozen=True)
class Answer:
    """`holds`, `waits`, or `never`: it will not hold any more. `why` in words; `expected`: when it may
    hold, in seconds since the epoch, where that is known."""

    state: Literal["holds", "waits", "never"]
    why: str = ""
    expected: float | None = None


@dataclass(frozen=True)
class Now:
    """What answers are given from: the jobs by number, the slot that asks (empty: nobody in particular), the
    clock in seconds since the epoch."""

    jobs: Mapping[int, Job]
    slot: str
    clock: float


HOLDS = Answer("holds")


def may_start(job: Job, now: Now) -> Answer:
    """Whether a waiting job may start: every condition holds, and nobody else works on what it works on. What
    can never hold outweighs what does not hold yet; the machine is asked last."""
    answers: list[Answer] = []
    for condition in sorted(job.conditions, key=lambda each: each.kind == "when_free"):
        if condition.kind == "when_free" and any(answer.state != "holds" for answer in answers):
            continue
        answers.append(answer(condition, now))
    never = [each.why for each in answers if each.state == "never"]
    if never:
        return Answer("never", "; ".join(never))
    waits = [each for each in answers if each.state == "waits"] or [nobody_works_on(job)]
    if waits[0].state == "holds":
        return HOLDS
    known = [each.expected for each in waits if each.expected is not None]
    expected = max(known) if len(known) == len(waits) else None
    return Answer("waits", "; ".join(each.why for each in waits), expected)


def answer(condition: Condition, now: Now) -> Answer:
    """What cannot be read is waited for: its reader's sentence says what to mend."""
    try:
        return ANSWERS[condition.kind](condition, now)
    except UNREADABLE as error:
        return Answer("waits", f"waits for {condition}, which cannot be told: {in_words(error)}")


def _after(condition: Condition, now: Now) -> Answer:
    state, why, expected = _how_it_goes(condition, now)
    if state == "":
        return Answer("waits", f"waits for {condition.text}, {why}", expected)
    if condition.kind == "after_any" or state == ENDED_WELL:
        return HOLDS
    return Answer("never", f"{condition.text} {_said(state)}" + (f" ({why})" if why else ""))


def _figure(condition: Condition, now: Now) -> Answer:
    figure = parse_figure(condition.text)
    state, why, expected = _how_it_goes(condition, now)
    if state == "":
        return Answer("waits", f"waits for {figure.run}, {why}, to see whether {condition}", expected)
    if state != ENDED_WELL:
        so = f" ({why})" if why else ""
        return Answer("never", f"{figure.run} {_said(state)}{so}, so its figures decide nothing")
    return _compared(condition, figure)


def _compared(condition: Condition, figure: Figure) -> Answer:
    """A figure that is no number satisfies no comparison, so `unless` holds of it; a column that was never
    measured decides neither way."""
    criterion = figure.criterion
    rows = RunDirectory.named(figure.run).metrics(criterion.kind)
    column = [row[criterion.field] for row in rows if criterion.field in row]
    if not column:
        there = ", ".join(sorted({name for row in rows for name in row} - {"kind", "step"})) or "none"
        return Answer(
            "never", f"{figure.run} measured no {criterion.kind}.{criterion.field}; its columns: {there}"
        )
    value = statistic(column, figure.statistic)
    holds = value is not None and criterion.holds(value)
    if holds == (condition.kind == "if"):
        return HOLDS
    return Answer("never", f"{_shown(figure, value)} is {'' if holds else 'not '}{_reference(criterion)}")


def statistic(column: list[object], name: str) -> float | None:
    """Over a column in order. None where its last line is no number, whatever was there before: the run went
    astray; `mean_last100` wants numbers in all of its lines."""
    numbers = [float(v) for v in column if type(v) in (int, float) and math.isfinite(v)]  # type: ignore[arg-type]
    if not numbers or column[-1] is None or numbers[-1] != column[-1]:
        return None
    if name == "last":
        return numbers[-1]
    if name in ("min", "max"):
        return min(numbers) if name == "min" else max(numbers)
    lines = column[-100:]
    return sum(numbers[-len(lines) :]) / len(lines) if None not in lines else None


def _shown(figure: Figure, value: float | None) -> str:
    name = f"{figure.run}.{figure.criterion.kind}.{figure.criterion.field}"
    of = name if figure.statistic == "last" else f"{figure.statistic}({name})"
    return f"{of}, {value:.4g}," if value is not None else f"{of}, no number at the end,"


def _reference(criterion: Criterion) -> str:
    return f"{criterion.sign} {criterion.number:.6g}"


def _cache(condition: Condition, now: Now) -> Answer:
    folder = Path(condition.text)
    if not (folder / MANIFEST).is_file():
        return Answer("waits", f"waits for a cache at {folder}, where none is yet")
    if (
        read_json(folder / MANIFEST, dict, "repair it with `salt-vla cache repair`").get("complete")
        is not True
    ):
        return Answer("waits", f"waits for the cache at {folder}, which is not complete yet")
    return HOLDS


def _at(condition: Condition, now: Now) -> Answer:
    if now.clock >= condition.number:
        return HOLDS
    return Answer("waits", f"waits until {in_clock(condition.number)}", condition.number)


def _free(condition: Condition, now: Now) -> Answer:
    what = condition.text.partition(":")[0]
    free = FREE[what](now.slot)
    if free is None:
        return Answer("waits", f"waits for {condition}, and no GPU answers here")
    if free >= condition.number:
        return HOLDS
    return Answer("waits", f"waits for {condition}; {free / 1e9:.1f} GB are free now")


def _free_gpu(slot: str) -> int | None:
    return free_gpu_bytes(slot or "gpu0")


def _free_ram(slot: str) -> int | None:
    return psutil.virtual_memory().available


def _free_disk(slot: str) -> int | None:
    return shutil.disk_usage(root()).free


FREE: dict[str, Callable[[str], int | None]] = {"gpu": _free_gpu, "ram": _free_ram, "disk": _free_disk}
ANSWERS: dict[Kind, Callable[[Condition, Now], Answer]] = {
    "after": _after,
    "after_any": _after,
    "after_cache": _cache,
    "at": _at,
    "when_free": _free,
    "if": _figure,
    "unless": _figure,
}


def _how_it_goes(condition: Condition, now: Now) -> tuple[str, str, float | None]:
    """How the job or run ended (empty: it has not), why or how it goes, and when its end is expected."""
    if condition.job:
        job = now.jobs[condition.job]
        if job.is_over:
            return job.state, job.reason, None
        if job.state == "waiting":
            return "", "which waits itself", None
        return "", f"which is {job.state}", ending_of(job, now.clock)
    return _outside_the_queue(condition.run)


def _outside_the_queue(name: str) -> tuple[str, str, float | None]:
    """Of a run, or of another command's launch, that the queue did not start."""
    run = RunDirectory.named(name)
    for folder in (run.path, root() / "jobs" / name):
        launched = supervision(folder)
        if launched is not None and (launched.is_at_work or launched.living()):
            return "", "which is under way", None
        if launched is not None and folder != run.path:
            return (ENDED_WELL if launched.ended_well else "failed"), launched.exit_reason, None
    status = run.status()
    if status.state in ("running", "queued"):
        return "", f"which is {status.state}", None
    return status.state, status.exit_reason, None


def nobody_works_on(job: Job) -> Answer:
    """Whether the job's run or name is nobody else's now: it may have been started by hand meanwhile."""
    try:
        launched = supervision(job.folder)
        busy = launched is not None and (launched.is_at_work or launched.living() is not None)
        busy = busy or (job.is_run and RunDirectory(job.folder).status().state == "running")
    except UNREADABLE as error:
        why = in_words(error)
        return Answer("waits", f"waits until it can be told whether somebody works on {job.name}: {why}")
    if busy:
        return Answer("waits", f"waits for {job.name}, which is under way and was not started by the queue")
    return HOLDS


def ending_of(job: Job, clock: float) -> float | None:
    """When a run that works is expected to end, in seconds since the epoch."""
    left = None
    if job.is_run:
        with suppress(*UNREADABLE):  # Other commands say what is damaged there.
            left = glance(RunDirectory(job.folder)).eta_seconds
    return clock + left if left is not None else None


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _said(state: str) -> str:
    return {"failed": "failed", "skipped": "was skipped"}.get(state, f"was {state}")
