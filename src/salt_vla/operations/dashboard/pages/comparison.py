"""The chosen runs beside one another: figures, equal points, settings that differ, seeds that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from salt_vla.errors import UserError
from salt_vla.operations.compare import COLUMNS, Compared, Comparison, compare
from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.parts import plain_table, shown
from salt_vla.operations.dashboard.view import names_in

MOST_RUNS = 8
OFFERED = 50
NO_CHOICE = "Choose runs here, or by their boxes in the table of runs."
AXES = {"steps": "steps", "clips": "clips", "flops": "FLOPs"}


def layout(actions: Actions) -> list[Component]:
    columns = [{"label": name.replace(".", ": ", 1), "value": name} for name in COLUMNS]
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
    """All of a comparison, part by part; parts of which nothing is known are left out."""
    head = ["", *(parts.link(name) for name in found.names)]
    sections: list[tuple[str, Sequence[str | Component], list[list[Any]]]] = [
        ("Figures", head, _figures(found)),
        (f"{_named(found.column)} at equal points", head, _equal(found)),
        ("Settings that differ", head, _settings(found)),
        ("Probes", ("run", "suite", "target", "metric", "value", "95 %"), _probes(found.runs)),
        ("Where seeds repeat", ("runs", "seeds", "mean", "95 %", ""), _groups(found)),
        ("Differences, seed by seed", ("", "against", "mean", "95 %", ""), _paired(found)),
    ]
    shown_parts = [
        part for title, first, rows in sections if rows for part in (html.H2(title), plain_table(first, rows))
    ]
    warnings = [html.P(sentence, className="warning") for sentence in found.incomparable]
    missing = [html.P(note, className="warning") for note in found.notes]
    return [*warnings, *missing, *shown_parts]


def _named(column: str) -> str:
    return column.replace(".", ": ", 1)


def _figures(found: Comparison) -> list[list[Any]]:
    runs = found.runs
    rows: list[list[Any]] = [
        ["state", *(parts.badge(run.overview.state) for run in runs)],
        ["exit reason", *(run.overview.status.exit_reason for run in runs)],
        ["step", *(f"{run.overview.step:,} of {run.overview.total_steps:,}" for run in runs)],
    ]
    for column in COLUMNS:
        figures = [run.figures.get(column) for run in runs]
        if not any(figures):
            continue
        name = _named(column)
        rows.append([f"{name}, last", *(shown(each and each.last) for each in figures)])
        best = [f"{shown(each.best)} at {each.best_step:,}" if each else "–" for each in figures]
        rows.append([f"{name}, best", *best])
        rows.append(
            [f"{name}, mean of last 100 lines", *(shown(each and each.last_mean) for each in figures)]
        )
        means = [", ".join(map(shown, each.epoch_means)) if each else "" for each in figures]
        rows += [[f"{name}, epoch means", *means]] * any(means)
    return rows


def _equal(found: Comparison) -> list[list[Any]]:
    return [[f"{parts.amount(row.x)} {AXES[row.axis]}", *map(shown, row.values)] for row in found.equal]


def _settings(found: Comparison) -> list[list[Any]]:
    return [[row.field, *map(shown, row.values)] for row in found.settings]


def _probes(runs: Sequence[Compared]) -> list[list[Any]]:
    return [
        [run.name, *(str(row.get(key, "")) for key in ("suite", "target", "metric")), shown(row.get("value")),
         _interval(row.get("low"), row.get("high"))]
        for run in runs
        for row in run.probes
    ]  # fmt: skip


def _groups(found: Comparison) -> list[list[Any]]:
    return [
        [", ".join(each.runs), ", ".join(map(str, each.seeds)), shown(each.mean),
         _interval(each.low, each.high), each.note]
        for each in found.groups
        if len(each.runs) > 1
    ]  # fmt: skip


def _paired(found: Comparison) -> list[list[Any]]:
    return [
        [each.first, each.against, shown(each.mean), _interval(each.low, each.high), each.note]
        for each in found.paired
    ]


def _interval(low: Any, high: Any) -> str:
    return "" if low is None or high is None else f"{shown(low)} … {shown(high)}"
