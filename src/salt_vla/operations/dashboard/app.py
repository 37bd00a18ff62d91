"""The dashboard as an application: one page in the browser with five parts, of which one is seen at a time.

Puts the parts together; what each shows and how it is kept up to date is in `pages/`.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from dash import Dash, Input, Output, dcc, html, set_props
from flask import Flask

from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.guard import LARGEST_BODY
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.pages import caches, comparison, queue, run, runs
from salt_vla.operations.dashboard.pictures import serve_pictures

SECONDS = 2.0  # between two looks
PAGES = {"runs": runs, "run": run, "compare": comparison, "queue": queue, "caches": caches}


def make_app(token: str = "") -> Dash:
    """All parts and their callbacks; `token`: see `Actions`."""
    server = Flask("salt_vla.dashboard", static_folder=None)
    server.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app = Dash(
        "salt_vla.dashboard",
        server=server,
        assets_folder=str(Path(__file__).with_name("assets")),
        serve_locally=True,
        title="salt-vla",
        update_title="",
        use_pages=False,
        enable_mcp=False,
        add_log_handler=False,
        on_error=_tell,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    live, actions = Live(), Actions(token)
    app.layout = html.Div([
        dcc.Location(id="address", refresh="callback-nav"),
        dcc.Interval(id="clock", interval=1000 * SECONDS),
        dcc.Store(id="chosen", data=[]),
        html.Header([
            html.Strong("salt-vla"),
            html.Nav([dcc.Link(title, href=f"/{title}", id=f"to-{title}") for title in PAGES]),
            _token_field(actions),
        ]),
        html.P(id="trouble", className="trouble"),
        html.Main([
            html.Div(page.layout(actions), id=f"page-{title}", hidden=True) for title, page in PAGES.items()
        ]),
    ])  # fmt: skip
    for page in PAGES.values():
        page.connect(app, live, actions)
    _connect_navigation(app)
    serve_pictures(server)
    return app


def _token_field(actions: Actions) -> dcc.Input:
    """Always there, since callbacks read it; seen where there is a token to give."""
    field = dcc.Input(id="token", type="password", placeholder="token", value="", autoComplete="off")
    says = html.Span("" if actions.token else "read-only", className="quiet")
    return html.Div([html.Div(field, hidden=not actions.token), says], className="token")


def page_of(pathname: str | None) -> str:
    """Which part an address means."""
    first = (pathname or "/").strip("/").split("/")[0]
    return first if first in PAGES else "runs"


def _connect_navigation(app: Dash) -> None:
    hidden = [Output(f"page-{title}", "hidden") for title in PAGES]
    marked = [Output(f"to-{title}", "className") for title in PAGES]

    @app.callback([*hidden, *marked], Input("address", "pathname"))
    def show(pathname: str | None) -> list[object]:
        here = page_of(pathname)
        return [title != here for title in PAGES] + ["here" if title == here else "" for title in PAGES]


def _tell(error: Exception) -> None:
    """A part that fails keeps what it shows, and the page says so; where it failed is on the terminal."""
    traceback.print_exception(error)
    said = (
        f"A part of this page is not up to date ({type(error).__name__}: {error}); the terminal says where."
    )
    set_props("trouble", {"children": said})
