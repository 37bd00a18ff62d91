"""What a run says of its recipe's hypothesis: `recipe.json` from its start, `verdict.json` from its end.

Reads runs through `rundir` alone. Figures of two runs are compared only where they measure the same thing: a
loss in one target space against a loss in another decides nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from salt_vla.config import (
    Criterion,
    Recipe,
    TrainConfig,
    differing_fields,
    from_json,
    parse_criterion,
)
from salt_vla.errors import RunError, UserError
from salt_vla.rundir import RunDirectory, all_runs, read_json, write_text

RECIPE, VERDICT = "recipe.json", "verdict.json"
CHANGES, BRANCH = "config_changes.jsonl", "branch.json"
PLACES = ("seed", "data.table", "target.source")  # Which seed and which folder; what lies there is pinned.
TASK = ("masks", "encoder.geometry", "data.view", "target", "objective.targets", "objective.statistics")
CLIPS, TEACHERS = "clip_table_provenance.json", ("cache_provenance.json", "teacher_provenance.json")
NOTED: dict[str, type] = dict.fromkeys(("name", "parent", "hypothesis", "target", "criterion"), str)
NOTED |= dict.fromkeys(("changed", "differs_from_parent"), list)

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
    from salt_vla.recipes import get_recipe, recipe_names  # Lists of runs, which read notes, need none.

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
    """What `recipe.json` holds; empty where there is none. Raises `RunError` for a damaged one."""
    return _read(run.path / RECIPE, NOTED)


def noted_verdict(run: RunDirectory) -> dict[str, Any]:
    """What `verdict.json` holds; empty where there is none. Raises `RunError` for a damaged one."""
    return _read(run.path / VERDICT, {"verdict": str, "reason": str})


def _read(file: Path, kinds: dict[str, type]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = read_json(file, dict)
    wrong = [name for name, kind in kinds.items() if type(found.get(name)) is not kind]
    if wrong:
        raise RunError(f"{file} is damaged ({', '.join(wrong)}); remove it and run the same command again")
    return found


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
    odd = departures(run, noted)
    if odd:
        return Verdict("undecided", f"{value:.4g}, but {odd}", text, value, step=step)
    if not criterion.of_parent:
        return _verdict(criterion, text, value, 0.0, "", step)
    return _against_parent(run, config, noted, criterion, value, step)


def departures(run: RunDirectory, noted: dict[str, Any]) -> str:
    """Why the run says nothing of its recipe's hypothesis, whatever its figures are; empty where it may.
    Beside a parent's run that departs alike it may depart from its recipe. Raises `RunError`."""
    changed, origin = changed_on_the_way(run), origin_of(run)
    if changed:
        return f"{', '.join(changed)} was changed on the way"
    if origin:
        return f"it began with the weights of {origin}"
    criterion = parse_criterion(noted["criterion"]) if noted["criterion"] else None
    if noted["changed"] and not (criterion and criterion.of_parent):
        return f"it departs from {noted['name']} in {', '.join(map(str, noted['changed']))}"
    return ""


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

    parent = _parent_of(run, config, noted, criterion)
    if parent is None:
        length = " and of as many steps" if criterion.same_steps else ""
        return undecided(
            f"there is no finished run of {noted['parent']} on the same clips{length} whose settings differ "
            "from this run's only as the two recipes do"
        )
    why = unlike(run, config, parent, _config_of(parent), criterion.kind, criterion.field)
    if why:
        return undecided(
            f"{criterion.kind}.{criterion.field} of this run and of {parent.name} measure different things "
            f"({', '.join(why)}); probe both encoders with `salt-vla eval`"
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


def last_figure(run: RunDirectory, kind: str, field: str, until: int | None = None) -> float | None:
    """The number in that column of the last row of that kind (up to step `until`) that has the column; None
    where there is none, and where it is no number: a run that went astray has no figure, whatever it had
    before."""
    rows = [
        row[field] for row in run.metrics(kind) if field in row and (until is None or row["step"] <= until)
    ]
    return float(rows[-1]) if rows and type(rows[-1]) in (int, float) else None


def _parent_of(
    run: RunDirectory, config: TrainConfig, noted: dict[str, Any], criterion: Criterion
) -> RunDirectory | None:
    """A finished run of the parent recipe on the same clips, of the same seed where there is one, whose
    settings differ only where the recipes do, and there are the parent's: not a run of it that was given
    what the child has."""
    found = []
    for other in all_runs():
        try:
            theirs = noted_recipe(other)
            is_parent = theirs.get("name") == noted["parent"] and other.name != run.name
            if not is_parent or other.status().state != "finished":
                continue
            settings = _config_of(other)
            whole = other.status().step >= settings.steps
            if departures(other, theirs | {"criterion": noted["criterion"]}):
                continue
            same_clips = _pin(other, CLIPS) == _pin(run, CLIPS)
            differing = set(_differing(settings, config))
            if whole and same_clips and _is_fair(differing, noted, set(theirs["changed"]), criterion):
                found.append((settings.seed == config.seed, other.name, other))
        except UserError:  # One damaged run must not keep others from a verdict.
            continue
    return max(found)[2] if found else None


def _is_fair(differing: set[str], noted: dict[str, Any], changed: set[str], criterion: Criterion) -> bool:
    """Whether two runs that differ in these fields differ in what the child's hypothesis is about. `changed`:
    in what the other run departs from the parent recipe; this one must then depart from its own alike."""
    explained = set(noted["differs_from_parent"])
    given = (changed & explained) - (set(noted["changed"]) - differing)
    if criterion.same_steps:
        if "steps" in differing:
            return False
        given -= {"steps"}
    return differing <= explained and not given and (bool(differing) or not explained)


def unlike(
    run: RunDirectory, config: TrainConfig, other: RunDirectory, theirs: TrainConfig, kind: str, field: str
) -> list[str]:
    """Why a figure of two runs does not measure the same thing: fields of the task that differ. Empty where
    it does."""
    if kind == "probe":
        return []
    if "ema" in (config.target.provider, theirs.target.provider):
        return ["each has targets of its own, which move with it"]
    task = (*TASK, "objective") if "loss" in field else TASK
    differing = [
        each
        for each in _differing(theirs, config)
        if f"{each}.".startswith(tuple(f"{name}." for name in task))
    ]
    if any(_pin(run, name) != _pin(other, name) for name in TEACHERS):
        differing.append("the teacher or its cached latents")
    return differing + ([] if _pin(run, CLIPS) == _pin(other, CLIPS) else ["the clips"])


def _differing(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Fields that decide what is computed, seed and folders aside."""
    return [
        each.field
        for each in differing_fields(before, after)
        if not each.free and each.field not in PLACES and not each.field.startswith("runtime.")
    ]


def changed_on_the_way(run: RunDirectory) -> list[str]:
    """Fields that decide what is computed and that a resume has changed: its settings are not those that the
    whole run had. Lines that are damaged are passed over."""
    file = run.path / CHANGES
    if not file.is_file():
        return []
    fields = set()
    for line in file.read_text(errors="replace").splitlines():
        try:
            fields |= {str(row["field"]) for row in json.loads(line)["changed"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return sorted(name for name in fields - _free() if name not in PLACES and not name.startswith("runtime."))


def origin_of(run: RunDirectory) -> str:
    """RUN@STEP that it was branched from, whose weights it began with; empty for one that began on its own.
    Raises `RunError` for a damaged note."""
    record = _pin(run, BRANCH)
    return f"{record.get('run')}@{record.get('step')}" if record else ""


@cache
def _free() -> frozenset[str]:
    return frozenset(_free_in(TrainConfig()))


def _free_in(config: Any, prefix: str = "", is_free: bool = False) -> set[str]:
    if not dataclasses.is_dataclass(config):
        return {prefix.removesuffix(".")} if is_free else set()
    return {
        name
        for field in dataclasses.fields(config)
        for name in _free_in(
            getattr(config, field.name), f"{prefix}{field.name}.", bool(field.metadata.get("free"))
        )
    }


def _config_of(run: RunDirectory) -> TrainConfig:
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))


def _pin(run: RunDirectory, name: str) -> dict[str, Any]:
    file = run.path / name
    return read_json(file, dict) if file.is_file() else {}
