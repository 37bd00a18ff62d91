"""The chosen runs beside one another, in the very tables of `runs compare`."""

from __future__ import annotations

from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from salt_vla.errors import UserError
from salt_vla.operations.compare import COLUMNS, Comparison, compare
from salt_vla.operations.compare_tables import label, tables_of
from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.view import names_in

MOST_RUNS = 8
OFFERED = 50
NO_CHOICE = "Choose runs here, or by their boxes in the table of runs."


def layout(actions: Actions) -> list[Component]:
    columns = [{"label": label(name), "value": name} for name in COLUMNS]
    names = dcc.Dropdown([], [], multi=True, id="compare-names", placeholder="choose runs")
    column = dcc.Dropdown(columns, COLUMNS[0], clearable=False, id="compare-column")
    controls = [parts.choice("compare-names", "runs", names), parts.choice("compare-column", "by", column)]
    return [
        html.Section(
            [html.H2("Compare"), html.Div(controls, className="controls two")], className="card wide"
        ),
        html.Div(NO_CHOICE, id="compare-answer", className="card wide"),
        dcc.Store(id="compare-seen"),
    ]


def connect(app: Dash, live: Live, actions: Actions) -> None:
    @app.callback(
        Output("compare-names", "options"),
        Input("compare-names", "search_value"),
        Input("compare-names", "value"),
        Input("page-compare", "hidden"),
    )
    def offer(search: str | None, chosen: list[str], hidden: bool) -> Any:
        if hidden:
            return no_update
        wanted = (search or "").lower()
        found = sorted(live.overviews().values(), key=lambda each: -each.updated)
        names = [each.name for each in found if wanted in each.name.lower()][:OFFERED]
        return list(dict.fromkeys([*names_in(chosen), *names]))

    @app.callback(Output("compare-names", "value"), Input("chosen", "data"))
    def follow(chosen: list[str]) -> list[str]:
        return chosen[:MOST_RUNS]

    @app.callback(
        Output("compare-answer", "children"),
        Output("compare-seen", "data"),
        Input("clock", "n_intervals"),
        Input("compare-names", "value"),
        Input("compare-column", "value"),
        Input("page-compare", "hidden"),
        State("compare-seen", "data"),
    )
    def refresh(_: int, names: list[str], column: str, hidden: bool, seen: Any) -> tuple[Any, Any]:
        if hidden:
            return no_update, no_update
        names, column = names_in(names)[:MOST_RUNS], str(column)
        now = [names, column, live.stamps(names)]
        if now == seen:
            return no_update, no_update
        if not names:
            return NO_CHOICE, now
        try:
            return told(compare(names, column)), now
        except UserError as error:
            return str(error), now


def told(found: Comparison) -> list[Component]:
    """Table by table, as `runs compare` prints them."""
    inside: list[Component] = []
    for each in tables_of(found):
        names = [parts.link(name) if name in found.names else name for name in each.columns]
        rows = [[_cell(cell, found) for cell in row] for row in each.rows]
        notes = [html.P(line, className="warning") for line in each.note.splitlines()]
        inside += [html.H2(each.title), *notes, parts.plain_table(names, rows)]
    return inside


def _cell(cell: str, found: Comparison) -> str | Component:
    """Names of the runs lead to their pages."""
    return parts.link(cell) if cell in found.names else cell
