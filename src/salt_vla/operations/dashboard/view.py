"""The controls that say how curves are looked at; every page with curves has a set, named after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import Input, dcc, html
from dash.development.base_component import Component

from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.charts import AXES, Look, figure
from salt_vla.operations.dashboard.curves import FIRST_COLUMNS

MOST_COLUMNS = 6
MOST_SMOOTHING = 0.99
CONTROLS = {
    "columns": "columns",
    "axis": "over",
    "log": "scale",
    "smoothing": "smoothing",
}  # and their titles


def look_controls(page: str) -> Component:
    first = list(FIRST_COLUMNS)
    named = [{"label": column.replace(".", ": ", 1), "value": column} for column in first]
    axes = [{"label": title, "value": axis} for axis, title in AXES.items()]
    log = [{"label": "logarithmic", "value": "log"}]
    names = [f"{page}-look-{name}" for name in CONTROLS]
    made = (
        dcc.Dropdown(named, first, multi=True, clearable=False, id=names[0]),
        dcc.RadioItems(axes, "step", inline=True, id=names[1]),
        dcc.Checklist(log, [], id=names[2]),
        dcc.Slider(0, MOST_SMOOTHING, step=0.01, value=0.0, marks=None, id=names[3]),
    )
    return html.Div(
        [parts.choice(*each) for each in zip(names, CONTROLS.values(), made, strict=True)],
        className="controls",
    )


def graph(name: str) -> Component:
    """Empty so far."""
    config = {"displaylogo": False, "responsive": True}
    return dcc.Graph(id=name, figure=figure([], Look()), config=config, className="graph")


def look_inputs(page: str) -> list[Input]:
    return [Input(f"{page}-look-{name}", "value") for name in CONTROLS]


def names_in(chosen: Any) -> list[str]:
    """Names of runs, whatever a browser sent in their place; whether there are such runs is not looked at."""
    return [name for name in chosen if isinstance(name, str)] if isinstance(chosen, list) else []


def look_from(wanted: Sequence[Any]) -> Look:
    """What the controls say, whatever a browser sent in their place."""
    columns, axis, log, smoothing = wanted
    named = [each for each in columns or () if isinstance(each, str) and each.count(".") == 1]
    is_share = type(smoothing) in (int, float) and 0 <= smoothing <= MOST_SMOOTHING
    return Look(
        tuple(dict.fromkeys(named))[:MOST_COLUMNS] or FIRST_COLUMNS,
        axis if isinstance(axis, str) and axis in AXES else "step",
        bool(log),
        float(smoothing) if is_share else 0.0,
    )
