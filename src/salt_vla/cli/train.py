"""`salt-vla train`"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from salt_vla.config import TrainConfig, from_json, to_json
from salt_vla.errors import ConfigError
from salt_vla.recipes import get_recipe


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    name: str | None = None,
    seed: int | None = None,
    max_steps: int | None = None,
    data: str | None = None,
    cache: str | None = None,
) -> None:
    """Run a recipe; the same command with the same --name resumes it.

    Any field of the recipe can be set as field=value, for example optimizer.lr=3e-4.

    Example: salt-vla train demo_student optimizer.lr=5e-4 --name slower --seed 1

    Args:
        recipe: the experiment (`salt-vla recipes ls`).
        overrides: fields to change, as field=value.
        name: the run's name; default: the recipe's.
        seed: of weights, order, masks and views; default: the recipe's.
        max_steps: stop after this many steps, without changing the schedules.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        cache: the folder of the teacher's cached latents.
    """
    config = override(get_recipe(recipe).config, overrides)
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {max_steps}")
    from salt_vla.jobs import train as job

    run = recipe if name is None else name
    status = job.train(job.with_paths(config, data, cache), run, max_steps)
    print(f"{run}: {status.state} at step {status.step}")


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The configuration with `field=value` assignments applied; a wrong name or type is a `ConfigError`.

    Values are JSON (`3e-4`, `true`, `[0.9,0.95]`); text needs no quotes, and a list no brackets.
    """
    fields = json.loads(to_json(config))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form field=value")
        *sections, name = path.split(".")
        section: Any = fields
        for key in sections:
            section = _entry(section, key, path)
        _entry(section, name, path)
        section[_key(section, name)] = _value(text, section[_key(section, name)])
    return from_json(TrainConfig, json.dumps(fields), "config") if assignments else config


def _entry(section: Any, key: str, path: str) -> Any:
    """What lies under `key` of an object, or at place `key` of a list of objects."""
    known = list(section) if isinstance(section, dict) else []
    if isinstance(section, list):
        known = [str(place) for place in range(len(section))]
    if key not in known:
        there = f"known here: {', '.join(known)}" if known else "its parent is a single value"
        raise ConfigError(f"there is no field {path!r} to override; {there}")
    return section[_key(section, key)]


def _key(section: Any, key: str) -> Any:
    return key if isinstance(section, dict) else int(key)


def _value(text: str, current: Any) -> Any:
    """`text` as JSON, or as it stands where it is none or the field holds text."""
    if isinstance(current, str):
        return text
    if isinstance(current, list) and not text.startswith("["):
        return [_value(part, None) for part in text.split(",")]
    try:
        return json.loads(text.lower() if text in ("True", "False") else text, parse_constant=str)
    except ValueError:
        return text
