"""No value of a variable that is named like a secret stays in words that are kept, however it is written."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from salt_vla.operations.launch import events, record_event
from salt_vla.redaction import Redacted, redacted, without_secrets
from salt_vla.rundir import RunDirectory, Status

CANARY = 'canary&a<b|c"d  e-0123456789'


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    monkeypatch.setenv("PLAIN", "plain text that stays")


@pytest.mark.parametrize("form", [str, quote, quote_plus, lambda text: json.dumps(text)[1:-1]])
def test_a_secret_is_found_as_others_write_it(form: object) -> None:
    assert callable(form)
    said = without_secrets(f"1: plain text that stays, key={form(CANARY)}&x")
    assert said == "1: plain text that stays, key=(MY_API_KEY)&x"


def test_of_two_that_begin_alike_the_longer_is_taken_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "0123456789")
    monkeypatch.setenv("B_TOKEN", "0123456789abcdef")
    assert without_secrets("0123456789abcdef 0123456789") == "(B_TOKEN) (A_TOKEN)"


def test_the_login_of_an_address_is_a_secret() -> None:
    said = without_secrets("credentials for http://u:pw@127.0.0.1:1/x, mail a:b@c, http://host:80/@me")
    assert said == "credentials for http://(login)@127.0.0.1:1/x, mail a:b@c, http://host:80/@me"


@dataclass(frozen=True)
class _Nested:
    text: str
    number: float = 1.5
    rows: tuple[dict[str, list[str]], ...] = ()
    derived: str = field(init=False, default="")


def test_every_text_within_is_looked_at_and_all_else_is_as_it_was() -> None:
    found = redacted(_Nested("a", rows=({"k": [f"<{CANARY}>", "b"]},)))
    assert found == _Nested("a", rows=({"k": ["<(MY_API_KEY)>", "b"]},))
    same = _Nested("a")
    assert redacted(same) is same


def test_a_secret_is_not_written_down_in_the_first_place(tmp_path: Path) -> None:
    """A shell of the next morning, which does not know it, could not take it out any more."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    reason = f"ConnectionError: https://api?key={CANARY}"
    run.set_status(Status("running").over("failed", "exception", reason))
    run.log(f"failed: {reason}")
    record_event(run.path, "ended", reason=reason)
    assert run.status().exit_reason == "ConnectionError: https://api?key=(MY_API_KEY)"
    assert run.log_file.read_text() == "failed: ConnectionError: https://api?key=(MY_API_KEY)\n"
    assert events(run.path)[0]["reason"] == run.status().exit_reason
    assert not [file for file in run.path.iterdir() if "canary" in file.read_text()]


def test_a_stream_passes_on_all_but_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Redacted(sys.stdout)
    print(f"Loaded credentials {CANARY}", file=stream, flush=True)
    stream.writelines(["a\n", f"{CANARY}\n"])
    assert capsys.readouterr().out == "Loaded credentials (MY_API_KEY)\na\n(MY_API_KEY)\n"
    assert stream.encoding == sys.stdout.encoding
