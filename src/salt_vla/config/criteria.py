"""What result would count, as a condition that a program can check: `val.r2_position_mean > parent`.

Knows how such a condition is written and what it means; where figures come from is `verdicts`' business.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from salt_vla.errors import ConfigError

HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(
    r"(?P<kind>[a-z]+)\.(?P<field>\w+) (?P<sign>>=|<=|>|<) "
    rf"(?:(?P<parent>parent)(?: (?P<plus>[+-]) (?P<margin>{_NUMBER}))?"
    rf"(?P<same> at the same steps)?|(?P<number>{_NUMBER}))"
)


@dataclass(frozen=True)
class Criterion:
    """`kind.field sign reference`: the last row of that kind in `metrics.jsonl`, against a number or, with
    `of_parent`, against the parent's same figure plus `number`; with `same_steps` a parent's run of as many
    steps."""

    kind: str
    field: str
    sign: str
    number: float
    of_parent: bool
    same_steps: bool = False

    def holds(self, value: float, parent: float = 0.0) -> bool:
        """Whether `value` meets it; `parent` is read only where it is `of_parent`."""
        return HOLDS[self.sign](value, self.number + (parent if self.of_parent else 0.0))


def parse_criterion(text: str) -> Criterion:
    """`val.r2_position_mean > 0`, `val.loss < parent`, `probe.action >= parent + 0.02 at the same steps`.

    Raises `ConfigError` for anything else.
    """
    match = _FORM.fullmatch(" ".join(text.split()))
    if match is None:
        raise ConfigError(
            f"criterion {text!r} does not read as KIND.FIELD > NUMBER or KIND.FIELD > parent + NUMBER, such "
            "as 'val.r2_position_mean > parent'"
        )
    number = float(match["number"] or match["margin"] or 0.0)
    if not math.isfinite(number):
        raise ConfigError(f"criterion {text!r} has a number beyond what can be compared")
    signed = -number if match["plus"] == "-" else number
    of_parent, same_steps = bool(match["parent"]), bool(match["same"])
    return Criterion(match["kind"], match["field"], match["sign"], signed, of_parent, same_steps)
