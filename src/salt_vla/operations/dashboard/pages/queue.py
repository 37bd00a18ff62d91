"""The queue: its jobs, why each waits, and what happened; with the token also ways to change it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dash import Dash, Input, Output, State, ctx, html, no_update
from dash.development.base_component import Component

from salt_vla.errors import UserError
from salt_vla.operations.conditions_now import Now, may_start
from salt_vla.operations.dashboard import parts
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.dashboard.parts import words
from salt_vla.operations.queue import Job, Queue

MOST_EVENTS = 200
MOST_ASKED = 50  # jobs of which it is said why they wait: each answer looks at runs, caches, the machine
COLUMNS = (
    words("name", "job", 180, pinned="left"),
    parts.state(),
    words("why", "why", 420),
    words("command", "command", 360),
    words("slot", "slot", 90),
    parts.number("attempt", "starts", 80),
    parts.number("added", "added", 145, parts.WHEN),
    parts.number("started", "started", 145, parts.WHEN),
    parts.number("ended", "ended", 145, parts.WHEN),
)
BUTTONS: dict[str, tuple[str, Callable[[Queue, str], object]]] = {
    "cancel": ("Take out", lambda queue, name: queue.cancel(name)),
    "first": ("To the head", lambda queue, name: queue.move(name)),
    "last": ("To the end", lambda queue, name: queue.move(name, last=True)),
    "retry": ("Try again", lambda queue, name: queue.retry(name)),
    "hold": ("Pause", lambda queue, name: queue.pause(name)),
    "release": ("Go on", lambda queue, name: queue.pause(name, resume=True)),
}


def layout(actions: Actions) -> list[Component]:
    grid = parts.table("queue-table", COLUMNS, "key", grid={"rowSelection": {"mode": "singleRow"}})
    buttons = [parts.button(f"queue-{name}", title) for name, (title, _) in BUTTONS.items()]
    return [
        html.Section(
            [
                html.Div(
                    [html.H2("Queue"), html.Span(id="queue-about", className="quiet")], className="head"
                ),
                grid,
                html.Div(buttons, className="head below", hidden=not actions.token),
                html.P(id="queue-answer", className="quiet"),
            ],
            className="card wide",
        ),
        html.Div(id="queue-history", className="card wide"),
    ]


def connect(app: Dash, live: Live, actions: Actions) -> None:
    @app.callback(
        Output("queue-table", "rowData"),
        Output("queue-about", "children"),
        Output("queue-history", "children"),
        Input("clock", "n_intervals"),
        Input("page-queue", "hidden"),
        Input("queue-answer", "children"),
    )
    def refresh(_: int, hidden: bool, answer: Any) -> tuple[Any, Any, Any]:
        if hidden:
            return no_update, no_update, no_update
        queue = Queue()
        try:
            jobs, events = queue.jobs(), queue.history()[-MOST_EVENTS:][::-1]
            about = _about(queue)
        except UserError as error:
            return [], str(error), None
        rows = [(parts.when(each.time), each.job, each.event, each.why) for each in events]
        table = html.Div(parts.plain_table(("when", "job", "what", "why"), rows), className="history")
        history = [html.H2("History"), table] if rows else html.P("Nothing has been queued yet.")
        return rows_of(jobs), about, history

    @app.callback(
        Output("queue-answer", "children"),
        [Input(f"queue-{name}", "n_clicks") for name in BUTTONS],
        State("queue-table", "selectedRows"),
        State("token", "value"),
        prevent_initial_call=True,
    )
    def change(*given: Any) -> str:
        *_, chosen, token = given
        title, what = BUTTONS[str(ctx.triggered_id).removeprefix("queue-")]
        name = chosen[0].get("name") if isinstance(chosen, list) and chosen else None
        if not isinstance(name, str):
            return "Choose a job in the table first."

        def act() -> str:
            what(Queue(), name)
            return f"{title}: {name}, at {parts.when(time.time())}"

        return actions.do(token, act)


def rows_of(jobs: list[Job]) -> list[dict[str, Any]]:
    """Lines of the table, the newest of those that are over first."""
    now = Now({job.id: job for job in jobs}, "", time.time())
    asked = [job.id for job in jobs if job.state == "waiting"][:MOST_ASKED]
    return [
        {
            "key": str(job.id),
            "name": job.name,
            "state": job.state,
            "why": _why(job, now, job.id in asked),
            "command": " ".join(job.command),
            "slot": job.ran_on or job.slot,
            "attempt": job.attempt,
            "added": job.added,
            "started": job.started,
            "ended": job.ended,
        }
        for job in jobs
    ]


def _why(job: Job, now: Now, may_ask: bool) -> str:
    if job.state == "waiting" and job.held:
        return "paused by hand"
    return job.reason or (may_start(job, now).why if may_ask else "")


def _about(queue: Queue) -> str:
    alive = [seen.slot for seen in queue.runners() if seen.process.is_alive()]
    runners = f"runners at work: {', '.join(alive)}" if alive else "no runner at work"
    return runners + "; paused: starts no further job" * queue.is_paused()
