"""What the pages are made of: tables, buttons, words for numbers. Everything shown is text, never markup."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import dash_ag_grid
from dash import dcc, html
from dash.development.base_component import Component

from salt_vla.rundir import is_time

# What a number looks like in a table: d3's formats, in the browser.
ROUNDED = {"function": "params.value == null ? '' : d3.format('.4~g')(params.value)"}
PER_CENT = {"function": "params.value == null ? '' : d3.format('.0%')(params.value)"}
DURATION = {
    "function": "params.value == null ? '' : params.value < 60 ? d3.format('.0f')(params.value) + ' s' : "
    "params.value < 5400 ? d3.format('.0f')(params.value / 60) + ' min' : "
    "d3.format('.1f')(params.value / 3600) + ' h'"
}
WHEN = {"function": "params.value ? d3.timeFormat('%d %b %H:%M:%S')(params.value * 1000) : ''"}
STATES = (
    "running",
    "finished",
    "failed",
    "killed",
    "stopped",
    "queued",
    "damaged",
    "waiting",
    "done",
    "cancelled",
)
STATE_CLASSES = {f"state state-{state}": f"params.value == '{state}'" for state in STATES}


def column(field: str, title: str, width: int, **more: Any) -> dict[str, Any]:
    """Of a table; `more` in AG Grid's words."""
    return {"field": field, "headerName": title, "width": width, "headerTooltip": title, **more}


def number(field: str, title: str, width: int = 100, shown: Mapping[str, str] = ROUNDED) -> dict[str, Any]:
    return column(
        field, title, width, valueFormatter=dict(shown), type="rightAligned", filter="agNumberColumnFilter",
        suppressHeaderFilterButton=True,
    )  # fmt: skip


def words(field: str, title: str, width: int = 140, **more: Any) -> dict[str, Any]:
    return column(field, title, width, tooltipField=field, filter="agTextColumnFilter", **more)


def state(field: str = "state", title: str = "state") -> dict[str, Any]:
    return words(field, title, 105, cellClassRules=STATE_CLASSES)


def table(name: str, columns: Sequence[Mapping[str, Any]], key: str, **options: Any) -> Component:
    """A table that keeps selection, sorting, filters and scroll while its rows change; `key` names the field
    that tells its rows apart."""
    grid = {
        "rowHeight": 32, "headerHeight": 34, "animateRows": False, "suppressCellFocus": False,
        "enableCellTextSelection": True, "ensureDomOrder": True, "tooltipShowDelay": 400,
        "selectionColumnDef": {"width": 44, "pinned": "left", "sortable": False, "resizable": False},
    }  # fmt: skip
    return dash_ag_grid.AgGrid(
        id=name,
        columnDefs=[dict(each) for each in columns],
        rowData=[],
        getRowId=f"params.data.{key}",
        defaultColDef={"sortable": True, "resizable": True, "filter": True, "suppressMovable": True},
        dashGridOptions=grid | options.pop("grid", {}),
        className="ag-theme-quartz table",
        dangerously_allow_code=False,
        **options,
    )


def card(title: str, *inside: Any, name: str = "", wide: bool = False) -> Component:
    about = {"id": name} if name else {}
    return html.Section([html.H2(title), *inside], className="card wide" if wide else "card", **about)


def facts(pairs: Sequence[tuple[str, Any]]) -> Component:
    """Names with their values; what is empty is left out."""
    shown = [(name, value) for name, value in pairs if value not in ("", None, (), [])]
    return html.Dl([part for name, value in shown for part in (html.Dt(name), html.Dd(value))])


def plain_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Component:
    """For a few rows that nobody sorts."""
    body = [html.Tr([html.Td(cell) for cell in row]) for row in rows]
    whole = html.Table([html.Thead(html.Tr([html.Th(each) for each in head])), html.Tbody(body)])
    return html.Div(whole, className="scroll")


def badge(word: str) -> Component:
    kind = word if word in STATES else "other"
    return html.Span(word, className=f"badge state-{kind}")


def choice(name: str, title: str, control: Component) -> Component:
    """A control with its label."""
    return html.Div([html.Label(title, htmlFor=name), control], className="choice")


def button(name: str, title: str, **more: Any) -> Component:
    return html.Button(title, id=name, n_clicks=0, className="button", **more)


def link(name: str) -> Component:
    return dcc.Link(name, href=f"/run/{name}")


def shown(value: Any) -> str:
    """A figure or a setting in a few letters."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def when(seconds: Any) -> str:
    """A time of this machine's clock; empty for what is none, whatever a file held."""
    is_one = is_time(seconds) and seconds
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if is_one else ""
