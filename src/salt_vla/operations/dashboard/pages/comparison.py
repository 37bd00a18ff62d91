"""Stub."""

from __future__ import annotations

from dash import Dash, html
from dash.development.base_component import Component

from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.live import Live


def layout(actions: Actions) -> list[Component]:
    return [html.P("…")]


def connect(app: Dash, live: Live, actions: Actions) -> None:
    """Nothing."""
