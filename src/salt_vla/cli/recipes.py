"""`salt-vla recipes …`"""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.config import Recipe, TrainConfig, differing_fields, leaves, override, to_json
from salt_vla.errors import ConfigError
from salt_vla.recipes import all_recipes, get_recipe, recipe_names, seed
from salt_vla.recipes.stored import recipe_file


def _row(name: str) -> dict[str, Any]:
    """One damaged file must not hide the others."""
    origin = "salt-vla" if name in all_recipes() else str(recipe_file(name))
    try:
        recipe = get_recipe(name)
    except ConfigError as error:
        unknown = dict.fromkeys(("encoder", "steps", "batch_size", "parent", "hypothesis", "target"), "")
        return {"name": name, "summary": f"damaged: {error}", **unknown, "origin": origin}
    return {
        "name": name,
        "summary": recipe.summary,
        "encoder": recipe.config.encoder.name,
        "steps": recipe.config.steps,
        "batch_size": recipe.config.batch_size,
        "parent": recipe.parent,
        "hypothesis": recipe.hypothesis,
        "target": recipe.target,
        "origin": origin,
    }


def ls(json: bool = False) -> None:
    """List the experiments that run by name: this package's, and those in recipes/ below SALT_VLA_ROOT.

    Example: salt-vla recipes ls --json

    Args:
        json: print JSON instead of a table.
    """
    rows = [_row(name) for name in recipe_names()]
    if json:
        print_json(rows)
    else:
        print_table(rows, ["name", "encoder", "steps", "batch_size", "summary"])


def show(
    name: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    json: bool = False,
) -> None:
    """One experiment, whole: why it exists, how many steps that is, and every field beside its parent's.

    Example: salt-vla recipes show exp1_vicreg10

    Args:
        name: the experiment.
        overrides: fields to change, as field=value.
        json: print JSON instead of tables.
    """
    import json as text

    recipe = get_recipe(name)
    config = override(recipe.config, overrides)
    if json:
        resolved = {"config": text.loads(to_json(config)), "length": _length(recipe, config)}
        print_json(text.loads(to_json(recipe)) | resolved)
        return
    about = {key: getattr(recipe, key) for key in ("name", "summary", "parent", "hypothesis", "target")}
    about |= {"criterion": recipe.criterion, "notes": recipe.notes, "length": _length(recipe, config)}
    print_table([{"": key, "about": value} for key, value in about.items() if value], ["", "about"])
    parent = get_recipe(recipe.parent).config if recipe.parent in recipe_names() else config
    others = {each.field: each.after for each in differing_fields(config, parent)}
    column = _column(recipe.parent or "parent")
    for section, fields in _sections(config).items():
        print(f"\n{section}")
        rows = [
            {"field": field, "value": value, column: others.get(field, "")} for field, value in fields.items()
        ]
        print_table(rows, ["field", "value", *([column] if any(row[column] != "" for row in rows) else [])])


def diff(
    first: Annotated[str, tyro.conf.Positional],
    second: Annotated[str | None, tyro.conf.Positional] = None,
    json: bool = False,
) -> None:
    """The fields in which two experiments differ; of one, those in which it differs from its parent.

    Example: salt-vla recipes diff vitb_5epoch exp3_combined

    Args:
        first: an experiment.
        second: another one; default: the parent of the first, which then comes first.
        json: print JSON instead of a table.
    """
    before, after = get_recipe(first), None if second is None else get_recipe(second)
    if after is None:
        if not before.parent:
            raise ConfigError(f"recipe {first!r} has no parent; name a second recipe to compare it with")
        before, after = get_recipe(before.parent), before
    rows = [
        {"field": each.field, _column(before.name): each.before, _column(after.name): each.after}
        for each in differing_fields(before.config, after.config)
    ]
    if json:
        print_json({"recipes": [before.name, after.name], "fields": rows})
    elif rows:
        print_table(rows, list(rows[0]))
    else:
        print(f"{before.name} and {after.name} differ in nothing that is computed")


def _column(name: str) -> str:
    """A recipe's column, which no other column is called."""
    return f"recipe {name}" if name in ("field", "value") else name


def _length(recipe: Recipe, config: TrainConfig) -> str:
    """How many steps, and how that comes about."""
    if recipe.epochs and config.steps == seed.steps_for(recipe.epochs, config.batch_size):
        an_epoch = f"⌊{seed.CLIPS:,} clips ÷ {config.batch_size}⌋ = {seed.CLIPS // config.batch_size:,} steps"
        return f"{config.steps:,} steps: {recipe.epochs} epochs of {an_epoch}"
    return (
        f"{config.steps:,} steps × {config.batch_size:,} clips = {config.steps * config.batch_size:,} clips"
    )


def _sections(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Every leaf by the first part of its name; those of the run itself under `the run`."""
    found: dict[str, dict[str, Any]] = {"the run": {}}
    for field, value in leaves(config):
        section, dot, _ = field.partition(".")
        found.setdefault(section if dot else "the run", {})[field] = value
    return found
