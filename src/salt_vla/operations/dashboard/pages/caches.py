"""The caches below the root: what each holds, whether it is complete, and what had to be left out."""

from __future__ import annotations

from typing import Any

from dash import Dash, Input, Output, html, no_update
from dash.development.base_component import Component

from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.found_caches import cache_rows, manifest_of
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.parts import number, words

COLUMNS = (
    words("path", "cache", 240, pinned="left"),
    words("complete", "complete", 150),
    words("kind", "kind", 95),
    words("teacher", "teacher", 180),
    words("split", "split", 110),
    number("clips", "clips", 95),
    number("views", "views", 80),
    words("shape", "a record", 110),
    words("encoding", "encoding", 105),
    number("quarantined", "quarantined", 120),
    number("gigabytes", "GB", 90),
    words("problem", "problem", 320),
)


def layout(actions: Actions) -> list[Component]:
    grid = parts.table("caches-table", COLUMNS, "path", grid={"rowSelection": {"mode": "singleRow"}})
    return [
        parts.card("Caches", grid, wide=True),
        html.Div("Choose a cache to see its manifest.", id="caches-manifest", className="card wide"),
    ]


def connect(app: Dash, live: Live, actions: Actions) -> None:
    @app.callback(
        Output("caches-table", "rowData"),
        Input("clock", "n_intervals"),
        Input("page-caches", "hidden"),
    )
    def refresh(_: int, hidden: bool) -> Any:
        return no_update if hidden else cache_rows()

    @app.callback(Output("caches-manifest", "children"), Input("caches-table", "selectedRows"))
    def show(rows: Any) -> Any:
        path = rows[0].get("path") if isinstance(rows, list) and rows else None
        if not isinstance(path, str):
            return no_update
        said = [(name, parts.shown(value)) for name, value in manifest_of(path).items()]
        return [html.H2(path), parts.plain_table(("field", "value"), said)]
