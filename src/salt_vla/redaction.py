"""Secrets out of words that are kept: the values of variables that are named like secrets, as they are and as
addresses and JSON write them, and what stands before the @ of an address.

Knows the environment alone; whoever writes an error's words down asks here first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TextIO, TypeVar
from urllib.parse import quote, quote_plus

T = TypeVar("T")
NAMED_SO = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # Names of variables.
SHORTEST = 8  # of a value: shorter ones are parts of other words
_LOGIN = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def without_secrets(text: str) -> str:
    """The same words, `(NAME)` in a secret's place. To be asked before they are shortened or escaped."""
    return _taken_out(text, _secrets())


def redacted(value: T) -> T:
    """The same with `without_secrets` of every text in it: in lists, tuples, objects and dataclasses."""
    return _redacted(value, _secrets())


class Redacted:
    """A stream that writes no secrets, as long as none lies across two writes; all else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> list[tuple[str, str]]:
    """(what is written, what is put there), the longest first: one may begin like another."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if NAMED_SO.search(name) and len(value) >= SHORTEST:
            forms = (value, quote(value, safe=""), quote(value), quote_plus(value), json.dumps(value)[1:-1])
            found |= dict.fromkeys((*forms, value.encode("unicode_escape").decode()), f"({name})")
    return sorted(found.items(), key=lambda each: -len(each[0]))


def _taken_out(text: str, secrets: list[tuple[str, str]]) -> str:
    for value, name in secrets:
        text = text.replace(value, name)
    return _LOGIN.sub("(login)", text) if "://" in text else text


def _redacted(value: Any, secrets: list[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        return _taken_out(value, secrets)
    if isinstance(value, Mapping):
        return {_redacted(key, secrets): _redacted(each, secrets) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_redacted(each, secrets) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        before = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        after = {name: _redacted(each, secrets) for name, each in before.items()}
        return replace(value, **after) if after != before else value
    return value
