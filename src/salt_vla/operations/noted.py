"""What a run's `cost.json`, `masks.json` and `probes.json` hold, each value of the kind that it is read as.

Knows the shape of those files, not what they are asked for; what is of another kind is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from salt_vla.operations.curves import is_number
from salt_vla.rundir import RunDirectory, is_count, read_json

COST, MASKS, PROBES = "cost.json", "masks.json", "probes.json"
TEXTS = ("encoder", "suite", "target", "metric", "against", "note", "clip_table")  # of a row of probes
FIGURES = ("value", "difference", "low", "high", "seed", "clips", "episodes", "alpha")
COUNTS = ("clips_a_step", "clips_an_epoch", "tokens_a_clip")
MOST_FLOPS = 1e30  # of a step: no machine will ever take it

Noted = dict[str, Any]


def noted(run: RunDirectory, name: str) -> Noted:
    """What one of the run's files holds; empty where it has none. Raises `RunError` for one that is no JSON
    object, and `OSError` where it cannot be read."""
    file = run.path / name
    held = read_json(file, dict) if file.is_file() else {}
    return _CHECKED[name](held) if held and name in _CHECKED else held


def _cost(held: Noted) -> Noted:
    kept: Noted = {name: _counts(each) if name == "parameters" else each for name, each in held.items()}
    wrong = [name for name in COUNTS if name in kept and not (is_count(kept[name]) and kept[name])]
    flops = kept.get("flops_a_step")
    wrong += ["flops_a_step"] * (not (is_number(flops) and flops is not None and 0 < flops < MOST_FLOPS))
    return {name: value for name, value in kept.items() if name not in wrong}


def _counts(value: Any) -> dict[str, int]:
    return {name: each for name, each in value.items() if is_count(each)} if isinstance(value, dict) else {}


def _masks(held: Noted) -> Noted:
    summary = held.get("summary")
    lines = summary if isinstance(summary, list) else []
    return held | {"summary": [line for line in lines if isinstance(line, str)]}


def _probes(held: Noted) -> Noted:
    return held | {"suites": [_suite(each) for each in _objects(held.get("suites")) if _is_row(each)]}


def _suite(held: Noted) -> Noted:
    parts = {
        part: [row for row in _objects(held.get(part)) if _is_row(row)] for part in ("rows", "comparisons")
    }
    step = held.get("step")
    return held | parts | {"step": step if is_count(step) else None}


def _objects(value: Any) -> list[Noted]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_row(row: Mapping[str, Any]) -> bool:
    return all(type(row[name]) is str for name in TEXTS if name in row) and all(
        row[name] is None or is_number(row[name]) for name in FIGURES if name in row
    )


_CHECKED: dict[str, Callable[[Noted], Noted]] = {COST: _cost, MASKS: _masks, PROBES: _probes}
