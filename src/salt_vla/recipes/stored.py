"""A person's own recipes: a JSON file each, `recipes/NAME.json` below the root. They are data alone.

Knows how they are named, read and written, and not what is in them.
"""

from __future__ import annotations

from pathlib import Path

from salt_vla.config import Recipe, from_json, to_json
from salt_vla.errors import ConfigError
from salt_vla.rundir import require_name, root, write_text


def recipe_file(name: str) -> Path:
    return root() / "recipes" / f"{name}.json"


def stored_names() -> list[str]:
    """Names of the files, whether they can be read or not."""
    folder = root() / "recipes"
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


def read_stored(name: str) -> Recipe:
    """The recipe in the file of that name.

    Raises `ConfigError` for a file that cannot be read, is damaged or holds a recipe of another name.
    """
    file = recipe_file(name)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; remove it, or mend it") from error
    recipe = from_json(Recipe, text, str(file))
    if recipe.name != name:
        raise ConfigError(
            f"{file} holds a recipe called {recipe.name!r}; give the file that name, or the recipe this one"
        )
    return recipe


def store(recipe: Recipe, replace: bool = False) -> Path:
    """Write the recipe's file; a `ConfigError` where there is another one of that name, unless `replace`."""
    require_name(recipe.name, "recipe")
    file = recipe_file(recipe.name)
    if file.exists() and not replace and read_stored(recipe.name) != recipe:
        raise ConfigError(f"there is another recipe {recipe.name!r} in {file}; choose another name")
    write_text(file, to_json(recipe))
    return file
