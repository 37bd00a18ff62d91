"""What to do next, the most pressing first, each with the command that does it.

Proposes only what follows from the runs, the queue, the caches and the recipes' open hypotheses.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from salt_vla.config import Recipe
from salt_vla.errors import UserError
from salt_vla.operations.handoff.commands import make_again, near, of_recipe, with_seed
from salt_vla.operations.handoff.effects import Effect
from salt_vla.operations.handoff.facts import RunFacts
from salt_vla.operations.handoff.project import CacheFacts
from salt_vla.operations.launch import LAUNCH, supervision, wanted_in
from salt_vla.operations.queue import Job
from salt_vla.recipes import get_recipe, recipe_names
from salt_vla.rundir import root

MOST_STEPS = 20
MOST_AT_ONCE = 8  # encoders that one command probes
ENOUGH_SEEDS = 3
UNFINISHED = ("stopped", "killed", "failed")


@dataclass(frozen=True)
class Step:
    """A sentence, and the command for it, given in the project's folder (empty where there is none)."""

    what: str
    command: str = ""


def next_steps(
    runs: Sequence[RunFacts],
    jobs: Sequence[Job],
    caches: Sequence[CacheFacts],
    found: Sequence[Effect],
    has_runner: bool = False,
) -> list[Step]:
    if not runs and not jobs:
        return [
            Step(
                "nothing has been run here; the demonstration trains a teacher and a student", "salt-vla demo"
            )
        ]
    waiting = {job.name for job in jobs if not job.is_over}
    steps = [
        *_broken_off(runs, waiting),
        *_unfinished_caches(caches),
        *_queue(jobs, has_runner),
        *_cut_short(runs, waiting),
        *_open_hypotheses(runs, caches, waiting),
        *_unprobed(runs),
        *_still_falling(runs),
        *_more_seeds(runs, found),
    ]
    return steps[:MOST_STEPS]


def _broken_off(runs: Sequence[RunFacts], waiting: set[str]) -> Iterator[Step]:
    """Runs that the same command goes on with, unless the queue or a supervisor will."""
    for run in runs:
        if run.state not in UNFINISHED or run.name in waiting or _is_looked_after(run):
            continue
        reason = run.seen.status.exit_reason
        first = "look at the reason first; " if run.state == "failed" else ""
        where = f"{run.state} at step {run.seen.step} of {run.seen.total_steps}"
        if run.config is None:
            yield Step(f"{run.name} {run.state} before it began ({reason}); mend that, and start it again",
                       _launched_as(run))  # fmt: skip
            continue
        command = make_again(run.run, run.config, run.seen.recipe_name, run.seen.total_steps)
        yield Step(f"{run.name} was {where} ({reason}); {first}the same command goes on from its checkpoint",
                   command)  # fmt: skip


def _cut_short(runs: Sequence[RunFacts], waiting: set[str]) -> Iterator[Step]:
    for run in runs:
        if (
            run.state == "finished"
            and run.config is not None
            and not run.is_whole
            and run.name not in waiting
        ):
            where = f"step {run.seen.step} of {run.config.steps}"
            yield Step(f"{run.name} was cut short at {where}, as --max-steps asked; this does the rest",
                       make_again(run.run, run.config, run.seen.recipe_name))  # fmt: skip


def _is_looked_after(run: RunFacts) -> bool:
    try:
        now = supervision(run.run.path)
    except UserError:
        return False
    return now is not None and not now.is_over and now.supervisor.is_alive()


def _launched_as(run: RunFacts) -> str:
    if not (run.run.path / LAUNCH).is_file():
        return ""
    try:
        return shlex.join(["salt-vla", *wanted_in(run.run.path).command])
    except UserError:
        return ""


def _unfinished_caches(caches: Sequence[CacheFacts]) -> Iterator[Step]:
    for cache in caches:
        if cache.problem:
            yield Step(f"the cache {cache.path} cannot be read ({cache.problem})",
                       shlex.join(["salt-vla", "cache", "repair", cache.path]))  # fmt: skip
        elif not cache.complete:
            yield Step(f"the cache {cache.path} is not complete; the command that began it goes on with it",
                       _build_of(cache))  # fmt: skip


def _build_of(cache: CacheFacts) -> str:
    """As it was launched apart from a terminal, where it was."""
    place = (root() / cache.path).resolve()
    for file in sorted(root().glob(f"jobs/*/{LAUNCH}")):
        try:
            words = list(wanted_in(file.parent).command)
        except UserError:
            continue
        outs = [after for word, after in pairwise(words) if word == "--out"]
        is_there = any((root() / out).resolve() in (place, place.parent) for out in outs)
        if words[:2] == ["cache", "build"] and is_there:
            return shlex.join(["salt-vla", *words])
    return ""


def _queue(jobs: Sequence[Job], has_runner: bool) -> Iterator[Step]:
    waiting = [job for job in jobs if job.state == "waiting"]
    if waiting and not has_runner:
        yield Step(f"{len(waiting)} jobs wait in the queue and no runner is at work; start one",
                   "salt-vla queue run --detach")  # fmt: skip
    active = {job.name for job in jobs if not job.is_over}
    last = {job.name: job for job in sorted(jobs, key=lambda job: job.id)}
    for job in last.values():
        if job.state in ("failed", "skipped") and job.name not in active:
            yield Step(f"the job {job.name} was {job.state} ({job.reason}); once that is mended, try again",
                       shlex.join(["salt-vla", "queue", "retry", job.name]))  # fmt: skip


def _open_hypotheses(
    runs: Sequence[RunFacts], caches: Sequence[CacheFacts], waiting: set[str]
) -> Iterator[Step]:
    """Recipes without an answer that can be run on what is here."""
    begun = {
        run.seen.recipe_name for run in runs if (run.is_whole or run.state != "finished") and not run.odd
    }
    for recipe in open_hypotheses(runs):
        if recipe.name in begun | waiting:
            continue
        data, cache = _place_for(recipe, runs, caches)
        if data:
            yield Step(
                f"open hypothesis of {recipe.name}: {recipe.hypothesis}", of_recipe(recipe, data, cache)
            )


def _unprobed(runs: Sequence[RunFacts]) -> Iterator[Step]:
    """Encoders that nobody has read from, a command for each table of clips."""
    tables: dict[str, list[str]] = {}
    for run in runs:
        if run.is_whole and run.config is not None and not run.probes:
            tables.setdefault(run.config.data.table, []).append(run.name)
    for table, names in tables.items():
        what = "a loss decides nothing between different targets, teachers or masks; probe the encoders"
        words = ["salt-vla", "eval", *names[:MOST_AT_ONCE], *(["--data", near(table)] if table else [])]
        yield Step(f"{what} ({len(names)} runs have no probes)",
                   shlex.join(words))  # fmt: skip


def _answers(run: RunFacts) -> bool:
    return not run.odd and run.seen.verdict.get("verdict") in ("confirmed", "refuted")


def open_hypotheses(runs: Sequence[RunFacts]) -> list[Recipe]:
    """Every recipe that claims something that no run here has confirmed or refuted."""
    answered = {run.seen.recipe_name for run in runs if _answers(run)}
    found = []
    for name in recipe_names():
        try:
            recipe = get_recipe(name)
        except UserError:
            continue
        if recipe.hypothesis and name not in answered:
            found.append(recipe)
    return found


def _place_for(recipe: Recipe, runs: Sequence[RunFacts], caches: Sequence[CacheFacts]) -> tuple[str, str]:
    """(data, cache) of a run here that the recipe could take its clips from; empty where there is none."""
    geometry = recipe.config.geometry
    whole = {cache.path for cache in caches if cache.complete}
    for run in runs:
        config = run.config
        if config is None or config.geometry != geometry or config.data.view != recipe.config.data.view:
            continue
        if recipe.config.target.provider != "cache":
            return config.data.table, ""
        if config.target.provider == "cache" and config.target.source in whole:
            return config.data.table, config.target.source
    return "", ""


def _still_falling(runs: Sequence[RunFacts]) -> Iterator[Step]:
    for run in runs:
        if run.is_whole and run.config and run.measured.trend and run.measured.trend.verdict == "still falls":
            longer = replace(run.config, steps=2 * run.config.steps)
            command = make_again(run.run, longer, run.seen.recipe_name, name=f"{run.name}-longer")
            yield Step(f"{run.name}'s loss still fell when its steps were over; twice as many would tell",
                       command)  # fmt: skip


def _more_seeds(runs: Sequence[RunFacts], found: Sequence[Effect]) -> Iterator[Step]:
    by_name = {run.name: run for run in runs}
    asked: set[str] = set()
    for effect in found:
        count = effect.seeds
        if count >= ENOUGH_SEEDS:
            continue
        for name in effect.runs[0]:
            run = by_name[name]
            if run.config is None or name in asked:
                continue
            asked.add(name)
            command = make_again(run.run, run.config, run.seen.recipe_name, name=run.name)
            seed = 1 + max(r.config.seed for r in runs if r.config is not None)
            yield Step(
                f"what {effect.field} does has been seen with {count} {'seed' if count == 1 else 'seeds'} "
                f"only; another seed of {name}",
                with_seed(command, name, seed),
            )
