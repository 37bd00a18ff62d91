"""Who may talk to the dashboard: what a browser says of where a request comes from decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from salt_vla.errors import ConfigError
from salt_vla.operations.dashboard.actions import Actions
from salt_vla.operations.dashboard.guard import LARGEST_BODY, Guard, policy, refusal
from salt_vla.operations.dashboard.server import require_loopback, usable_token

PORT = 8377
HOSTS = ("127.0.0.1:8377", "localhost:8377", "[::1]:8377")
VISIT = {"REQUEST_METHOD": "GET", "HTTP_HOST": HOSTS[0]}
CALL = {"REQUEST_METHOD": "POST", "HTTP_HOST": HOSTS[0], "HTTP_ORIGIN": f"http://{HOSTS[0]}"}
TOKEN = "a-token-of-this-test-alone"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("site", ["same-origin", "none", None])
def test_the_page_itself_is_answered(host: str, site: str | None) -> None:
    more = {"HTTP_SEC_FETCH_SITE": site} if site else {}
    assert not refusal(VISIT | {"HTTP_HOST": host} | more, HOSTS)
    assert not refusal(CALL | {"HTTP_HOST": host, "HTTP_ORIGIN": f"http://{host}"} | more, HOSTS)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:80",
        "evil.example:8377",
        "127.0.0.1.evil.example:8377",
        "evil.example@127.0.0.1:8377",
        "127.0.0.1:8377.evil.example",
        "0.0.0.0:8377",
        "localhost:83770",
        "127.0.0.1:8377, evil.example",
    ],
)
@pytest.mark.parametrize("request_", [VISIT, CALL], ids=["GET", "POST"])
def test_another_name_for_this_machine_is_refused(request_: dict[str, str], host: str) -> None:
    """DNS rebinding: the page of evil.example, whose name now means this machine, sends its own name."""
    said = refusal(request_ | {"HTTP_HOST": host, "HTTP_ORIGIN": f"http://{host}"}, HOSTS)
    assert "127.0.0.1:8377" in said


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1:8378",
        "https://127.0.0.1:8377",
        "http://localhost:8377",  # Another one than the page's own, which was asked as 127.0.0.1.
        "http://127.0.0.1:8377.evil.example",
    ],
)
@pytest.mark.parametrize("request_", [VISIT, CALL], ids=["GET", "POST"])
def test_a_page_of_another_site_is_refused(request_: dict[str, str], origin: str) -> None:
    assert "another site" in refusal(request_ | {"HTTP_ORIGIN": origin}, HOSTS)


def test_what_may_change_something_says_where_it_comes_from() -> None:
    assert "Origin" in refusal({k: v for k, v in CALL.items() if k != "HTTP_ORIGIN"}, HOSTS)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "rubbish"])
def test_pictures_and_scripts_are_not_for_other_sites(site: str) -> None:
    assert "another site" in refusal(VISIT | {"HTTP_SEC_FETCH_SITE": site}, HOSTS)
    assert "another site" in refusal(CALL | {"HTTP_SEC_FETCH_SITE": site}, HOSTS)
    # A link in a report or a mail may lead to the page: nobody reads the answer but its visitor.
    followed = VISIT | {"HTTP_SEC_FETCH_SITE": site, "HTTP_SEC_FETCH_MODE": "navigate"}
    assert not refusal(followed, HOSTS)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", ""])
def test_other_methods_are_refused(method: str) -> None:
    assert refusal(CALL | {"REQUEST_METHOD": method}, HOSTS)


def test_other_protocols_are_refused() -> None:
    assert "protocol" in refusal(VISIT | {"HTTP_UPGRADE": "websocket"}, HOSTS)


@pytest.mark.parametrize(
    "size",
    [
        {"CONTENT_LENGTH": str(LARGEST_BODY + 1)},
        {"CONTENT_LENGTH": "-1"},
        {"CONTENT_LENGTH": "many"},
        {"HTTP_TRANSFER_ENCODING": "chunked"},
    ],
)
def test_a_request_has_a_size_and_it_is_bounded(size: dict[str, str]) -> None:
    assert "bytes" in refusal(CALL | size, HOSTS)
    assert not refusal(CALL | {"CONTENT_LENGTH": str(LARGEST_BODY)}, HOSTS)
    assert not refusal(CALL | {"CONTENT_LENGTH": ""}, HOSTS)


def _answer(environ: dict[str, Any]) -> tuple[str, dict[str, str], bytes, list[str]]:
    reached: list[str] = []
    said: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        reached.append("app")
        start_response("200 OK", [("X-Frame-Options", "ALLOWALL"), ("Content-Type", "text/html")])
        return [b"the page"]

    def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> None:
        said.append((status, headers))

    body = b"".join(Guard(app, PORT, ["'sha256-abc='"])(environ, start))
    status, headers = said[-1]
    assert len({name.lower() for name, _ in headers}) == len(headers)
    return status, dict(headers), body, reached


def test_a_refused_request_reaches_nothing() -> None:
    status, _, body, reached = _answer(VISIT | {"HTTP_HOST": "evil.example"})
    assert status.startswith("403") and not reached and b"the page" not in body


@pytest.mark.parametrize("environ", [VISIT, VISIT | {"HTTP_HOST": "evil.example"}], ids=["page", "refusal"])
def test_every_answer_says_what_a_browser_may_do_with_it(environ: dict[str, str]) -> None:
    headers = _answer(environ)[1]
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "'sha256-abc='" in headers["Content-Security-Policy"]


def test_no_code_but_the_pages_own_may_run() -> None:
    rules = dict(each.split(" ", 1) for each in policy(["'sha256-abc='"]).split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["script-src"] == "'self' 'sha256-abc='"
    assert "unsafe" not in rules["script-src"] and "eval" not in " ".join(rules.values())
    assert not [source for sources in rules.values() for source in sources.split() if "//" in source]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "", "gpu-box.lan"])
def test_other_machines_are_sent_through_a_tunnel(host: str) -> None:
    with pytest.raises(ConfigError, match=r"ssh -L 8377:127\.0\.0\.1:8377"):
        require_loopback(host, PORT)
    require_loopback("localhost", PORT)


def test_a_token_cannot_be_guessed() -> None:
    with pytest.raises(ConfigError, match="SALT_VLA_DASHBOARD_TOKEN"):
        usable_token("short")
    assert usable_token(TOKEN) == TOKEN
    assert len(usable_token("")) >= 32 and usable_token("") != usable_token("")


@pytest.mark.parametrize("given", [None, "", TOKEN[:-1], TOKEN + "x", "☃" * 20])
def test_nothing_is_done_without_the_token(given: str | None) -> None:
    done: list[str] = []
    said = Actions(TOKEN).do(given, lambda: done.append("done") or "done")
    assert not done and TOKEN not in said


def test_with_the_token_it_is_done_and_said_how_it_went() -> None:
    assert Actions(TOKEN).do(TOKEN, lambda: "done") == "done"

    def refuse() -> str:
        raise ConfigError("no job e9 waits")

    assert Actions(TOKEN).do(TOKEN, refuse) == "no job e9 waits"


@pytest.mark.parametrize("given", [None, "", TOKEN])
def test_a_page_without_token_only_shows(given: str | None) -> None:
    done: list[str] = []
    assert "only shows" in Actions("").do(given, lambda: done.append("done") or "done")
    assert not done
