"""What the dashboard answers over HTTP: to its own page everything, to nobody else anything."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_vla.operations.queue import Queue

pytest.importorskip("dash", reason="the extra `dashboard` is not installed")
pytest.importorskip("dash_ag_grid", reason="the extra `dashboard` is not installed")

ADDRESS_ELSEWHERE = re.compile(rb"""(?:src|href)\s*=\s*["']?(?:https?:)?//""")
PATHS = ("/", "/runs", "/run/failed", "/_dash-layout", "/_dash-dependencies", "/picture/failed/masks.png")


@pytest.mark.parametrize("path", PATHS)
def test_its_own_page_is_answered(page: Any, path: str) -> None:
    status, headers, _ = page.ask("GET", path)
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", [*PATHS, "/_dash-update-component", "/assets/style.css", "/nothing"])
@pytest.mark.parametrize(
    "header", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}]
)
def test_every_address_is_guarded(page: Any, path: str, header: dict[str, str]) -> None:
    for method in ("GET", "POST"):
        status, _, body = page.ask(method, path, {} if method == "POST" else None, **header)
        assert status == 403 and body.startswith(b"salt-vla dashboard: ")


def test_no_script_comes_from_elsewhere(page: Any) -> None:
    html = page.ask("GET", "/")[2]
    assert not ADDRESS_ELSEWHERE.search(html)
    scripts = re.findall(rb'src="([^"]+)"', html)
    assert len(scripts) >= 5
    for script in scripts:
        assert page.ask("GET", script.decode())[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/picture/../secret.png",
        "/picture/failed/../../../secret.png",
        "/picture/%2e%2e/secret.png",
        "/picture/failed/..%2f..%2f..%2fsecret.png",
        "/picture/failed/%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret.png",
        "/picture/failed//etc/passwd",
        "/picture/failed/linked.png",
        "/picture/failed/config.json",
        "/picture/failed/.png",
        "/picture/nobody/masks.png",
        "/picture/failed/masks.png%00",
        "/assets/../app.py",
        "/assets/%2e%2e/app.py",
        "/assets/..%2fserver.py",
        "/_dash-component-suites/dash/../../../../../../etc/passwd",
        "/_dash-component-suites/salt_vla/rundir.py",
        "/static/style.css",
    ],
)
def test_no_file_but_pictures_of_runs_is_given(page: Any, path: str) -> None:
    status, headers, body = page.ask("GET", path)
    # What is no file's address is the page's own: every address is one for its visitor.
    is_the_page = headers["Content-Type"].startswith("text/html") and b"_dash-config" in body
    assert status in (400, 404, 500) or is_the_page
    for secret in (b"not for you", b"root:", b"import annotations", b"vit_base"):
        assert secret not in body


def test_a_picture_is_a_picture(page: Any) -> None:
    status, headers, body = page.ask("GET", "/picture/failed/masks.png")
    assert status == 200 and headers["Content-Type"] == "image/png" and body.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["../../etc", "%2e%2e%2fx", "a/b", "nobody", "x" * 5000, "%00", "<b>"])
def test_a_name_in_an_address_stays_below_the_root(page: Any, name: str) -> None:
    status, said = page.call("run-state.children", 0, f"/run/{name}", None)
    assert status == 200
    text = json.dumps(said)
    assert "no run at" in text or "run name" in text or said == {}


def test_one_run_is_shown_with_its_reason_and_its_log(page: Any, evil: str) -> None:
    status, said = page.call("run-state.children", 0, "/run/failed", None)
    assert status == 200
    text = {part: json.dumps(value["children"]) for part, value in said.items() if "children" in value}
    reason = json.dumps(f"RuntimeError: {evil}")
    assert reason in text["run-state"] and "failed" in text["run-state"]
    assert json.dumps(evil)[1:-1] in text["run-log"]
    assert "/picture/failed/masks.png?" in text["run-pictures"] and "linked" not in text["run-pictures"]
    assert "optimizer.lr" in text["run-settings"]
    attempts = text["run-attempts"]
    assert "killed by SIGSEGV" in attempts and "exit code 1" in attempts and "started again" in attempts
    alone = json.dumps(page.call("run-state.children", 0, "/run/finished", None)[1]["run-attempts"])
    assert "Not started under a supervisor" in alone


def test_what_has_not_changed_is_not_sent_again(page: Any) -> None:
    seen = page.call("run-state.children", 0, "/run/failed", None)[1]["run-seen"]["data"]
    assert page.call("run-state.children", 1, "/run/failed", seen) == (200, {})
    mark = page.call("runs-table.rowData", 0, False, None)[1]["runs-mark"]["data"]
    again = page.call("runs-table.rowData", 1, False, mark)[1]
    assert "runs-table" not in again


def test_parts_that_nobody_sees_read_nothing(page: Any) -> None:
    hidden = {"runs-table.rowData": (0, True, None), "queue-table.rowData": (0, True, None)}
    hidden |= {"caches-table.rowData": (0, True)}
    for output, values in hidden.items():
        assert page.call(output, *values)[1] in ({}, b"")


def test_all_runs_are_listed_and_curves_are_drawn(page: Any) -> None:
    rows = page.call("runs-table.rowData", 0, False, None)[1]["runs-table"]["rowData"]
    assert {row["name"]: row["state"] for row in rows} == {
        "failed": "failed", "finished": "finished", "at_work": "running",
    }  # fmt: skip
    look = (["train.loss", "val.r2_position_mean"], "clips", [], 0.5)
    drawn = page.call("runs-graph.figure", 0, ["finished", "failed"], False, *look, None)[1]
    traces = drawn["runs-graph"]["figure"]["data"]
    assert {trace["name"] for trace in traces} == {"finished", "failed"}
    assert max(max(trace["x"]) for trace in traces) == 100 * 32


@pytest.mark.parametrize(
    "look",
    [
        (None, None, None, None),
        ([], "step", [], -1),
        ("train.loss", "sideways", "log", "much"),
        ([{"a": 1}, "nothing", "a.b.c", "../../x.y"] * 9, ["step"], {}, 7),
    ],
)
def test_whatever_a_browser_sends_for_a_look_is_drawn(page: Any, look: tuple[Any, ...]) -> None:
    status, said = page.call("runs-graph.figure", 0, ["finished", "../failed", {}, 7], False, *look, None)
    assert status == 200 and {t["name"] for t in said["runs-graph"]["figure"]["data"]} <= {"finished"}


def test_a_part_that_fails_says_so_on_the_page(page: Any) -> None:
    status, said = page.call("chosen.data", [7], [])
    assert status == 200 and "chosen" not in said
    assert "not up to date (TypeError" in said["trouble"]["children"]


def test_runs_are_compared(page: Any) -> None:
    values = (0, ["finished", "failed"], "val.r2_position_mean", False, None)
    status, said = page.call("compare-answer.children", *values)
    text = json.dumps(said["compare-answer"]["children"])
    assert status == 200 and "at equal clips" in text and "mean of the last 100 lines" in text
    gone = page.call("compare-answer.children", 0, ["finished", "nobody"], "val.loss", False, None)[1]
    assert "there is no run" in gone["compare-answer"]["children"]


def test_the_queue_is_shown_with_what_it_waits_for(page: Any, traps: Path) -> None:
    said = page.call("queue-table.rowData", 0, False, None)[1]
    rows = {row["name"]: row for row in said["queue-table"]["rowData"]}
    assert {"first", "second"} <= set(rows)
    assert "no runner at work" in said["queue-about"]["children"]
    assert "added" in json.dumps(said["queue-history"]["children"])


def test_caches_are_shown_with_what_they_lack(page: Any, evil: str) -> None:
    (row,) = page.call("caches-table.rowData", 0, False)[1]["caches-table"]["rowData"]
    assert (row["path"], row["complete"], row["quarantined"]) == ("caches/good", "complete", 1)
    assert row["teacher"] == evil
    shown = page.call("caches-manifest.children", [row])[1]
    assert "provenance.teacher" in json.dumps(shown)
    for path in ("../secret", "/etc", "runs/failed", "caches/none", 7):
        other = page.call("caches-manifest.children", [{"path": path}])[1]
        assert "provenance" not in json.dumps(other)


@pytest.mark.parametrize("given", ["", "wrong", None])
def test_nothing_is_changed_without_the_token(acting_page: Any, traps: Path, given: str | None) -> None:
    before = [(job.name, job.state) for job in Queue(traps / "queue.db").jobs()]
    clicks = (1, 0, 0, 0, 0, 0)
    said = acting_page.call("queue-answer.children", *clicks, [{"name": "first"}], given)[1]
    assert "token" in said["queue-answer"]["children"]
    stop = acting_page.call("run-answer.children", 1, "/run/at_work", given)[1]
    assert "token" in stop["run-answer"]["children"]
    assert [(job.name, job.state) for job in Queue(traps / "queue.db").jobs()] == before


def test_a_page_without_token_changes_nothing(page: Any, traps: Path, token: str) -> None:
    said = page.call("queue-answer.children", 1, 0, 0, 0, 0, 0, [{"name": "first"}], token)[1]
    assert "only shows" in said["queue-answer"]["children"]
    assert Queue(traps / "queue.db").job("first").state == "waiting"


def test_with_the_token_the_queue_is_changed(acting_page: Any, traps: Path, token: str) -> None:
    def press(button: str, job: str) -> str:
        names = ["cancel", "first", "last", "retry", "hold", "release"]
        body = [int(name == button) for name in names]
        known = names.index(button)
        return str(_pressed(acting_page, body, known, job, token))

    queue = Queue(traps / "queue.db")
    assert "second" in press("first", "second")
    assert [job.name for job in queue.jobs() if job.state == "waiting"] == ["second", "first"]
    press("hold", "second")
    assert queue.job("second").held
    press("release", "second")
    press("cancel", "second")
    assert queue.job("second").state == "cancelled"
    press("retry", "second")
    assert queue.job("second").state == "waiting"
    assert "no job" in press("first", "nobody")


def _pressed(page: Any, clicks: list[int], which: int, job: str, token: str) -> str:
    """A press of one of the buttons that share a callback."""
    known = json.loads(page.ask("GET", "/_dash-dependencies")[2])
    (callback,) = [each for each in known if each["output"] == "queue-answer.children"]
    inputs = [each | {"value": n} for each, n in zip(callback["inputs"], clicks, strict=True)]
    values = ([{"name": job}], token)
    state = [each | {"value": value} for each, value in zip(callback["state"], values, strict=True)]
    body = {
        "output": "queue-answer.children",
        "outputs": {"id": "queue-answer", "property": "children"},
        "inputs": inputs,
        "state": state,
        "changedPropIds": [f"{inputs[which]['id']}.n_clicks"],
    }
    status, _, answer = page.ask("POST", "/_dash-update-component", body)
    assert status == 200
    return str(json.loads(answer)["response"]["queue-answer"]["children"])


def test_stopping_what_does_not_work_is_a_sentence(acting_page: Any, token: str) -> None:
    for path in ("/run/finished", "/run/nobody", "/run/..%2f..%2fx", "/queue"):
        said = acting_page.call("run-answer.children", 1, path, token)[1]["run-answer"]["children"]
        assert said and "asked" not in said and "Traceback" not in said


def test_a_run_is_stopped_with_the_token_alone(
    open_page: Callable[..., Any], salt: Any, pixels: Callable[..., list[object]], token: str
) -> None:
    process = salt.start(*pixels("going", steps=100_000))
    run = salt.at("going")
    page = open_page(salt.root, "--token", SALT_VLA_DASHBOARD_TOKEN=token)
    until = time.monotonic() + 120
    while not run.metrics() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert run.status().state == "running"
    page.call("run-answer.children", 1, "/run/going", "wrong")
    assert not list(run.path.glob("asked*")) and run.status().state == "running"
    page.call("run-answer.children", 1, "/run/going", token)
    process.communicate(timeout=120)
    status = run.status()
    assert status.state == "stopped" and status.step > 0
    seen = json.dumps(page.call("run-state.children", 0, "/run/going", None)[1]["run-state"])
    assert "stopped" in seen


def test_it_answers_this_machine_alone(page: Any) -> None:
    listening = [
        each.laddr.ip
        for each in psutil.Process(page.process.pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_the_server_needs_no_torch(page: Any) -> None:
    page.call("compare-answer.children", 0, ["finished", "failed"], "val.loss", False, None)
    maps = Path(f"/proc/{page.process.pid}/maps").read_text()
    assert "libtorch" not in maps and "numpy" in maps


def test_a_taken_port_is_a_sentence(salt: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert str(port) in salt("dashboard", "--port", port).sentence
    assert "port 70000" in salt("dashboard", "--port", 70000).sentence


def test_ctrl_c_ends_it_cleanly(open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page(tmp_path)
    assert page.ask("GET", "/")[0] == 200
    page.process.send_signal(signal.SIGINT)
    out, err = page.process.communicate(timeout=60)
    assert page.process.returncode == 0 and out.endswith("dashboard: ended\n") and err == ""
    assert not list(tmp_path.iterdir())  # To look leaves nothing.


def test_the_token_is_said_once_and_never_again(
    open_page: Callable[..., Any], tmp_path: Path, token: str
) -> None:
    page = open_page(tmp_path, "--token")
    line = page.process.stdout.readline()
    made = line.split()[-1]
    assert line.startswith("dashboard: the token") and len(made) >= 32
    stop = page.call("run-answer.children", 1, "/run/nobody", made)[1]["run-answer"]["children"]
    assert "no run or job" in stop
    layout = b"".join(page.ask("GET", path)[2] for path in ("/", "/_dash-layout", "/_dash-dependencies"))
    out, err = page.stop()
    assert made.encode() not in layout and made not in out + err
    given = open_page(tmp_path, "--token", SALT_VLA_DASHBOARD_TOKEN=token)
    given.call("run-answer.children", 1, "/run/nobody", token)
    out, err = given.stop()
    assert token not in given.greeting + out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--host", "0.0.0.0"), "ssh -L"), (("--token",), "SALT_VLA_DASHBOARD_TOKEN")],
)
def test_unsafe_wishes_are_refused(
    salt: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.setenv("SALT_VLA_DASHBOARD_TOKEN", "short")
    assert words in salt("dashboard", *arguments).sentence


def test_without_the_extra_it_says_how_to_get_it(salt: Any, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['dash'] = None; from salt_vla.cli import main; sys.exit(main())"
    process = salt.start_python(hidden, "dashboard", "--port", 0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "salt-vla[dashboard]" in err and "Traceback" not in err
    assert sys.modules.get("dash") is not None
