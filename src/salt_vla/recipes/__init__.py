"""The experiments by name. Recipes are data: they import the configuration and nothing that acts on it."""

from __future__ import annotations

import difflib

from salt_vla.config import Recipe
from salt_vla.errors import UserError
from salt_vla.recipes import demo, paper, seed


def all_recipes() -> dict[str, Recipe]:
    """Every recipe under its name: the demo's first, then the earlier attempt's, then the papers'."""
    recipes = (*demo.RECIPES, *seed.RECIPES, *paper.RECIPES)
    return {recipe.name: recipe for recipe in recipes}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; a `UserError` with the closest names when there is none."""
    recipes = all_recipes()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known recipes: {', '.join(recipes)}"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    return recipes[name]
