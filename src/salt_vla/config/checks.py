"""What every configuration is checked with, and the marks that a field can carry.

Knows no configuration.
"""

from __future__ import annotations

import re
import typing
from typing import Any, Literal

from salt_vla.errors import ConfigError

LARGEST = 2**63 - 1  # of any number in the settings: what an int64 holds, and no infinity
ADDED_LATER = {"added_later": True}  # A field that older files lack: its default does what was done before.
FREE = {"free": True}  # A field that a resume may change: it decides how, never what is computed.


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(least: int, config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{section}{name} must be at least {least}, not {value}")


def require_choices(config: Any, section: str) -> None:
    """Every `Literal` field holds one of its values: names typed in Python are checked as those in JSON."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            require_choice(getattr(config, name), hint, f"{section}.{name}")


def require_choice(value: Any, hint: Any, where: str) -> None:
    choices = typing.get_args(hint)
    require(value in choices, f"{where} must be one of {', '.join(choices)}, not {value!r}")


def parse_bytes(text: str) -> int:
    """ "25GB", "500 MB", "16GiB" or a number of bytes. Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match is not None:
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not 0 < size < 2**63:
        raise ConfigError(f"{text!r} is no amount of memory; write it as 25GB, 500MB or 16GiB")
    return size
