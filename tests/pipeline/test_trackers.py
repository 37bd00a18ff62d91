"""Trackers follow a run in processes of their own: what they hold is the run's metrics, each row once, and
nothing that becomes of them reaches the run: neither its figures nor its end.
"""

from __future__ import annotations

import fcntl
import http.server
import importlib.util
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_vla.operations.trackers.base import TRACKERS, Entry, flat
from salt_vla.operations.trackers.journal import Mirror
from salt_vla.rundir import RunDirectory

SECONDS = 60.0  # As long as may be waited for other processes on a busy machine.
KEY = "canary" + 34 * "0"  # As long as wandb wants one.
SECRETS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_canary1",
    "TRACKIO_WRITE_TOKEN": "canary2",
    "AWS_SECRET_ACCESS_KEY": "canary3",
}

needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(entry.package) is None, reason=f"{name} is not installed: {entry.install}"
    )
    for name, entry in TRACKERS.items()
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no settings of the person who runs the tests; what was started here ends with the test."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    yield
    for process in processes_of(tmp_path):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def processes_of(root: Path) -> list[psutil.Process]:
    """Those with the root in their environment: keepers, senders, and what trackers start."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get("SALT_VLA_ROOT") == str(root) and process.pid != os.getpid()
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(holds: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if found := holds():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {SECONDS:g} s")


def all_sent(run: RunDirectory, tracker: str) -> Mirror:
    mirror = Mirror(run, tracker)
    wait_for(
        lambda: mirror.place_file.exists() and mirror.place().is_closed and not mirror.left(),
        f"{tracker} holds all of {run.name}",
    )
    return mirror


def scalars(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def shown(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What it should show."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.metrics():
        for tag, value in flat(row).items():
            if isinstance(value, int | float):
                found.setdefault(tag, []).append((row["step"], value))
    return found


def wandb_records(file: Path) -> Iterator[bytes]:
    """What one of wandb's files holds: LevelDB's log format behind a head of 7 bytes. Blocks of 32 KiB hold
    pieces with a checksum (4 bytes), a length (2) and a kind: 1 whole, 2 first, 3 middle, 4 last."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history(run: RunDirectory) -> list[dict[str, Any]]:
    """What wandb's own files hold of a run that was mirrored offline, in the order of their folders."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


# What they hold


@needs["tensorboard"]
def test_tensorboard_shows_every_row_of_a_run_that_was_killed_and_resumed(
    salt: Any, student: Callable[..., list[object]]
) -> None:
    process = salt.start(*student("a", "--track", "tensorboard"))
    run = salt.at("a")
    wait_for(lambda: run.metrics_file.exists() and len(run.metrics()) > 5, "some rows")
    process.send_signal(signal.SIGKILL)
    process.wait()
    all_sent(run, "tensorboard")
    before = Mirror(run, "tensorboard").place().identifier
    salt.ok(*student("a", "--track", "tensorboard"))
    mirror = all_sent(run, "tensorboard")
    assert mirror.place().identifier == before
    there, wanted = scalars(run), shown(run)
    assert set(there) == set(wanted) and "train/loss" in wanted and "val/r2_position_mean" in wanted
    for tag in ("train/loss", "val/loss", "val/r2_position_mean"):
        assert [step for step, _ in there[tag]] == [step for step, _ in wanted[tag]]
        assert [value for _, value in there[tag]] == pytest.approx([value for _, value in wanted[tag]])


@needs["tensorboard"]
def test_tensorboard_drops_what_a_rollback_took_back_and_has_the_settings(
    salt: Any, student: Callable[..., list[object]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    salt.ok(*student("a", "--max-steps", 6))
    run = salt.at("a")
    salt.ok("runs", "sync", "a", "--tracker", "tensorboard")
    rows = run.metrics()
    run.trim_metrics(2)
    for row in rows:
        if row["step"] > 2:
            run.log_metrics(row | {"loss": row["loss"] + 1})
    assert salt.json("runs", "sync")[0] | {"destination": ""} == {
        "run": "a",
        "tracker": "tensorboard",
        "outcome": "sent",
        "left": 0,
        "destination": "",
        "why": "",
    }
    there, wanted = scalars(run)["train/loss"], shown(run)["train/loss"]
    assert [step for step, _ in there] == [step for step, _ in wanted]
    assert [value for _, value in there] == pytest.approx([value for _, value in wanted])
    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    (config,) = (json.loads(event.tensor_proto.string_val[0]) for event in read.Tensors("config"))
    assert config == json.loads(run.config_file.read_text())


@needs["wandb"]
def test_wandb_offline_holds_every_row_once_under_one_name(
    salt: Any, student: Callable[..., list[object]]
) -> None:
    for steps in (4, 8, 12):  # Ended twice, and resumed.
        salt.ok(*student("a", "--max-steps", steps, "--track", "wandb"))
        all_sent(salt.at("a"), "wandb")
    run = salt.at("a")
    rows, there = run.metrics(), history(run)
    assert [row["_step"] for row in there] == list(range(len(rows)))
    for row, found in zip(rows, there, strict=True):
        assert found["step"] == row["step"]
        assert {name: found[name] for name in flat(row)} == flat(row)
    folders = {path.name.rsplit("-", 1)[1] for path in run.path.glob("wandb/offline-run-*")}
    assert folders == {Mirror(run, "wandb").place().identifier}


@needs["trackio"]
def test_trackio_holds_every_row_once(salt: Any, student: Callable[..., list[object]]) -> None:
    import sqlite3

    for steps in (4, 8):
        salt.ok(*student("a", "--max-steps", steps, "--track", "trackio"))
        all_sent(salt.at("a"), "trackio")
    run = salt.at("a")
    (file,) = (salt.root / "trackio").glob("salt-vla*.db")
    with closing(sqlite3.connect(file)) as database:
        found = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    rows = run.metrics()
    assert [step for step, _ in found] == [row["step"] for row in rows]
    for row, (_, text) in zip(rows, found, strict=True):
        assert flat(row).items() <= json.loads(text).items()


# What becomes of the run


def silent_server(stack: ExitStack) -> int:
    """Accepts, and never answers."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    kept: list[socket.socket] = []
    stack.callback(lambda: [one.close() for one in kept])

    def accept() -> None:
        with suppress(OSError):
            while True:
                kept.append(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


class _Broken(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output is its own."""


def broken_server(stack: ExitStack) -> int:
    """Answers 500, whatever it is asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def nobody(stack: ExitStack) -> int:
    """Where nobody listens: connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


SERVERS = (silent_server, broken_server, nobody)


@needs["wandb"]
@pytest.mark.parametrize("server", SERVERS, ids=[server.__name__ for server in SERVERS])
def test_no_server_changes_a_run_or_its_end(
    server: Callable[[ExitStack], int],
    salt: Any,
    student: Callable[..., list[object]],
    curve: Callable[[RunDirectory], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    times: Callable[[int, int], int],
) -> None:
    if server in SERVERS[times(1, len(SERVERS)) :]:
        pytest.skip("the worst of them stands for the others; --torture has all")
    with ExitStack() as stack:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server(stack)}")
        salt.ok(*student("plain", "--max-steps", 8))
        answer = salt(*student("a", "--max-steps", 8, "--track", "wandb"))
        run, mirror = salt.at("a"), Mirror(salt.at("a"), "wandb")
        assert answer.code == 0 and run.status().state == "finished", answer.err
        assert curve(run) == curve(salt.at("plain"))
        assert mirror.left() == len(run.metrics())
        # Its keeper still tries, apart from the run. When it goes, everything waits for `runs sync`.
        keeper = wait_for(lambda: processes_of(salt.root), "a keeper")[0]
        keeper.terminate()
        wait_for(lambda: not processes_of(salt.root), "nothing is left of it")
        given_up = salt("runs", "sync", "a", "--tracker", "wandb", "--patience", 2, "--json")
        assert given_up.code == 1
        (row,) = json.loads(given_up.out)
        assert (row["outcome"], row["left"]) == ("given up", len(run.metrics()))
        assert "`salt-vla runs sync a --tracker wandb` sends them" in mirror.log_file.read_text()
        wait_for(lambda: not processes_of(salt.root), "nothing is left of the sending")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (row,) = salt.json("runs", "sync")
    assert (row["run"], row["tracker"], row["outcome"], row["left"]) == ("a", "wandb", "sent", 0)
    assert len(history(run)) == len(run.metrics())


@needs["tensorboard"]
def test_a_run_that_fails_before_its_first_row_has_no_page(
    salt: Any, student: Callable[..., list[object]]
) -> None:
    answer = salt(*student("a", "--track", "tensorboard", batch_size=10_000_000))
    assert answer.code == 2
    wait_for(lambda: not processes_of(salt.root), "the keeper has ended")
    assert not (salt.at("a").path / "tensorboard").exists()


def test_what_is_no_tracker_or_not_installed_is_said_before_the_run_begins(
    salt: Any, student: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "absent", Entry("x:y", "salt_vla_has_no_such_package", "pip install x"))
    for more in ((), ("--detach",)):
        answer = salt(*student("a", "--track", "absent", *more))
        assert answer.sentence == "the tracker absent is not installed; install it with: pip install x"
        answer = salt(*student("a", "--track", "mlflow", *more))
        assert (
            answer.sentence == "there is no tracker 'mlflow'; trackers: tensorboard, trackio, wandb, absent"
        )
    assert not salt.at("a").path.exists()


@needs["tensorboard"]
def test_a_plan_with_a_tracker_starts_none(salt: Any, student: Callable[..., list[object]]) -> None:
    salt.ok(*student("a", "--plan", "--track", "tensorboard"))
    assert not salt.at("a").path.exists() and not processes_of(salt.root)


# runs sync


@needs["tensorboard"]
def test_one_keeper_a_run_and_tracker(salt: Any, student: Callable[..., list[object]]) -> None:
    salt.ok(*student("a", "--max-steps", 4))
    mirror = Mirror(salt.at("a"), "tensorboard")
    with mirror.lock_file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = salt("runs", "sync", "a", "--tracker", "tensorboard", "--json")
    assert answer.code == 1 and json.loads(answer.out)[0]["outcome"] == "busy"
    assert not mirror.journal_file.exists()
    assert salt.json("runs", "sync", "a", "--tracker", "tensorboard")[0]["outcome"] == "sent"


@needs["tensorboard"]
def test_one_damaged_run_hides_no_other(salt: Any, student: Callable[..., list[object]]) -> None:
    for name in ("a", "b"):
        salt.ok(*student(name, "--max-steps", 4))
    Mirror(salt.at("a"), "tensorboard").place_file.write_text("{")
    answer = salt("runs", "sync", "--tracker", "tensorboard", "--json")
    bad, good = json.loads(answer.out)
    assert answer.code == 1 and (good["run"], good["outcome"]) == ("b", "sent")
    assert bad["outcome"] == "failed" and "remove it, and everything is sent again" in bad["why"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere",), "there is no run at"),
        (("../x",), "run name '../x' may hold only"),
        (("--patience", "-1"), "--patience must be a number of seconds from 0 on"),
        (("--tracker", "x"), "there is no tracker 'x'"),
        (("a", "--tracker", "tensorboard", "--follow", "--beside", "{}"), "--beside is for the processes of"),
    ],
)
@needs["tensorboard"]
def test_bad_input_is_a_sentence(args: tuple[str, ...], said: str, salt: Any) -> None:
    assert said in salt("runs", "sync", *args).sentence


def test_without_a_tracked_run_it_says_how_to_have_one(salt: Any) -> None:
    assert "`salt-vla runs sync NAME --tracker wandb`" in salt.ok("runs", "sync").out


# Secrets


@needs["wandb"]
@needs["tensorboard"]
def test_no_secret_is_in_any_file_of_a_run_that_was_launched_and_tracked(
    salt: Any, student: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    trackers = ("--track", "wandb", "--track", "tensorboard")
    salt.ok(*student("a", "--max-steps", 4, "--detach", *trackers))
    run = salt.at("a")
    for tracker in ("wandb", "tensorboard"):
        all_sent(run, tracker)
    wait_for(lambda: not processes_of(salt.root), "all of its processes have ended")
    assert run.status().state == "finished"
    salt("runs", "report")
    files = [path for path in salt.root.rglob("*") if path.is_file()]
    assert {"launch.json", "supervision.json", "tracker_wandb.log", "log.txt"} <= {f.name for f in files}
    leaks = [
        f"{path}: {name}"
        for path in files
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes()
    ]
    assert not leaks, leaks
