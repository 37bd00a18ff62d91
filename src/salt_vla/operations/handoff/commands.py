"""Which command makes a run, or goes on with it: recipe, every field that differs, seed, data and cache.

The commands are given in the project's folder, so what lies below it is named from there.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from salt_vla.config import Recipe, TrainConfig, differing_fields
from salt_vla.errors import UserError
from salt_vla.recipes import all_recipes, get_recipe
from salt_vla.rundir import RunDirectory, read_json, root

BRANCH, CHANGES = "branch.json", "config_changes.jsonl"
APART = ("seed", "data.table", "target.source")  # Options of their own say these.


def nearest_recipe(config: TrainConfig, noted: str = "") -> Recipe:
    """The one on record where there still is one, else the one that differs in the fewest fields."""
    if noted:
        try:
            return get_recipe(noted)
        except UserError:  # A recipe of the project that has been removed.
            pass
    return min(all_recipes().values(), key=lambda each: len(differing_fields(each.config, config)))


def overrides(recipe: TrainConfig, config: TrainConfig) -> list[str]:
    """`field=value` of every field in which the run departs from the recipe, those with options apart."""
    return [
        f"{each.field}={_written(each.after)}"
        for each in differing_fields(recipe, config)
        if each.field not in APART
    ]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_as_object)


def _as_object(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(type(value))


def make_again(
    run: RunDirectory, config: TrainConfig, noted: str = "", total_steps: int = 0, name: str = ""
) -> str:
    """The command that makes the run once more, as `name`; by default as itself, which resumes it. What was
    measured at its start (device, precision, threads) is among the fields."""
    recipe = nearest_recipe(config, noted)
    words = ["salt-vla", "train", recipe.name, *overrides(recipe.config, config), "--name", name or run.name]
    words += ["--seed", str(config.seed)]
    if config.data.table not in ("", recipe.config.data.table):
        words += ["--data", near(config.data.table)]
    if config.target.source not in ("", recipe.config.target.source):
        words += ["--cache", near(config.target.source)]
    if 0 < total_steps < config.steps:
        words += ["--max-steps", str(total_steps)]
    branch = run.path / BRANCH
    if name and branch.is_file():
        origin = read_json(branch, dict)
        words += ["--branch", f"{origin.get('run')}@{origin.get('step')}"]
    return shlex.join(words)


def of_recipe(recipe: Recipe, data: str, cache: str) -> str:
    """The command that runs a recipe under its own name on the data and the cache in use."""
    words = ["salt-vla", "train", recipe.name, "--name", recipe.name]
    if data and data != recipe.config.data.table:
        words += ["--data", near(data)]
    if cache and cache != recipe.config.target.source and recipe.config.target.provider == "cache":
        words += ["--cache", near(cache)]
    return shlex.join(words)


def with_seed(command: str, run: str, seed: int) -> str:
    """The same experiment with another seed, as a run of its own."""
    words = shlex.split(command)
    words[words.index("--seed") + 1] = str(seed)
    words[words.index("--name") + 1] = f"{run}-seed{seed}"
    return shlex.join(words)


def near(path: str) -> str:
    """As it is named in the project's folder."""
    place = Path(path)
    return str(place.relative_to(root())) if path and place.is_relative_to(root()) else path


def has_changes(run: RunDirectory) -> bool:
    """Whether its settings were changed on the way: no single command makes it again then."""
    return (run.path / CHANGES).is_file()
