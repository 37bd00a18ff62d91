"""Curves of several runs, one below the other over one axis: as data for the charting library.

Knows columns of metrics and numbers; nothing of pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_RUNS = 12
MOST_POINTS = 1500  # of a curve; more cannot be told apart on a screen
HEIGHT, HEAD = 250, 40  # pixels of a chart, and above the first
# Okabe and Ito's colours, which the colour-blind can tell apart, and darker ones of the same kind.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#5b4a9c", "#8c4a1f", "#4d6b1f", "#7f7f7f", "#a3123f", "#147a8c",
)  # fmt: skip
AXES = {"step": "step", "clips": "clips seen", "flops": "FLOPs"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """One run's: `columns` has, for `kind.column`, (steps, values). `per_step`: what a step is on another
    axis (`clips`, `flops`), where that is known."""

    name: str
    columns: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    per_step: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """How curves are looked at: which columns (`kind.column`), over what axis, on which scale, and how much
    of each value a smoothed one keeps from those before it (0: none, below 1)."""

    columns: Sequence[str] = ()
    axis: str = "step"
    log: bool = False
    smoothing: float = 0.0


def figure(curves: Sequence[Curves], look: Look) -> dict[str, Any]:
    """A figure with one chart a column, all over the same axis; the same look keeps its zoom."""
    traces, layout = [], _layout(look)
    for place, column in enumerate(look.columns, 1):
        for number, run in enumerate(curves[:MOST_RUNS]):
            traces += _traces(run, column, look, place, COLOURS[number % len(COLOURS)])
    return {"data": traces, "layout": layout}


def same(before: Any, drawn: Mapping[str, Any]) -> bool:
    """Whether a browser shows this already."""
    if not isinstance(before, dict) or not isinstance(before.get("layout"), dict):
        return False
    is_same_look = before["layout"].get("uirevision") == drawn["layout"]["uirevision"]
    return is_same_look and before.get("data") == drawn["data"]


def without(curves: Sequence[Curves], look: Look) -> list[str]:
    """Names of the runs that have no place on the axis."""
    return [run.name for run in curves if look.axis != "step" and look.axis not in run.per_step]


def _traces(run: Curves, column: str, look: Look, place: int, colour: str) -> list[dict[str, Any]]:
    steps, values = run.columns.get(column, ((), ()))
    scale = 1.0 if look.axis == "step" else run.per_step.get(look.axis)
    if not len(values) or scale is None:
        return []
    x, y = np.asarray(steps, float) * scale, np.asarray(values, float)
    about = {
        "type": "scatter", "name": run.name, "legendgroup": run.name, "xaxis": "x",
        "yaxis": f"y{place}" if place > 1 else "y",
        "mode": "lines" if len(y) > 1 else "markers",
    }  # fmt: skip
    line = {"color": colour, "width": 1.8}
    main = about | {"showlegend": place == 1, "line": line, "marker": {"color": colour}}
    main |= {"hovertemplate": "%{y:.5g}<extra>%{fullData.name}</extra>"}
    if not look.smoothing:
        return [main | _points(*thinned(x, y))]
    raw = about | {"showlegend": False, "hoverinfo": "skip", "opacity": 0.25, "line": line | {"width": 1}}
    return [raw | _points(*thinned(x, y)), main | _points(*thinned(x, smoothed(y, look.smoothing)))]


def _points(x: Floats, y: Floats) -> dict[str, Any]:
    return {"x": x.tolist(), "y": y.tolist()}


def smoothed(values: Floats, weight: float) -> Floats:
    """Exponential mean of the values so far, each older one counting `weight` times as much; divided by the
    weights' sum, so that it does not begin at zero (as Adam corrects its moments: Kingma and Ba, 2015)."""
    out = np.empty_like(values)
    total = norm = 0.0
    for place, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out[place] = total / norm
    return out


def thinned(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` points: of every stretch its lowest and its highest, so that no spike is lost, and the
    last one of all."""
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), max(1, (most - 1) // 2) + 1).astype(int)
    kept = {len(y) - 1}
    for begin, end in pairwise(edges):
        kept |= {begin + int(y[begin:end].argmin()), begin + int(y[begin:end].argmax())}
    places = np.array(sorted(kept))
    return x[places], y[places]


def _layout(look: Look) -> dict[str, Any]:
    count = max(1, len(look.columns))
    gap = 0.16 / count
    each = (1 - gap * (count - 1)) / count
    below = {"title": {"text": AXES[look.axis]}, "visible": bool(look.columns)}
    below["anchor"] = f"y{count}" if count > 1 else "y"
    layout: dict[str, Any] = {
        "uirevision": f"{look.axis} {look.log} {','.join(look.columns)}",
        "height": HEAD + HEIGHT * count,
        "margin": {"l": 56, "r": 12, "t": 28, "b": 40},
        "hovermode": "x",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#6b7077"},
        "xaxis": _axis(below),
        "annotations": [],
    }  # fmt: skip
    if not look.columns:
        layout["yaxis"] = {"visible": False}
    for place, column in enumerate(look.columns, 1):
        top = 1 - (place - 1) * (each + gap)
        domain = [max(0.0, top - each) if place < count else 0.0, top]
        name = f"yaxis{place}" if place > 1 else "yaxis"
        layout[name] = _axis({"domain": domain, "anchor": "x", "type": "log" if look.log else "linear"})
        layout[name] |= {"title": {"text": column.replace(".", ": ", 1), "standoff": 6}}
    return layout


def _axis(about: dict[str, Any]) -> dict[str, Any]:
    quiet = {"gridcolor": "rgba(128,132,140,0.22)", "zerolinecolor": "rgba(128,132,140,0.45)"}
    return {"automargin": True, "showline": False} | quiet | about
