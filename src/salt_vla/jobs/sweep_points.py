"""Which point of a sweep is tried next: of a grid, at random, or where Optuna expects most.

A proposal is a function of (sweep, number of the point, results so far): no state beside the list of points.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from salt_vla.errors import ConfigError, RunError
from salt_vla.jobs.sweep_spec import SEEDS, Axis, SweepSpec, keys_of
from salt_vla.rundir import LONGEST_NAME

if TYPE_CHECKING:
    import optuna

DRAWS = 1000  # at random for a point that is not there yet


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the values of its axes in their order, and the run's name."""

    values: tuple[str, ...]
    run: str

    def assignments(self, axes: Sequence[Axis]) -> tuple[str, ...]:
        return tuple(f"{axis.field}={value}" for axis, value in zip(axes, self.values, strict=True))


def require_of(points: Sequence[Point], axes: Sequence[Axis], where: Path) -> None:
    """Raises `RunError` for points on record that are not of these axes."""
    for point in points:
        pairs = list(zip(axes, point.values, strict=False))
        fits = all(text in axis.values if axis.values else _is_number(text) for axis, text in pairs)
        if len(point.values) != len(axes) or not fits:
            raise RunError(
                f"{where} is damaged: {point.run} has values {list(point.values)}, which this sweep does not "
                "try; remove that point and run the same command again"
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def num_points(spec: SweepSpec, axes: Sequence[Axis]) -> int:
    """Of all axes of a grid, or as many as are asked for."""
    return math.prod(len(axis.values) for axis in axes) if spec.method == "grid" else spec.trials


def propose(
    spec: SweepSpec, axes: list[Axis], points: Sequence[Point], results: Sequence[float | None]
) -> Point | None:
    """The point after `points`, whose results (None: it failed) lie beside them; None when all are there."""
    number = len(points)
    if number >= num_points(spec, axes):
        return None
    if spec.method == "grid":
        values = next(itertools.islice(itertools.product(*(axis.values for axis in axes)), number, None))
    elif spec.method == "random":
        there = {point.values for point in points}
        drawn = (_draw(spec, axes, number, attempt) for attempt in range(DRAWS))
        found = next((values for values in drawn if values not in there), None)
        if found is None:
            return None  # Every point of the axes has been tried.
        values = found
    else:
        values = _ask_optuna(spec, axes, points, results)
    return Point(values, _name(spec, axes, values))


def _name(spec: SweepSpec, axes: list[Axis], values: Sequence[str]) -> str:
    """The sweep's name and what differs; a hash of that where it would be too long for a folder."""
    keys = keys_of(axes)
    pairs = zip(axes, values, strict=True)
    label = "-".join(f"{keys[axis.field]}{axis.label(value)}" for axis, value in pairs)
    if len(spec.name) + 1 + len(label) > LONGEST_NAME:
        label = xxhash.xxh3_64_hexdigest(label.encode())
    return f"{spec.name}-{label}"


def _draw(spec: SweepSpec, axes: Sequence[Axis], number: int, attempt: int) -> tuple[str, ...]:
    source = random.Random(f"{spec.seed}/{number}/{attempt}")
    return tuple(_draw_value(axis, source) for axis in axes)


def _draw_value(axis: Axis, source: random.Random) -> str:
    if axis.values:
        return source.choice(axis.values)
    if axis.log:
        return _number(axis, math.exp(source.uniform(math.log(axis.low), math.log(axis.high))))
    if axis.whole:
        return str(source.randint(int(axis.low), int(axis.high)))
    return _number(axis, source.uniform(axis.low, axis.high))


def _number(axis: Axis, value: float) -> str:
    """As text, within the range in spite of rounding: four digits, so that a run's name says the very value,
    or as many more as a narrow range needs for hundreds of different ones."""
    value = min(max(value, axis.low), axis.high)
    if axis.whole:
        return str(round(value))
    span = max(abs(axis.low), abs(axis.high)) / (axis.high - axis.low)
    texts = (f"{value:.{digits}g}" for digits in range(max(4, int(math.log10(span)) + 3), 17))
    return next((text for text in texts if axis.low <= float(text) <= axis.high), repr(value))


def _ask_optuna(
    spec: SweepSpec, axes: Sequence[Axis], points: Sequence[Point], results: Sequence[float | None]
) -> tuple[str, ...]:
    """What its sampler (TPE) proposes to a study that is told all results anew, its draws seeded by the
    number of the point: killed at any moment, the sweep goes on as if it had not been."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--optuna needs the extra `sweep`: pip install 'salt-vla[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {axis.field: _distribution(axis) for axis in axes}
    sampler = optuna.samplers.TPESampler(seed=(spec.seed + len(points)) % SEEDS)
    study = optuna.create_study(sampler=sampler, direction="minimize" if spec.lower_is_better else "maximize")
    for point, result in zip(points, results, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params={
                    axis.field: _parameter(axis, text) for axis, text in zip(axes, point.values, strict=True)
                },
                distributions=space,
                value=result,
                state=optuna.trial.TrialState.FAIL if result is None else optuna.trial.TrialState.COMPLETE,
            )
        )
    asked = study.ask(space).params
    return tuple(asked[axis.field] if axis.values else _number(axis, asked[axis.field]) for axis in axes)


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values:
        return CategoricalDistribution(axis.values)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _parameter(axis: Axis, text: str) -> Any:
    if axis.values:
        return text
    number = min(max(float(text), axis.low), axis.high)
    return int(number) if axis.whole else number
