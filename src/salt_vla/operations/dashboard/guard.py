"""Who may talk to the dashboard: every request passes here before anything else looks at it.

Knows HTTP alone. A page of another site that is open in the same browser can send requests to this machine,
and a name that resolves to it can make itself the page's own site; both give themselves away in the headers
that a browser does not let a page write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]
METHODS = ("GET", "HEAD", "POST")
OWN_SITE = ("", "same-origin", "none")  # What Sec-Fetch-Site may say; old browsers say nothing.
LARGEST_BODY = 8_000_000  # bytes
FIXED = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class Guard:
    """Refuses what does not come from the page itself at `port` of this machine, and adds to every answer
    what a browser may do with it; `scripts` are sources of the content-security policy beside 'self'."""

    def __init__(self, app: WsgiApp, port: int, scripts: Sequence[str] = ()) -> None:
        self.app = app
        self.hosts = tuple(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))
        self.headers = (*FIXED, ("Content-Security-Policy", policy(scripts)))

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            own = {name.lower() for name, _ in self.headers}
            kept = [pair for pair in headers if pair[0].lower() not in own]
            return start_response(status, [*kept, *self.headers], *rest)

        reason = refusal(environ, self.hosts)
        if reason:
            body = f"salt-vla dashboard: {reason}\n".encode()
            start("403 Forbidden", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
            return [body]
        return self.app(environ, start)


def policy(scripts: Sequence[str] = ()) -> str:
    """Nothing from elsewhere, no code in the page but the scripts named, no frame around it. Styles may be
    inline: the tables and charts place their parts so."""
    sources = {
        "default-src": "'none'",
        "script-src": " ".join(("'self'", *scripts)),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def refusal(environ: Environ, hosts: Sequence[str]) -> str:
    """Why a request is refused; empty where it is not. `hosts`: the names that the page may be called by."""
    host = str(environ.get("HTTP_HOST", "")).lower()
    method = str(environ.get("REQUEST_METHOD", ""))
    if host not in hosts:
        return f"it answers at http://{hosts[0]} alone; through a tunnel, give both ends the same port"
    if method not in METHODS:
        return f"it knows no {method[:20]}"
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and str(origin).lower() != f"http://{host}":
        return "this request comes from another site's page"
    if method == "POST" and origin is None:
        return "a request that may change something says where it comes from (Origin)"
    is_visit = environ.get("HTTP_SEC_FETCH_MODE") == "navigate" and method != "POST"
    if environ.get("HTTP_SEC_FETCH_SITE", "") not in OWN_SITE and not is_visit:
        return "this request comes from another site's page"
    if "HTTP_UPGRADE" in environ:
        return "it speaks no other protocol"
    length = str(environ.get("CONTENT_LENGTH") or "0")
    if "HTTP_TRANSFER_ENCODING" in environ or not length.isdecimal() or int(length) > LARGEST_BODY:
        return f"a request has at most {LARGEST_BODY:,} bytes, and says how many"
    return ""
