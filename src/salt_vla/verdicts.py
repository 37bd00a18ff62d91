"""What a run says of its recipe's hypothesis: `recipe.json` from its start, `verdict.json` from its end.

Reads runs through `rundir` alone. Figures of two runs are compared only where they measure the same thing: a
loss in one target space against a loss in another decides nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from salt_vla.config import (
    Criterion,
    Recipe,
    TrainConfig,
    differing_fields,
    from_json,
    parse_criterion,
)
from salt_vla.errors import UserError
from salt_vla.recipes import get_recipe, recipe_names
from salt_vla.rundir import RunDirectory, all_runs, read_json, write_text

RECIPE, VERDICT = "recipe.json", "verdict.json"
PLACES = ("seed", "data.table", "target.source")  # Which seed and which folder; what lies there is pinned.
TASK = ("masks", "encoder.geometry", "data.view", "target", "objective.targets", "objective.statistics")
PINS = ("clip_table_provenance.json", "cache_provenance.json")

Answer = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """`verdict.json`. `value`: the run's figure that the criterion names; `against`: what it was held
    against, the figure of `parent_run` plus the criterion's margin, or a number."""

    verdict: Answer
    reason: str
    criterion: str = ""
    value: float | None = None
    against: float | None = None
    parent_run: str = ""
    step: int = 0


def note_recipe(run: RunDirectory, recipe: Recipe, config: TrainConfig) -> None:
    """Write down which experiment the run is, and the fields in which it departs from it or it from its
    parent (seed, folders and the runtime aside)."""
    parent = get_recipe(recipe.parent) if recipe.parent in recipe_names() else recipe
    noted = {key: getattr(recipe, key) for key in ("name", "parent", "hypothesis", "target", "criterion")}
    noted["changed"] = _differing(recipe.config, config)
    noted["differs_from_parent"] = _differing(parent.config, recipe.config)
    write_text(run.path / RECIPE, json.dumps(noted, indent=2))


def conclude(run: RunDirectory) -> Verdict | None:
    """The verdict of a finished run on its recipe's hypothesis, also left in its directory; None where the
    run has no recipe on record or the recipe claims nothing."""
    noted = noted_recipe(run)
    if not noted or not noted["hypothesis"]:
        return None
    verdict = _judge(run, noted)
    write_text(run.path / VERDICT, json.dumps(asdict(verdict), indent=2))
    return verdict


def noted_recipe(run: RunDirectory) -> dict[str, Any]:
    """What `recipe.json` holds; empty where there is none."""
    file = run.path / RECIPE
    return read_json(file, dict) if file.is_file() else {}


def noted_verdict(run: RunDirectory) -> dict[str, Any]:
    """What `verdict.json` holds; empty where there is none."""
    file = run.path / VERDICT
    return read_json(file, dict) if file.is_file() else {}


def _judge(run: RunDirectory, noted: dict[str, Any]) -> Verdict:
    config, step = _config_of(run), run.status().step
    if not noted["criterion"]:
        return Verdict(
            "undecided", f"no condition that a program can check; wanted: {noted['target']}", step=step
        )
    text, criterion = noted["criterion"], parse_criterion(noted["criterion"])
    value = last_figure(run, criterion.kind, criterion.field)
    if step < config.steps:
        return Verdict("undecided", f"stopped at step {step} of {config.steps}", text, value, step=step)
    if value is None:
        reason = f"{run.metrics_file.name} has no {criterion.kind}.{criterion.field}"
        return Verdict("undecided", reason, text, step=step)
    if not criterion.of_parent:
        return _verdict(criterion, text, value, 0.0, "", step)
    return _against_parent(run, config, noted, criterion, value, step)


def _against_parent(
    run: RunDirectory,
    config: TrainConfig,
    noted: dict[str, Any],
    criterion: Criterion,
    value: float,
    step: int,
) -> Verdict:
    text = noted["criterion"]

    def undecided(reason: str) -> Verdict:
        return Verdict("undecided", reason, text, value, step=step)

    parent = _parent_of(run, config, noted)
    if parent is None:
        return undecided(
            f"there is no finished run of {noted['parent']} on the same clips whose settings differ from "
            "this run's only as the two recipes do"
        )
    unlike = _unlike(run, config, parent, criterion)
    if unlike:
        return undecided(
            f"{criterion.kind}.{criterion.field} of this run and of {parent.name} measure different things "
            f"({', '.join(unlike)}); probe both encoders with `salt-vla eval`"
        )
    theirs = last_figure(parent, criterion.kind, criterion.field)
    if theirs is None:
        return undecided(f"run {parent.name} has no {criterion.kind}.{criterion.field}")
    return _verdict(criterion, text, value, theirs, parent.name, step)


def _verdict(
    criterion: Criterion, text: str, value: float, parent: float, parent_run: str, step: int
) -> Verdict:
    against = criterion.number + parent
    holds = criterion.holds(value, parent)
    of_whom = f", of run {parent_run}; one run each, without an interval" if parent_run else ""
    reason = f"{value:.4g} is {'' if holds else 'not '}{criterion.sign} {against:.4g}{of_whom}"
    return Verdict("confirmed" if holds else "refuted", reason, text, value, against, parent_run, step)


def last_figure(run: RunDirectory, kind: str, field: str) -> float | None:
    """The last row of that kind that has such a number, or None."""
    rows = [row[field] for row in run.metrics(kind) if field in row and row[field] is not None]
    return float(rows[-1]) if rows else None


def _parent_of(run: RunDirectory, config: TrainConfig, noted: dict[str, Any]) -> RunDirectory | None:
    """A finished run of the parent recipe on the same clips, of the same seed where there is one, whose
    settings differ only where the recipes do."""
    explained = set(noted["differs_from_parent"])
    found = []
    for other in all_runs():
        try:
            is_parent = noted_recipe(other).get("name") == noted["parent"]
            if not is_parent or other.name == run.name or other.status().state != "finished":
                continue
            theirs = _config_of(other)
            whole = other.status().step >= theirs.steps
            if (
                whole
                and _pin(other, PINS[0]) == _pin(run, PINS[0])
                and set(_differing(theirs, config)) <= explained
            ):
                found.append((theirs.seed == config.seed, other.name, other))
        except UserError:  # One damaged run must not keep others from a verdict.
            continue
    return max(found)[2] if found else None


def _unlike(run: RunDirectory, config: TrainConfig, parent: RunDirectory, criterion: Criterion) -> list[str]:
    """Why the two runs' figures do not measure the same thing: fields of the task that differ."""
    if criterion.kind == "probe":
        return []
    theirs = _config_of(parent)
    if "ema" in (config.target.provider, theirs.target.provider):
        return ["each has targets of its own, which move with it"]
    task = (*TASK, "objective") if "loss" in criterion.field else TASK
    unlike = [
        field
        for field in _differing(theirs, config)
        if f"{field}.".startswith(tuple(f"{each}." for each in task))
    ]
    return unlike + ([] if _pin(run, PINS[1]) == _pin(parent, PINS[1]) else ["the cached latents"])


def _differing(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Fields that decide what is computed, seed and folders aside."""
    return [
        each.field
        for each in differing_fields(before, after)
        if not each.free and each.field not in PLACES and not each.field.startswith("runtime.")
    ]


def _config_of(run: RunDirectory) -> TrainConfig:
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))


def _pin(run: RunDirectory, name: str) -> dict[str, Any]:
    file = run.path / name
    return read_json(file, dict) if file.is_file() else {}
