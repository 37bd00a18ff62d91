"""A dashboard as a process of its own, over a root whose words are traps, and ways to ask it."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Manifest, Record
from salt_vla.config import to_json
from salt_vla.identity import ProcessId, identity
from salt_vla.operations.launch import Attempt, Supervision, record, record_event
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.recipes import get_recipe
from salt_vla.reports.canvas import new_figure, to_png
from salt_vla.rundir import RunDirectory, Status

TOKEN = "a-token-of-this-test-alone"
EVIL = "<script>document.title='robbed'</script><img src=x onerror=\"document.title='robbed'\">"


class Page:
    """A running dashboard, asked as a browser would that sends what it is told to send."""

    def __init__(self, root: Path, *arguments: object, **environment: str) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "salt_vla", "dashboard", "--port", "0", *map(str, arguments)],
            env=os.environ | {"SALT_VLA_ROOT": str(root), "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.greeting = self.process.stdout.readline()
        assert self.greeting.startswith("dashboard: http://127.0.0.1:"), self.process.stderr.read()
        self.address = self.greeting.split()[1]
        self.host = self.address.removeprefix("http://")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        """(status, headers, body). Host and Origin are the page's own unless others are given."""
        connection = http.client.HTTPConnection("127.0.0.1", int(self.host.rpartition(":")[2]), timeout=60)
        own = {"Host": self.host} | ({"Origin": self.address} if method == "POST" else {})
        given = own | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, given | {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def call(self, output: str, *values: Any, **headers: str) -> tuple[int, Any]:
        """A callback, by the name of one of its outputs; `values` of its inputs, then states, in order."""
        known = json.loads(self.ask("GET", "/_dash-dependencies")[2])
        (callback,) = [each for each in known if output in _outputs(each)]
        wanted = [*callback["inputs"], *callback["state"]]
        given = [
            {name: each[name] for name in ("id", "property")} | {"value": value}
            for each, value in zip(wanted, values, strict=True)
        ]
        count = len(callback["inputs"])
        outputs = [dict(zip(("id", "property"), o.rsplit(".", 1), strict=True)) for o in _outputs(callback)]
        several = callback["output"].startswith("..")
        body = {
            "output": callback["output"],
            "outputs": outputs if several else outputs[0],
            "inputs": given[:count],
            "state": given[count:],
            "changedPropIds": [f"{given[0]['id']}.{given[0]['property']}"],
        }
        status, _, answer = self.ask("POST", "/_dash-update-component", body, **headers)
        if status != 200:
            return status, answer
        said = json.loads(answer)
        return status, said["response"] | said.get("sideUpdate", {})

    def stop(self) -> tuple[str, str]:
        """What it has said to the end, on stdout and stderr."""
        self.process.kill()
        return self.process.communicate()


def _outputs(callback: dict[str, Any]) -> list[str]:
    return [name.split("@")[0] for name in callback["output"].strip(".").split("...")]


def write_run(root: Path, name: str, steps: int = 60, **status: Any) -> RunDirectory:
    """As a training leaves it; its words are `EVIL`."""
    run = RunDirectory(root / "runs" / name)
    run.path.mkdir(parents=True)
    about = {"state": "failed", "step": steps, "total_steps": 100, "exit_reason": f"RuntimeError: {EVIL}"}
    run.set_status(Status(**about | status))
    run.config_file.write_text(to_json(get_recipe("exp1_higher_lr").config))
    recipe = {"name": EVIL, "parent": "", "hypothesis": EVIL, "target": "", "criterion": ""}
    noted = {"recipe": recipe | {"changed": [], "differs_from_parent": []}, "masks": {"summary": [EVIL]}}
    noted["cost"] = {"clips_a_step": 32, "flops_a_step": 1e12, "clips_an_epoch": 640}
    for file, content in noted.items():
        (run.path / f"{file}.json").write_text(json.dumps(content))
    for step in range(1, steps + 1):
        log_step(run, step)
    run.log(f"a line of the log {EVIL}")
    run.pictures.mkdir()
    (run.pictures / "masks.png").write_bytes(to_png(new_figure(1, 1)))
    return run


def supervised(run: RunDirectory) -> None:
    """As if two attempts had been made by processes that are gone."""
    gone = ProcessId(pid=1, started=1.0)
    attempts = (Attempt(gone, -11, f"killed by SIGSEGV {EVIL}", 1e9), Attempt(gone, 1, "exit code 1", 2e9))
    record(run.path, Supervision("token", "ended", gone, attempts))
    record_event(run.path, "started again", why=EVIL)


def log_step(run: RunDirectory, step: int) -> None:
    run.log_metrics({"kind": "train", "step": step, "loss": 10 + math.exp(-step / 30), "lr": 1e-3})
    if step % 10 == 0:
        run.log_metrics({"kind": "val", "step": step, "loss": 10.5, "r2_position_mean": step / 1000})


def write_cache(folder: Path) -> None:
    """Complete, with one record left out."""
    manifest = Manifest("latents", "float16", (3, 4), 1, 4, {"teacher": EVIL, "clip_table": "c"})
    keys = [(f"clip/{number}", 0) for number in range(6)]
    with CacheWriter(folder, manifest, [clip for clip, _ in keys]) as writer:
        for shard in writer.pending():
            good = {key: Record(key, np.zeros((3, 4), np.float32)) for key in shard.keys}
            bad = {key: Record(key, None, EVIL) for key in shard.keys if key == keys[0]}
            writer.write_shard(shard, [(good | bad)[key] for key in shard.keys])
        writer.finish()


@pytest.fixture(scope="package")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a failed run, a finished one and one at work (this process), a queue and a cache. Tests
    may add to the run at work, and change the queue."""
    root = tmp_path_factory.mktemp("traps")
    supervised(write_run(root, "failed"))
    write_run(root, "finished", steps=100, state="finished", exit_reason="finished")
    me = identity()
    at_work = {"pid": me.pid, "started": me.started, "boot": me.boot, "ticks": me.ticks, "exit_reason": ""}
    write_run(root, "at_work", state="running", **at_work)
    (root / "secret.png").write_bytes(b"\x89PNG not for you")
    (root / "runs" / "failed" / "pictures" / "linked.png").symlink_to(Path(__file__))
    queue = Queue(root / "queue.db")
    for name in ("first", "second"):
        queue.add(Wanted(("train", "demo_student", "--name", EVIL), str(root), name))
    write_cache(root / "caches" / "good")
    return root


@pytest.fixture(scope="package")
def page(traps: Path) -> Iterator[Page]:
    """One that only shows."""
    made = Page(traps)
    yield made
    made.stop()


@pytest.fixture(scope="package")
def acting_page(traps: Path) -> Iterator[Page]:
    """One that acts for whoever gives `TOKEN`."""
    made = Page(traps, "--token", SALT_VLA_DASHBOARD_TOKEN=TOKEN)
    yield made
    made.stop()


@pytest.fixture
def open_page() -> Iterator[Callable[..., Page]]:
    """`open_page(root, *arguments, **environment)`; it has ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(root: Path, *arguments: object, **environment: str) -> Page:
            made = Page(root, *arguments, **environment)
            stack.callback(made.stop)
            return made

        yield start


@pytest.fixture(scope="session")
def token() -> str:
    return TOKEN


@pytest.fixture(scope="session")
def evil() -> str:
    return EVIL


@pytest.fixture(scope="session")
def step_of() -> Callable[[RunDirectory, int], None]:
    """Write a step's lines of metrics."""
    return log_step
