"""`salt-vla recipes …`"""

from __future__ import annotations

from salt_vla.cli.printing import print_json, print_table
from salt_vla.recipes import all_recipes


def ls(json: bool = False) -> None:
    """List the experiments that run by name.

    Example: salt-vla recipes ls --json

    Args:
        json: print JSON instead of a table.
    """
    rows = [
        {
            "name": recipe.name,
            "summary": recipe.summary,
            "encoder": recipe.config.encoder.name,
            "steps": recipe.config.steps,
            "batch_size": recipe.config.batch_size,
            "parent": recipe.parent,
            "hypothesis": recipe.hypothesis,
            "target": recipe.target,
        }
        for recipe in all_recipes().values()
    ]
    if json:
        print_json(rows)
    else:
        print_table(rows, ["name", "encoder", "steps", "batch_size", "summary"])
