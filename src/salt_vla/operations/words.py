"""Figures in words, short enough for a terminal: numbers, durations, and a row of metrics as a sentence.

Knows nothing of where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

SPARKS = "▁▂▃▄▅▆▇█"


def number(value: Any) -> str:
    """Four digits of a float, all of an integer; empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "9 h 5 min", "3 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def ago(seconds: float) -> str:
    return "just now" if seconds < 2 else f"{duration(seconds)} ago"


def sentence(row: Mapping[str, Any]) -> str:
    """A row of metrics: what it is of, its loss and R², and how fast the run is."""
    what = {"train": "", "val": "held out: "}.get(row["kind"], f"{row['kind']}: ")
    parts = [f"loss {number(row['loss']) or 'no number'}"] if "loss" in row else []
    if row.get("r2_position_mean") is not None:
        parts.append(f"R² over place means {row['r2_position_mean']:+.3f}")
    if row["kind"] == "probe":
        parts += [f"{name} {value:+.3f}" for name, value in row.items() if _is_read_out(name, value)]
    if row.get("clips_per_s") is not None:
        parts.append(f"{number(row['clips_per_s'])} clips/s")
    if row.get("data_wait_share") is not None:
        parts.append(f"waits for data {row['data_wait_share']:.0%}")
    if row.get("collapse"):
        parts.append("predictions have collapsed")
    return f"step {row['step']}: {what}{', '.join(parts)}"


def _is_read_out(name: str, value: Any) -> bool:
    """Whether a probe's column is what it is about, and no baseline of that."""
    return (
        name.startswith(("r2_", "accuracy_")) and not name.endswith(("_initial", "_constant")) and bool(value)
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """So many letters at most, from the lowest value to the highest; each is the mean of its share of the
    values. All the same is drawn in the middle."""
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    edges = [place * len(values) // width for place in range(width + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high <= low:
        return SPARKS[len(SPARKS) // 2] * width
    return "".join(SPARKS[min(len(SPARKS) - 1, int((v - low) / (high - low) * len(SPARKS)))] for v in means)
