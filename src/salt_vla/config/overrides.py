"""`field=value` assignments on a configuration, as a command line and a sweep give them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from salt_vla.config.files import from_json, to_json
from salt_vla.config.training import TrainConfig
from salt_vla.errors import ConfigError


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The configuration with `field=value` assignments applied; a wrong name or type is a `ConfigError`.

    Values are JSON (`3e-4`, `true`, `[0.9,0.95]`); text needs no quotes, and a list no brackets.
    """
    if not assignments:
        return config
    return from_json(TrainConfig, json.dumps(_assigned(config, assignments)), "config")


def value_of(config: TrainConfig, path: str, assignments: Sequence[str] = ()) -> Any:
    """What a field, or a place of a list, holds once the assignments are made, as JSON has it. Whether they
    fit each other is not asked. Raises `ConfigError` for a name that is none."""
    value: Any = _assigned(config, assignments)
    for key in path.split("."):
        value = _entry(value, key, path)
    return value


def _assigned(config: TrainConfig, assignments: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(to_json(config))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form field=value")
        *sections, name = path.split(".")
        section: Any = fields
        for key in sections:
            section = _entry(section, key, path)
        _entry(section, name, path)
        section[_key(section, name)] = read_value(text, section[_key(section, name)])
    return fields


def _entry(section: Any, key: str, path: str) -> Any:
    """What lies under `key` of an object, or at place `key` of a list of objects."""
    known = list(section) if isinstance(section, dict) else []
    if isinstance(section, list):
        known = [str(place) for place in range(len(section))]
    if key not in known:
        raise ConfigError(f"there is no field {path!r} to override; {_near(key, known)}")
    return section[_key(section, key)]


def _key(section: Any, key: str) -> Any:
    return key if isinstance(section, dict) else int(key)


def read_value(text: str, current: Any) -> Any:
    """`text` as JSON, or as it stands where it is none or the field holds text."""
    if isinstance(current, str):
        return text
    if isinstance(current, list) and not text.startswith("["):
        return [read_value(part, None) for part in text.split(",")]
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text, parse_constant=str)
        json.dumps(value)  # What can be read may still be too deep to be written.
    except (ValueError, RecursionError):
        return text
    return value


def _near(key: str, known: Sequence[str]) -> str:
    """What may have been meant."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known here: {', '.join(known)}" if known else "its parent is a single value"
