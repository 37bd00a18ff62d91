"""The experiments by name. Recipes are data: they import the configuration and nothing that acts on them."""

from __future__ import annotations

import difflib

from salt_vla.config import Recipe
from salt_vla.errors import UserError
from salt_vla.recipes import demo, paper, seed
from salt_vla.recipes.stored import read_stored, stored_names


def all_recipes() -> dict[str, Recipe]:
    """Every recipe of this package under its name: the demo's first, then the earlier attempt's, then the
    papers'."""
    recipes = (*demo.RECIPES, *seed.RECIPES, *paper.RECIPES)
    return {recipe.name: recipe for recipe in recipes}


def recipe_names() -> list[str]:
    """The names of `all_recipes`, then of the files below the root that have none of these names."""
    ours = all_recipes()
    return [*ours, *(name for name in stored_names() if name not in ours)]


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`, ours before a stored one; a `UserError` with the closest names when there is
    none."""
    recipes = all_recipes()
    if name in recipes:
        return recipes[name]
    known = recipe_names()
    if name in known:
        return read_stored(name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known recipes: {', '.join(known)}"
    raise UserError(f"there is no recipe {name!r}; {hint}")
