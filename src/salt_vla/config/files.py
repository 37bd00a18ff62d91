"""Configurations as JSON, there and back; unknown, missing and mistyped fields are named."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import xxhash

from salt_vla.config.checks import LARGEST, require, require_choice
from salt_vla.errors import ConfigError

T = TypeVar("T")


def to_json(config: Any) -> str:
    """The dataclass as indented JSON with sorted keys; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(kind: type[T], text: str | bytes, where: str = "config.json") -> T:
    """Build `kind` from JSON text; unknown, missing or mistyped fields are named in a `ConfigError`.

    A field that was added after the file was written takes its default (docs/decisions/0009).
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON (line {error.lineno}): {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    return typing.cast(T, _build(kind, value, where))


def _build(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    if origin is tuple:
        require(isinstance(value, list), f"{where} must be a list, not {value!r}")
        inner = typing.get_args(kind)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        require(len(kinds) == len(value), f"{where} must have {len(kinds)} entries, not {len(value)}")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        require_choice(value, kind, where)
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(typing.get_args(kind)[0], value, where)
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    require(type(value) is kind, f"{where} must be {kind.__name__}, not {value!r}")
    if kind in (int, float):
        require(abs(value) <= LARGEST, f"{where} is {value}, beyond what can be computed with")
    return value


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    require(isinstance(value, dict), f"{where} must be an object, not {value!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    require(not unknown, f"{where} has unknown field(s) {', '.join(unknown)}; known: {', '.join(hints)}")
    later = {f.name for f in dataclasses.fields(kind) if f.metadata.get("added_later")}
    missing = sorted(set(hints) - set(value) - later)
    require(not missing, f"{where} lacks field(s) {', '.join(missing)}")
    return kind(
        **{name: _build(hints[name], value[name], f"{where}.{name}") for name in hints if name in value}
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field in which two configurations differ; `free`: a resume may change it."""

    field: str
    before: Any
    after: Any
    free: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r}, not {self.after!r}"


def differing_fields(before: Any, after: Any, prefix: str = "", free: bool = False) -> list[Difference]:
    """Every leaf in which two configurations of one kind differ."""
    if dataclasses.is_dataclass(before):
        return [
            row
            for f in dataclasses.fields(before)
            for row in differing_fields(
                getattr(before, f.name),
                getattr(after, f.name),
                f"{prefix}{f.name}.",
                bool(f.metadata.get("free")),
            )
        ]
    return [] if before == after else [Difference(prefix.rstrip("."), before, after, free)]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field's dotted name and value, in the order in which they are declared."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def config_hash(config: Any) -> str:
    """Of the fields that decide what is computed: all but those that a resume may change."""
    return xxhash.xxh3_64_hexdigest(json.dumps(_decisive(config), sort_keys=True).encode())


def _decisive(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _decisive(getattr(value, f.name)) for f in fields if not f.metadata.get("free")}
    return [_decisive(each) for each in value] if isinstance(value, tuple) else value
