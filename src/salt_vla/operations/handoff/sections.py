"""The page's sections: what is known of a project as headings, sentences, tables and commands.

Knows neither Markdown nor HTML.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from salt_vla.config import Recipe
from salt_vla.operations.conditions_now import Now, may_start
from salt_vla.operations.handoff.commands import has_changes, make_again
from salt_vla.operations.handoff.effects import Effect
from salt_vla.operations.handoff.facts import RunFacts
from salt_vla.operations.handoff.next_steps import UNFINISHED, Step, open_hypotheses
from salt_vla.operations.handoff.project import CacheFacts, TableFacts
from salt_vla.operations.queue import Job
from salt_vla.reports.html import Block, Checks, Code, Facts, Section
from salt_vla.reports.tables import Cell, Mark, Table

LONGEST_REASON, LONGEST_COMMAND = 200, 60
MOST_NAMED = 4  # runs of a recipe
MOST_OVER = 20  # jobs that are over and still named


@dataclass(frozen=True)
class Project:
    """All that the page is made of. `others`: runs that it does not look into."""

    runs: Sequence[RunFacts]
    others: int
    jobs: Sequence[Job]
    caches: Sequence[CacheFacts]
    tables: Sequence[TableFacts]
    machine: Sequence[tuple[str, str]]
    effects: Sequence[Effect]
    steps: Sequence[Step]
    written: float
    queue_problem: str = ""

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"written": self.written, "other_runs": self.others}
        said["runs"] = [run.to_json() for run in self.runs]
        said["jobs"] = [job.to_json() for job in self.jobs]
        for name in ("caches", "tables", "effects", "steps"):
            said[name] = [asdict(each) for each in getattr(self, name)]
        return said | {"machine": dict(self.machine), "queue_problem": self.queue_problem}


def sections(project: Project) -> dict[str, Section]:
    """By the name that stands in the page's marks, in the page's order."""
    return {
        "state": Section("Where it stands", conclusions(project)),
        "next": Section("Next steps", _next(project)),
        "now": Section("Running now", _now(project)),
        "queue": Section("Queue", _queue(project)),
        "experiments": Section("Finished experiments", _experiments(project)),
        "learned": Section("What was learned", _learned(project)),
        "failures": Section("What broke off", _failures(project)),
        "hypotheses": Section("Open hypotheses", _hypotheses(project)),
        "data": Section("Data", _data(project)),
        "machine": Section("Hardware", [Facts(project.machine)]),
        "commands": Section("Commands to reproduce", _commands(project)),
    }


def conclusions(project: Project) -> list[str]:
    """One sentence of where the project stands; others on what is best and what comes next."""
    runs = project.runs
    counts = [(sum(run.state == state for run in runs), state) for state in ("running", *UNFINISHED)]
    finished = sum(run.state == "finished" for run in runs)
    waiting = sum(job.state == "waiting" for job in project.jobs)
    parts = [f"{finished} finished", *(f"{count} {state}" for count, state in counts if count)]
    parts += [f"{waiting} waiting in the queue"] * bool(waiting)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(project.written))
    said = [f"As of {when}: runs: {', '.join(parts)}."]
    r2 = {run.name: run.r2 for run in runs if run.r2 is not None}
    if r2:
        best = max(r2, key=lambda name: r2[name])
        above = sum(value > 0 for value in r2.values())
        said.append(
            f"{above} of {len(r2)} runs explain more of held-out clips than each place's mean does; the "
            f"highest R² against it is {r2[best]:+.3f} ({best}). R² of different targets or masks are no "
            "ranking; a loss without its baseline says nothing."
        )
    if project.steps:
        said.append(f"Next: {project.steps[0].what.removesuffix('.')}.")
    return said


def _next(project: Project) -> list[Block]:
    if not project.steps:
        return ["Nothing is left to do that the runs, the queue and the recipes know of."]
    blocks: list[Block] = ["The most pressing first; commands are given in this folder."]
    for number, step in enumerate(project.steps, start=1):
        blocks.append(f"{number}. {step.what.removesuffix('.')}.")
        if step.command:
            blocks.append(Code(step.command))
    return blocks


def _now(project: Project) -> list[Block]:
    running = [run for run in project.runs if run.state == "running"]
    if not running:
        return ["No run is at work."]
    columns = ("step", "time left", "loss", "R², place mean", "clips/s", "warnings")
    cells = []
    for run in running:
        seen = run.seen
        warnings = "; ".join([*seen.warnings, *run.measured.alarms])
        texts = (
            f"{seen.step} of {seen.total_steps}", _duration(seen.eta_seconds),
            _number(seen.figure("train", "loss")), _signed(seen.figure("val", "r2_position_mean")),
            _number(seen.clips_per_s), warnings,
        )  # fmt: skip
        cells.append(tuple(Cell(_brief(text)) for text in texts))
    return [Table("At work", "run", columns, _names(running), tuple(cells))]


def _queue(project: Project) -> list[Block]:
    if project.queue_problem:
        return [project.queue_problem]
    now = Now({job.id: job for job in project.jobs}, "", project.written)
    active = [job for job in project.jobs if not job.is_over]
    over = [job for job in project.jobs if job.is_over][:MOST_OVER]
    blocks: list[Block] = []
    for title, jobs in (("In the queue, in its order", active), ("Over, the last first", over)):
        if jobs:
            cells = tuple(
                (Cell(job.state), Cell(_brief(_why(job, now))),
                 Cell(_brief(" ".join(job.command), LONGEST_COMMAND)))
                for job in jobs
            )  # fmt: skip
            names = tuple((job.name, "") for job in jobs)
            blocks.append(Table(title, "job", ("state", "why", "command"), names, cells))
    return blocks or ["The queue is empty."]


def _why(job: Job, now: Now) -> str:
    if job.state != "waiting":
        return job.reason
    found = may_start(job, now)
    why = found.why or "waits for its turn"
    return f"{'held back by hand; ' * job.held}{'will be skipped: ' * (found.state == 'never')}{why}"


def _experiments(project: Project) -> list[Block]:
    finished = [run for run in project.runs if run.state == "finished"]
    blocks: list[Block] = []
    spaces: dict[str, list[RunFacts]] = {}
    for run in finished:
        spaces.setdefault(run.space_key or f"alone {run.name}", []).append(run)
    for group in spaces.values():
        blocks.append(_of_one_space(group))
    if not finished:
        blocks.append("No run has finished yet.")
    elif len(spaces) > 1:
        blocks.insert(0, "A table for each target space: losses compare within a table, never between two.")
    blocks += _probes(finished)
    if project.others:
        blocks.append(f"{project.others} older runs are not on this page; `salt-vla runs ls` lists all.")
    return blocks


def _of_one_space(runs: Sequence[RunFacts]) -> Table:
    columns = (
        "verdict", "lowest loss", "last loss", "R², place mean", "channel mean", "copy nearest", "steps",
        "clips", "hours", "ended",
    )  # fmt: skip
    cells = []
    for run in runs:
        r2 = run.measured.r2
        lowest = (
            f"{_number(run.measured.min_loss)} at {run.measured.min_step}"
            if run.measured.min_loss is not None
            else "–"
        )
        texts = (
            run.seen.verdict.get("verdict", "–"), lowest, _number(run.measured.last_loss),
            _signed(r2.get("r2_position_mean")), _signed(r2.get("r2_channel_mean")),
            _signed(r2.get("r2_copy_nearest")), f"{run.seen.step}", f"{run.clips or 0:,}",
            f"{run.seen.status.seconds / 3600:.2f}", run.seen.status.exit_reason,
        )  # fmt: skip
        cells.append(tuple(Cell(_brief(str(text))) for text in texts))
    space = runs[0].space or "settings unknown"
    note = "Last loss: the mean of the last tenth of the lines, at most 100. R² on held-out clips, last line."
    return Table(f"Targets: {space}", "run", columns, _names(runs), tuple(cells), note)


def _names(runs: Sequence[RunFacts]) -> tuple[tuple[str, str], ...]:
    return tuple((run.name, run.seen.recipe_name) for run in runs)


def _probes(runs: Sequence[RunFacts]) -> list[Block]:
    """A table a suite: each run's own values, and below them how far it is from what it was probed beside."""
    suites: dict[str, dict[tuple[str, str], dict[str, Cell]]] = {}
    for run in runs:
        for row in run.probes:
            lines = suites.setdefault(str(row.get("suite")), {})
            target, spread = (
                str(row.get("target")),
                f"[{_signed(row.get('low'))}, {_signed(row.get('high'))}]",
            )
            if "against" in row:
                name = (run.name, f"minus {row['against']}")
                cell = Cell(_signed(row.get("difference")), spread, _mark(row))
            else:
                name, cell = (run.name, ""), Cell(_signed(row.get("value")), spread)
            lines.setdefault(name, {})[target] = cell
    blocks: list[Block] = []
    for suite, lines in suites.items():
        targets = tuple(dict.fromkeys(target for line in lines.values() for target in line))
        cells = tuple(tuple(line.get(target, Cell("–")) for target in targets) for line in lines.values())
        note = "R² on held-out episodes, 95 % intervals; differences are paired, ▲ ahead and ▼ behind."
        blocks.append(Table(f"Probes, {suite}", "run", targets, tuple(lines), cells, note))
    return blocks


def _mark(row: dict[str, Any]) -> Mark:
    low, high = row.get("low"), row.get("high")
    if not isinstance(low, float | int) or not isinstance(high, float | int):
        return ""
    return "ahead" if low > 0 else "behind" if high < 0 else ""


def _learned(project: Project) -> list[Block]:
    items = [("ok" if each.is_apart else "warn", each.field, each.sentence) for each in project.effects]
    for run in project.runs:
        said = _of_its_curve(run) if run.state == "finished" else []
        if said or run.measured.alarms:
            is_well = not run.measured.alarms and (run.r2 is None or run.r2 > 0)
            items.append(("ok" if is_well else "warn", run.name, "; ".join([*said, *run.measured.alarms])))
    if not items:
        return ["Nothing yet: effects need two runs that differ in one field, plateaus a curve of 40 lines."]
    told = sum(each.low is not None for each in project.effects)
    chance = f"{told} differences with a 95 % interval, not corrected: one in twenty excludes zero by chance."
    checks = Checks(tuple((mark, topic, _brief(text, 2 * LONGEST_REASON)) for mark, topic, text in items))
    curves = "Intervals of a curve's last half are of that run's own noise, and too narrow where it drifts."
    is_of_curves = any(run.state == "finished" and run.measured.trend is not None for run in project.runs)
    return [*[chance] * bool(told), *[curves] * is_of_curves, checks]


def _of_its_curve(run: RunFacts) -> list[str]:
    said = [_plateau(run)] if run.measured.trend is not None else []
    if run.r2 is not None and run.r2 <= 0:
        said.append(f"R² against each place's mean is {run.r2:+.3f}: nothing that the mean does not say")
    return said


def _plateau(run: RunFacts) -> str:
    trend = run.measured.trend
    assert trend is not None
    change, low, high = (100 * each / abs(trend.level) if trend.level else math.nan for each in
                         (trend.change, trend.low, trend.high))  # fmt: skip
    said = {"cannot be told": "whether its loss still falls cannot be told"}
    flat = ""
    if trend.verdict == "stands" and run.config and run.measured.last_lr is not None:
        left = run.measured.last_lr / run.config.optimizer.lr if run.config.optimizer.lr else 1.0
        flat = f"; its rate ended at {left:.0%} of the peak, which flattens any curve" if left < 0.1 else ""
    verdict = said.get(trend.verdict, f"its loss {trend.verdict}")
    return (
        f"{verdict}: {change:+.1f} % [{low:+.1f}, {high:+.1f}] over "
        f"steps {trend.first} to {trend.last}, level {_number(trend.level)}{flat}"
    )


def _failures(project: Project) -> list[Block]:
    items = []
    for run in project.runs:
        if run.state in (*UNFINISHED, "damaged") or run.problem:
            mark = "warn" if run.state == "stopped" else "bad"
            reason = run.seen.status.exit_reason or run.problem
            items.append((mark, run.name, _brief(f"{run.state} at step {run.seen.step}: {reason}")))
        elif run.broke_off or run.seen.status.resumed_from:
            steps = ", ".join(map(str, run.seen.status.resumed_from))
            said = [f"now {run.state}", *[f"went on from step {steps}"] * bool(steps)]
            said += [f"before: {'; '.join(run.broke_off)}"] * bool(run.broke_off)
            items.append(("ok", run.name, _brief("; ".join(said))))
    return [Checks(tuple(items))] if items else ["No run on this page broke off."]


def _hypotheses(project: Project) -> list[Block]:
    recipes = open_hypotheses(project.runs)
    tried: dict[str, list[str]] = {}
    for run in project.runs:
        tried.setdefault(run.seen.recipe_name, []).append(f"{run.name} ({run.state})")
    items = [
        ("warn", recipe.name, f"{recipe.hypothesis} Counts as success: {_wanted(recipe)}. "
         f"Runs: {', '.join(tried.get(recipe.name, ())[:MOST_NAMED]) or 'none here'}.")
        for recipe in recipes
    ]  # fmt: skip
    return [Checks(tuple(items))] if items else ["Every recipe's hypothesis has a verdict."]


def _wanted(recipe: Recipe) -> str:
    return (recipe.criterion or recipe.target).removesuffix(".")


def _data(project: Project) -> list[Block]:
    blocks: list[Block] = []
    if project.tables:
        cells = tuple(
            tuple(Cell(text) for text in (
                f"{table.clips:,}" if table.clips else "–", _brief(", ".join(table.used_by)),
            ))
            for table in project.tables
        )  # fmt: skip
        names = tuple((table.table, "") for table in project.tables)
        blocks.append(Table("Clip tables", "table", ("clips", "learned from by"), names, cells))
    if project.caches:
        columns = ("teacher", "fingerprint", "split", "clips × views", "quarantined", "state", "used by")
        cells = tuple(
            tuple(Cell(_brief(text)) for text in (
                cache.teacher, cache.fingerprint, cache.split, f"{cache.clips:,} × {cache.views}",
                str(cache.quarantined), cache.problem or ("complete" if cache.complete else "unfinished"),
                ", ".join(cache.used_by),
            ))
            for cache in project.caches
        )  # fmt: skip
        names = tuple((cache.path, "") for cache in project.caches)
        blocks.append(Table("Caches of latents", "cache", columns, names, cells))
    return blocks or ["No run has data on record, and there is no cache."]


def _commands(project: Project) -> list[Block]:
    """Under other names, so that what is here is not touched."""
    lines, unknown = [], []
    for run in project.runs:
        if run.config is None or run.problem:
            continue
        if has_changes(run.run):
            unknown.append(run.name)
        lines.append(
            make_again(run.run, run.config, run.seen.recipe_name, run.seen.total_steps,
                       name=f"{run.name}-again")
        )  # fmt: skip
    if not lines:
        return ["No run has settings on record."]
    note = "Given in this folder. Without `-again` in its name a command resumes the run itself. Device, "
    note += "precision and threads are those that were measured; leave them out on another machine."
    blocks: list[Block] = [note, Code("\n".join(lines))]
    if unknown:
        blocks.append(f"Settings changed on the way (config_changes.jsonl says when): {', '.join(unknown)}.")
    return blocks


def _brief(text: str, longest: int = LONGEST_REASON) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _number(value: Any) -> str:
    return f"{value:.4g}" if type(value) in (int, float) and math.isfinite(value) else "–"


def _signed(value: Any) -> str:
    if type(value) not in (int, float) or not math.isfinite(value):
        return "–"
    return f"{value:+.3f}" if abs(value) < 1000 else f"{value:+.1e}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"
