"""What a sweep is asked to try: `field=value,value` over a recipe, read into axes and fixed fields.

Knows no run and no order of trying; every value stays the text that the command line's overrides take.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from salt_vla.config import TrainConfig, override, read_value, value_of
from salt_vla.errors import ConfigError
from salt_vla.rundir import LONGEST_NAME

Method = Literal["grid", "random", "optuna"]
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(?P<log>log:)?(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})")
_METRIC = re.compile(r"[a-z]+\.\w+")
LOWER_IS_BETTER = ("loss",)
LONGEST_SWEEP_NAME = LONGEST_NAME - 17  # Room for a hash of what differs.
SEEDS = 2**32  # what Optuna's sampler takes


@dataclass(frozen=True)
class SweepSpec:
    """A sweep, whole: the same one always tries the same points (with `optuna`: after the same results).

    `assignments` are read by `axes`; `trials` 0: every point of the grid; `max_steps` 0: each run whole;
    `seed` draws the points, and is not the runs' own.
    """

    name: str
    recipe: str
    assignments: tuple[str, ...]
    method: Method = "grid"
    trials: int = 0
    seed: int = 0
    metric: str = "val.r2_position_mean"
    max_steps: int = 0
    data: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        if not _METRIC.fullmatch(self.metric):
            raise ConfigError(
                f"--metric {self.metric!r} is not of the form KIND.FIELD, as val.r2_position_mean"
            )
        if self.method != "grid" and self.trials < 1:
            raise ConfigError(f"--{self.method} must be at least 1 point, not {self.trials}")
        if self.max_steps < 0:
            raise ConfigError(f"--max-steps must be at least 1, not {self.max_steps}")
        if self.method == "optuna" and not 0 <= self.seed < SEEDS:
            raise ConfigError(f"--seed must lie in 0 to {SEEDS - 1:,} with --optuna, not {self.seed}")
        if len(self.name) > LONGEST_SWEEP_NAME:
            raise ConfigError(
                f"sweep name {self.name[:20]!r}… has {len(self.name)} characters; give a --name of at most "
                f"{LONGEST_SWEEP_NAME}, since its runs are named after it"
            )

    @property
    def metric_kind(self) -> str:
        return self.metric.partition(".")[0]

    @property
    def metric_field(self) -> str:
        return self.metric.partition(".")[2]

    @property
    def lower_is_better(self) -> bool:
        return self.metric_field.endswith(LOWER_IS_BETTER)


@dataclass(frozen=True)
class Axis:
    """A field and what is tried in it: `values`, or any number of a range (`low` to `high`)."""

    field: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @cached_property
    def labels(self) -> dict[str, str]:
        """Value → how it reads in a run's name; where two would read alike they are numbered."""
        plain = {value: _plain(value) for value in self.values}
        often = Counter(plain.values())
        numbered = ((value, text, place) for place, (value, text) in enumerate(plain.items()))
        return {value: text if often[text] == 1 else f"{text}_{place}" for value, text, place in numbered}

    def label(self, value: str) -> str:
        return self.labels[value] if value in self.labels else _plain(value)


def read_assignments(spec: SweepSpec, config: TrainConfig) -> tuple[list[Axis], tuple[str, ...]]:
    """The axes of a sweep, and the assignments that hold for all of its runs (those of one value).

    Raises `ConfigError` for a field that does not exist, a value that it cannot hold, a range in a grid, and
    when nothing varies.
    """
    axes: list[Axis] = []
    fixed: list[str] = []
    for assignment in spec.assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is not of the form field=value,value")
        axis = _axis(field, text, value_of(config, field, fixed), config)
        if len(axis.values) == 1:
            fixed.append(f"{field}={axis.values[0]}")
        else:
            axes.append(axis)
    if not axes:
        raise ConfigError("nothing varies: give at least one field several values, as optimizer.lr=1e-4,3e-4")
    twice = [field for field, count in Counter(axis.field for axis in axes).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice; name all its values at once, separated by commas")
    if spec.method == "grid" and any(not axis.values for axis in axes):
        field = next(axis.field for axis in axes if not axis.values)
        raise ConfigError(
            f"{field} is a range, and a grid needs values; list some, or give --random or --optuna"
        )
    override(config, fixed)
    return axes, tuple(fixed)


def _axis(field: str, text: str, current: Any, config: TrainConfig) -> Axis:
    """`current`: what the field holds, which says how values are read."""
    match = _RANGE.fullmatch(text) if type(current) in (int, float) else None
    if match is None:
        values = tuple(split_values(text))
        read = [read_value(value, current) for value in values]
        for place, value in enumerate(read):
            if any(value == other and (value is True) == (other is True) for other in read[:place]):
                raise ConfigError(f"{field} has a value twice, {values[place]!r}; leave one out")
        return Axis(field, values)
    low, high, log = float(match["low"]), float(match["high"]), bool(match["log"])
    if not low < high or (log and low <= 0):
        raise ConfigError(
            f"{field}={text} is no range: it goes from a lower to a higher number, both above 0 after log:"
        )
    for end in ("low", "high"):
        override(config, [f"{field}={match[end]}"])
    return Axis(field, (), low, high, log, type(current) is int)


def split_values(text: str) -> list[str]:
    """The values that commas separate; a comma within [], {} or "" is part of a value, and quotes around a
    whole value fall away.

    >>> split_values('[0.9,0.95],[0.9,0.99]')
    ['[0.9,0.95]', '[0.9,0.99]']
    """
    values, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += (not quoted) * ((letter in "[{") - (letter in "]}"))
        if letter == "," and depth == 0 and not quoted:
            values.append("")
        else:
            values[-1] += letter
    if depth or quoted:
        raise ConfigError(f"in {text!r} a bracket or a quote is not closed")
    return [value[1:-1] if re.fullmatch(r'"[^"]*"', value) else value for value in values]


def keys_of(axes: list[Axis]) -> dict[str, str]:
    """Field → its shortest ending that no other axis has: `optimizer.lr` is `lr`."""
    keys = {}
    for axis in axes:
        parts = axis.field.split(".")
        for length in range(1, len(parts) + 1):
            key = ".".join(parts[-length:])
            taken = any(f".{other.field}".endswith(f".{key}") for other in axes if other is not axis)
            if not taken and not key.isdigit():
                break
        keys[axis.field] = key
    return keys


def _plain(value: str) -> str:
    """What of a value may stand in a run's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value).strip("_") or "none"
