"""All runs in one table, and the curves of the chosen ones over one another."""

from __future__ import annotations

from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.charts import MOST_RUNS, figure, same, without
from salt_vla.operations.dashboard.curves import columns_of, curves_of
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.parts import number, words
from salt_vla.operations.dashboard.view import graph, look_controls, look_from, look_inputs, names_in

COLUMNS = (
    words("name", "run", 190, pinned="left", cellClass="link"),
    parts.state(),
    number("share", "done", 80, parts.PER_CENT),
    parts.column("steps", "steps", 130, type="rightAligned", filter=False, sortable=False),
    number("eta", "time left", 95, parts.DURATION),
    number("loss", "loss"),
    number("val_loss", "loss held out", 120),
    number("r2", "R² over places", 125),
    number("clips_per_s", "clips/s", 90),
    words("recipe", "recipe", 130),
    words("verdict", "verdict", 105),
    words("reason", "exit reason", 300),
    words("warnings", "warnings", 220),
    number("updated", "last sign of life", 150, parts.WHEN) | {"sort": "desc"},
)
NONE_CHOSEN = "Choose runs in the table to see their curves over one another."


def layout(actions: Actions) -> list[Component]:
    search = dcc.Input(
        id="runs-search", type="search", placeholder="filter: name, state, recipe …", debounce=False
    )
    grid = parts.table(
        "runs-table", COLUMNS, "name",
        grid={"rowSelection": {"mode": "multiRow", "headerCheckbox": False, "enableClickSelection": False}},
    )  # fmt: skip
    return [
        html.Section(
            [
                html.Div(
                    [html.H2("Runs"), search, html.Span(id="runs-count", className="quiet")], className="head"
                ),
                html.Div(grid, className="tall"),
                html.P("A click on a name opens the run.", className="quiet"),
            ],
            className="card wide",
        ),
        parts.card(
            "Curves",
            look_controls("runs"),
            html.P(NONE_CHOSEN, id="runs-note", className="quiet"),
            graph("runs-graph"),
            wide=True,
        ),
        dcc.Store(id="runs-mark"),
    ]


def connect(app: Dash, live: Live, actions: Actions) -> None:
    _connect_table(app, live)
    _connect_curves(app, live)

    @app.callback(
        Output("address", "pathname", allow_duplicate=True),
        Input("runs-table", "cellClicked"),
        prevent_initial_call=True,
    )
    def open_run(cell: dict[str, Any] | None) -> Any:
        return f"/run/{cell['value']}" if cell and cell.get("colId") == "name" else no_update

    @app.callback(
        Output("runs-table", "dashGridOptions"),
        Input("runs-search", "value"),
        State("runs-table", "dashGridOptions"),
    )
    def search(text: str | None, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"quickFilterText": text or ""}


def _connect_table(app: Dash, live: Live) -> None:
    @app.callback(
        Output("runs-table", "rowData"),
        Output("runs-table", "rowTransaction"),
        Output("runs-table", "selectedRows"),
        Output("runs-mark", "data"),
        Output("runs-count", "children"),
        Input("clock", "n_intervals"),
        Input("page-runs", "hidden"),
        State("runs-mark", "data"),
    )
    def refresh(_: int, hidden: bool, mark: list[Any] | None) -> tuple[Any, ...]:
        if hidden:
            return (no_update,) * 5
        changes = live.changes(mark)
        if changes.all_rows is None:
            update = {"update": changes.updates, "async": False} if changes.updates else no_update
            return no_update, update, no_update, changes.mark, no_update
        chosen = no_update if mark else {"ids": _newest(changes.all_rows)}
        return changes.all_rows, no_update, chosen, changes.mark, _counted(changes.all_rows)


def _newest(rows: list[dict[str, Any]]) -> list[str]:
    """What is worth a look at first: what runs, or else what ran last."""
    running = [row for row in rows if row["state"] == "running"] or rows
    return [row["name"] for row in sorted(running, key=lambda row: -(row["updated"] or 0))[:2]]


def _counted(rows: list[dict[str, Any]]) -> str:
    return "1 run" if len(rows) == 1 else f"{len(rows):,} runs"


def _connect_curves(app: Dash, live: Live) -> None:
    @app.callback(
        Output("chosen", "data"),
        Input("runs-table", "selectedRows"),
        State("chosen", "data"),
    )
    def choose(rows: Any, before: list[str]) -> Any:
        if not isinstance(rows, list):  # Still the order to choose, not what came of it.
            return no_update
        names = [row["name"] for row in rows]
        kept = [name for name in before if name in names]
        now = kept + [name for name in names if name not in kept]
        return now if now != before else no_update

    @app.callback(
        Output("runs-graph", "figure"),
        Output("runs-note", "children"),
        Output("runs-look-columns", "options"),
        Input("clock", "n_intervals"),
        Input("chosen", "data"),
        Input("page-runs", "hidden"),
        *look_inputs("runs"),
        State("runs-graph", "figure"),
    )
    def draw(_: int, chosen: list[str], hidden: bool, *rest: Any) -> tuple[Any, Any, Any]:
        *wanted, before = rest
        if hidden:
            return no_update, no_update, no_update
        look = look_from(wanted)
        chosen = names_in(chosen)
        shown = chosen[:MOST_RUNS]
        read = curves_of(live, shown, look.columns)
        note = "" if chosen else NONE_CHOSEN
        if len(chosen) > MOST_RUNS:
            note = f"The first {MOST_RUNS} of {len(chosen)} chosen runs are shown."
        if absent := without(read, look):
            note = f"Nobody noted what a step of {', '.join(absent)} is on this axis. {note}"
        drawn = figure(read, look)
        return (no_update if same(before, drawn) else drawn), note, columns_of(live, shown, look.columns)
