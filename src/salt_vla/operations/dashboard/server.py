"""Serving the dashboard: on this machine's own address alone, until a signal comes.

Knows ports, signals and the token; what the pages show is `app.py`'s business, loaded here when it is needed.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from salt_vla.errors import ConfigError, ResourceError
from salt_vla.interrupts import stop_on_signals
from salt_vla.operations.dashboard.guard import Guard

ADDRESS = "127.0.0.1"
LOOPBACK = (ADDRESS, "localhost", "::1")
SHORTEST_TOKEN = 16  # characters
NO_EXTRA = "the dashboard needs more packages: pip install -c constraints.txt 'salt-vla[dashboard]'"


def require_loopback(host: str, port: int) -> None:
    """Raises `ConfigError` for an address that other machines can reach."""
    if host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: the dashboard answers this machine alone, since it asks nobody for a password; "
            f"from another one, use `ssh -L {port}:{ADDRESS}:{port} THIS_MACHINE` and open "
            f"http://{ADDRESS}:{port} there"
        )


def usable_token(given: str) -> str:
    """The token that was given, or a new one. Raises `ConfigError` for one that could be guessed."""
    if given and len(given) < SHORTEST_TOKEN:
        raise ConfigError(
            f"SALT_VLA_DASHBOARD_TOKEN has fewer than {SHORTEST_TOKEN} characters; unset it, and one is made"
        )
    return given or secrets.token_urlsafe(24)


def serve(port: int, token: str, started: Callable[[str], None]) -> None:
    """Answer at `port` (0: any free one) until a signal comes; `started` is told the page's address. With a
    `token` the pages can act for whoever knows it. Raises `ConfigError` without the extra, `ResourceError`
    where the port is taken."""
    with serving(port, token) as taken, stop_on_signals() as stop:
        started(f"http://{ADDRESS}:{taken}")
        waiting = threading.Event()
        while not stop:
            waiting.wait(0.2)


@contextmanager
def serving(port: int, token: str = "") -> Iterator[int]:
    """Answers within the block; yields the port."""
    try:
        from salt_vla.operations.dashboard.app import make_app
    except ImportError as error:
        raise ConfigError(f"{NO_EXTRA} ({error})") from error
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # Else a line for each request.
    dash = make_app(token)
    with _bound(port) as sock:
        taken = int(sock.getsockname()[1])
        guard = Guard(dash.server, taken, dash.csp_hashes())
        server = make_server(ADDRESS, taken, guard, threaded=True, fd=sock.fileno())
        thread = threading.Thread(target=server.serve_forever, name="dashboard", daemon=True)
        thread.start()
        try:
            yield taken
        finally:
            server.shutdown()
            thread.join()


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ResourceError(
            f"the dashboard cannot have port {port} ({error}); is it open already? Else give another --port"
        ) from error
    sock.listen(64)
    return sock
