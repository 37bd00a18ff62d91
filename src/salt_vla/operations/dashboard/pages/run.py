"""One run: how it goes or how it ended, its curves, pictures, attempts, log and settings."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from salt_vla.config import leaves
from salt_vla.errors import RunError, UserError
from salt_vla.operations.compare_tables import label
from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.charts import figure, same
from salt_vla.operations.dashboard.curves import columns_of, curves_of
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.parts import shown, when
from salt_vla.operations.dashboard.pictures import pictures_of
from salt_vla.operations.dashboard.tails import last_events, tail
from salt_vla.operations.dashboard.view import graph, look_controls, look_from, look_inputs
from salt_vla.operations.launch import EVENTS, supervision
from salt_vla.operations.overview import Overview, config_of
from salt_vla.operations.words import duration
from salt_vla.rundir import RunDirectory

OFFERED = 50  # names in the list to choose from
CAPTIONS = {
    "masks": "What each mask group of the first batch shows, hides and drops.",
    "pca": "Three principal components of the encoder's tokens, beside the same encoder at random.",
}
NO_CHOICE = "Choose a run above, or by a click on its name in the table of runs."


def layout(actions: Actions) -> list[Component]:
    chooser = dcc.Dropdown([], placeholder="choose a run", id="run-chooser", clearable=False)
    stop = parts.button("run-stop", "Stop it", hidden=not actions.token)
    return [
        html.Section(
            [html.Div([chooser, stop, html.Span(id="run-answer", className="quiet")], className="head")],
            className="card wide",
        ),
        html.Div(NO_CHOICE, id="run-state", className="card"),
        html.Div(id="run-about", className="card"),
        parts.card("Curves", look_controls("run"), graph("run-graph"), wide=True),
        html.Div(id="run-pictures", className="card wide"),
        html.Div(id="run-log", className="card wide"),
        html.Div(id="run-attempts", className="card"),
        html.Div(id="run-settings", className="card"),
        dcc.Store(id="run-seen"),
    ]


def name_in(pathname: str | None) -> str:
    """Of the run that an address means; empty for none. Whether there is one is not looked at."""
    parts_of_it = (pathname or "").strip("/").split("/")
    return unquote(parts_of_it[1]) if len(parts_of_it) == 2 and parts_of_it[0] == "run" else ""


def connect(app: Dash, live: Live, actions: Actions) -> None:
    _connect_chooser(app, live)
    _connect_curves(app, live)

    @app.callback(
        [Output(f"run-{part}", "children") for part in PARTS],
        Output("run-seen", "data"),
        Input("clock", "n_intervals"),
        Input("address", "pathname"),
        State("run-seen", "data"),
    )
    def refresh(_: int, pathname: str | None, seen: Any) -> list[Any]:
        name = name_in(pathname)
        if not name:
            return [no_update] * (len(PARTS) + 1)
        try:
            run = RunDirectory.named(name).require()
        except RunError as error:
            return [str(error), *[None] * (len(PARTS) - 1), [name]]
        now = [name, live.stamp(run)]
        if now == seen:
            return [no_update] * (len(PARTS) + 1)
        overview = live.overview(run)
        return [*(part(run, overview, live) for part in PARTS.values()), now]

    @app.callback(
        Output("run-answer", "children"),
        Input("run-stop", "n_clicks"),
        State("address", "pathname"),
        State("token", "value"),
        prevent_initial_call=True,
    )
    def stop(_: int, pathname: str | None, token: str | None) -> str:
        return actions.stop(token, name_in(pathname))


def _connect_chooser(app: Dash, live: Live) -> None:
    @app.callback(
        Output("run-chooser", "options"),
        Output("run-chooser", "value"),
        Input("run-chooser", "search_value"),
        Input("address", "pathname"),
    )
    def offer(search: str | None, pathname: str | None) -> tuple[list[str], str | None]:
        here, wanted = name_in(pathname), (search or "").lower()
        found = sorted(live.overviews().values(), key=lambda each: -each.updated)
        names = [each.name for each in found if wanted in each.name.lower()][:OFFERED]
        return [here] * (bool(here) and here not in names) + names, here or None

    @app.callback(
        Output("address", "pathname", allow_duplicate=True),
        Input("run-chooser", "value"),
        State("address", "pathname"),
        prevent_initial_call=True,
    )
    def go(name: str | None, pathname: str | None) -> Any:
        return f"/run/{name}" if name and name != name_in(pathname) else no_update


def _connect_curves(app: Dash, live: Live) -> None:
    @app.callback(
        Output("run-graph", "figure"),
        Output("run-look-columns", "options"),
        Input("clock", "n_intervals"),
        Input("address", "pathname"),
        *look_inputs("run"),
        State("run-graph", "figure"),
    )
    def draw(_: int, pathname: str | None, *rest: Any) -> tuple[Any, Any]:
        *wanted, before = rest
        name = name_in(pathname)
        if not name:
            return no_update, no_update
        look = look_from(wanted)
        drawn = figure(curves_of(live, [name], look.columns), look)
        options = columns_of(live, [name], look.columns)
        return (no_update if same(before, drawn) else drawn), options


def _state(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    status = seen.status
    figures = [
        (f"best {label(name)}", f"{shown(value)} at step {step:,}")
        for name, (value, step) in seen.best.items()
    ]
    pairs = [
        ("exit reason", status.exit_reason),
        ("step", f"{seen.step:,} of {seen.total_steps:,} ({seen.share:.0%})" if seen.total_steps else ""),
        ("time left", duration(seen.eta_seconds) if seen.eta_seconds is not None else ""),
        ("pace", f"{seen.clips_per_s:.1f} clips/s" if seen.clips_per_s else ""),
        ("waits for data", f"{seen.data_wait_share:.0%}" if seen.data_wait_share is not None else ""),
        ("memory", f"{seen.memory_gb:.2f} GB" if seen.memory_gb is not None else ""),
        ("resumed from", ", ".join(f"{step:,}" for step in status.resumed_from)),
        ("branched from", status.branched_from),
        ("process", status.pid or ""),
        ("last sign of life", when(seen.updated)),
        *figures,
        ("warnings", "; ".join(seen.warnings)),
    ]
    bar = html.Progress(value=f"{seen.share:.4f}", max="1", **{"aria-label": "share of the steps done"})
    title = html.H2([run.name, " ", parts.badge(seen.state)])
    return [title, bar, parts.facts(pairs)]


def _about(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    recipe, verdict = seen.recipe, seen.verdict
    pairs = [
        *(
            (key, str(recipe.get(key) or ""))
            for key in ("name", "parent", "hypothesis", "target", "criterion")
        ),
        ("verdict", " – ".join(str(verdict[key]) for key in ("verdict", "reason") if verdict.get(key))),
        *(
            (key.replace("_", " "), shown(value))
            for key, value in seen.cost.items()
            if isinstance(value, (int, float))
        ),
    ]
    masks = seen.masks.get("summary", [])
    lines = [html.P(str(line)) for line in masks] if isinstance(masks, list) else []
    return [html.H2("Recipe"), parts.facts(pairs), html.H2("Masks"), *(lines or [html.P("not noted")])]


def _pictures(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    found = pictures_of(run)
    cure = f"None yet: `salt-vla runs pictures {run.name}` draws its masks and what its encoder sees."
    figures = [
        html.Figure([
            html.Img(src=f"/picture/{run.name}/{file.name}?{file.stat().st_mtime_ns}", alt=file.stem),
            html.Figcaption(CAPTIONS.get(file.stem, file.stem)),
        ])
        for file in found
    ]  # fmt: skip
    inside = html.Div(figures, className="figures") if figures else html.P(cure, className="quiet")
    return [html.H2("Pictures"), inside]


def _attempts(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    try:
        launched = supervision(run.path)
    except UserError as error:
        return [html.H2("Attempts"), html.P(str(error))]
    rows = [
        (number, each.process.pid, when(each.ended), each.reason or "at work")
        for number, each in enumerate(launched.attempts if launched else (), 1)
    ]
    told = [(when(event.get("time")), _told(event)) for event in last_events(run.path / EVENTS, 30)]
    said: list[Component] = [html.P("Not started under a supervisor (--detach).", className="quiet")]
    if launched:
        said = [parts.plain_table(("", "process", "ended", "how"), rows)]
    history = [html.H2("History"), parts.plain_table(("when", "what"), told)] if told else []
    return [html.H2("Attempts"), *said, *history]


def _told(event: dict[str, Any]) -> str:
    details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event") and v != "")
    return f"{event.get('event', '')} {details and f'({details})'}"


def _log(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    text = tail(run.log_file)
    return [html.H2("Log"), html.Div(html.Pre(text or "nothing yet"), className="log")]


def _settings(run: RunDirectory, seen: Overview, live: Live) -> list[Component]:
    try:
        config = config_of(run)
    except UserError as error:
        return [html.H2("Settings"), html.P(str(error))]
    rows = [(name, shown(value)) for name, value in leaves(config)] if config else []
    inside = parts.plain_table(("field", "value"), rows) if rows else html.P("not settled yet")
    return [html.H2("Settings"), html.Div(inside, className="settings")]


PARTS = {
    "state": _state,
    "about": _about,
    "pictures": _pictures,
    "log": _log,
    "attempts": _attempts,
    "settings": _settings,
}
