"""`salt-vla dashboard`"""

from __future__ import annotations

import webbrowser

from salt_vla.operations.dashboard.server import ADDRESS, require_loopback, serve, usable_token
from salt_vla.rundir import dashboard_token


def dashboard(port: int = 8377, open: bool = False, token: bool = False, host: str = ADDRESS) -> None:
    """Show runs, queue and caches on a page of this machine, live, until Ctrl-C (extra: dashboard).

    Example: salt-vla dashboard --open

    Args:
        port: where it answers; from another machine, through `ssh -L 8377:127.0.0.1:8377 MACHINE`.
        open: also open the page in a browser.
        token: let whoever gives the token stop runs and change the queue. It is taken from
            SALT_VLA_DASHBOARD_TOKEN, or made and printed once; without it the page only shows.
        host: this machine's own address; any other is refused.
    """
    require_loopback(host, port)
    given = dashboard_token() if token else ""
    secret = usable_token(given) if token else ""

    def started(address: str) -> None:
        print(f"dashboard: {address} (Ctrl-C ends it)", flush=True)
        if secret and not given:
            print(f"dashboard: the token, for this time: {secret}", flush=True)
        if open:
            webbrowser.open(address)

    serve(port, secret, started)
    print("dashboard: ended")
