"""Several processes train one run: the same curve as one, one writer, one sentence, and any end in common.

Real processes, talking by gloo. torchrun starts some of them; the others are forked, with torchrun's
variables, by a process that has only imported, since the imports take longer than the runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_vla.rundir import RunDirectory

Command = Callable[..., list[object]]
TOLERANCE = 1e-5  # of a figure, relative to the largest of its column; see docs/howto/several-gpus.md
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FORKING = """
import json, os, runpy, sys
import torch, torch.distributed.fsdp, torch.distributed.tensor, torch.nn.parallel
import salt_vla.cli.train, salt_vla.jobs.train

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        os.environ.update(asked["variables"])
        for number, path in ((1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.setpgid(0, 0)
        sys.argv = ["salt-vla", *asked["arguments"]]
        runpy.run_module("salt_vla", run_name="__main__", alter_sys=True)
    print(child, flush=True)
"""


class Ranks:
    """The processes of one start of the command line, by rank."""

    def __init__(self, parent: subprocess.Popen[str], root: Path, size: int, arguments: list[str]) -> None:
        self.parent, self.folder, self.size = parent, root, size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name = f"ranks-{port}"
        self.pids = []
        for rank in range(size):
            variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SALT_VLA_ROOT": root}
            asked = {"variables": {k: str(v) for k, v in variables.items()}, "arguments": arguments}
            self.pids.append(
                self._ask(asked | {"out": self._file(rank, "out"), "err": self._file(rank, "err")})
            )

    def _file(self, rank: int, kind: str) -> str:
        return str(self.folder / f"{self.name}.{rank}.{kind}")

    def _ask(self, asked: dict[str, Any]) -> int:
        assert self.parent.stdin is not None and self.parent.stdout is not None
        print(json.dumps(asked), file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline())

    def end(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [self._ask({"wait": pid}) for pid in self.pids]

    def said(self, rank: int, kind: str = "err") -> str:
        return Path(self._file(rank, kind)).read_text()


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FORKING]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    yield process
    with process:
        process.kill()


@pytest.fixture
def ranks(parent: subprocess.Popen[str], salt: Any) -> Iterator[Callable[..., Ranks]]:
    """`ranks(*arguments, size=2)` starts the command line as that many processes, gone with the test."""
    started: list[Ranks] = []

    def start(*arguments: object, size: int = 2) -> Ranks:
        started.append(Ranks(parent, salt.root, size, [str(argument) for argument in arguments]))
        return started[-1]

    yield start
    for each in started:
        for pid in each.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def ok(ranks: Callable[..., Ranks]) -> Callable[..., Ranks]:
    """As `ranks`, to its good end."""

    def run(*arguments: object, size: int = 2) -> Ranks:
        started = ranks(*arguments, size=size)
        assert started.end() == [0] * size, started.said(0) + started.said(1)
        return started

    return run


@pytest.fixture
def alike(salt: Any, curve: Any) -> Callable[..., float]:
    """`alike("a", "b", since=0)`: how far the curves of two runs are apart, at most, relative to the largest
    figure of a column; both have the same rows, and one of each."""

    def compare(first: str, second: str, since: int = 0) -> float:
        one, other = ([row for row in curve(salt.at(run)) if row["step"] > since] for run in (first, second))
        keys = [[(row["kind"], row["step"], *row) for row in rows] for rows in (one, other)]
        assert keys[0] == keys[1] and max(Counter(keys[1]).values()) == 1
        worst = 0.0
        columns = {name for row in one for name in row if isinstance(row[name], float)}
        for name in columns - {"memory_gb", "clips_per_s", "data_wait_share"}:
            pairs = [(row[name], twin[name]) for row, twin in zip(one, other, strict=True) if name in row]
            scale = max(abs(value) for value, _ in pairs) or 1.0
            worst = max(worst, *(abs(a - b) / scale for a, b in pairs))
        return worst

    return compare


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def last_step(run: RunDirectory) -> int:
    return max((row["step"] for row in run.metrics("train")), default=0) if run.metrics_file.exists() else 0


def optimizer_files(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in max(run.checkpoints.glob("step_*")).glob("optimizer*"))


def test_torchrun_and_a_plain_start_are_the_same_command(
    salt: Any, student: Command, alike: Callable[..., float]
) -> None:
    salt.ok(*student("one", "--max-steps", 8))
    start = salt.start_command(
        [sys.executable, *TORCHRUN, "-m", "salt_vla"], *student("two", "--max-steps", 8)
    )
    out, err = start.communicate(timeout=300)
    assert start.returncode == 0, err
    assert out.count("two: finished at step 8") == 1 and "Traceback" not in err
    apart = alike("one", "two")
    print(f"relative difference at most {apart:.2g}")  # -rP shows it
    assert apart < TOLERANCE
    shown = salt.json("runs", "show", "two")
    assert (shown["state"], shown["step"]) == ("finished", 8)
    assert (salt.at("two").path / "log.txt").read_text().count("started") == 1
    assert optimizer_files(salt.at("two")) == ["optimizer.safetensors"]


def test_ctrl_c_under_torchrun_stops_all_with_a_checkpoint(salt: Any, student: Command) -> None:
    """The terminal sends it to all, and torchrun passes it on: the second is no second thought."""
    settings = {"steps": 4000, "runtime__checkpoint_every": 1000, "runtime__validate_every": 1000}
    program, run = [sys.executable, *TORCHRUN, "-m", "salt_vla"], salt.at("run")
    start = salt.start_command(program, *student("run", **settings), start_new_session=True)
    wait_for(lambda: last_step(run) >= 2 or start.poll() is not None, 300)
    os.killpg(start.pid, signal.SIGINT)
    for pid in psutil.Process(start.pid).children():  # torchrun gives each a session of its own.
        pid.send_signal(signal.SIGINT)
    _, err = start.communicate(timeout=300)
    said = [line for line in err.splitlines() if "salt-vla: " in line]
    assert len(said) == 1 and "stopped by SIGINT at step" in said[0], err
    assert run.status().state == "stopped"
    assert [path.name for path in run.checkpoints.glob("step_*")] == [f"step_{run.status().step:08d}"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compute_the_curve_of_one_and_twice_the_same_bits(
    salt: Any,
    student: Command,
    ok: Callable[..., Ranks],
    alike: Callable[..., float],
    curve: Any,
    weights: Any,
    parallel: str,
) -> None:
    """With everything on that counts over a batch: micro-batches, stochastic depth, an average of the
    weights, statistics that follow the run, the online probe; and more held-out clips than can be shared
    evenly."""
    settings = {
        "runtime__parallel": parallel,
        "grad_accum_steps": 2,
        "encoder__drop_path": 0.3,
        "encoder__grad_checkpointing": True,
        "optimizer__average": 0.9,
        "objective__targets": "centred",
        "objective__statistics": "running",
        "runtime__validation_clips": 9,
        "runtime__probe_every": 4,
        "runtime__probe_clips": 16,
    }
    salt.ok(*student("one", "--max-steps", 8, **settings))
    for name in ("two", "again"):
        ok(*student(name, "--max-steps", 8, **settings))
    apart = alike("one", "two")
    print(f"relative difference at most {apart:.2g}")  # -rP shows it
    assert apart < TOLERANCE
    two, again = salt.at("two"), salt.at("again")
    assert [row["step"] for row in two.metrics("probe")] == [0, 4, 8]
    assert curve(two) == curve(again)
    assert weights(two) == weights(again)
    if parallel == "fsdp":
        assert optimizer_files(two) == [f"optimizer-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    assert not list(two.checkpoints.glob(".writing-*"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(
    salt: Any, student: Command, ok: Callable[..., Ranks], alike: Callable[..., float], parallel: str
) -> None:
    """The next step of two after one, and of one after two, is that of a run which never changed."""
    settings = {"runtime__parallel": parallel, "optimizer__average": 0.9}
    salt.ok(*student("whole", "--max-steps", 8, **settings))
    ok(*student("fewer", "--max-steps", 4, **settings))
    salt.ok(*student("fewer", "--max-steps", 8, **settings))
    salt.ok(*student("more", "--max-steps", 4, **settings))
    ok(*student("more", "--max-steps", 8, **settings))
    for name in ("fewer", "more"):
        assert salt.at(name).status().resumed_from == [4]
        assert alike("whole", name) < TOLERANCE


def test_a_moving_average_of_shared_out_parameters_is_a_target(
    salt: Any, pixels: Command, ok: Callable[..., Ranks], alike: Callable[..., float]
) -> None:
    settings = {"target__provider": "ema", "objective__statistics": "running", "runtime__parallel": "fsdp"}
    salt.ok(*pixels("one", "--max-steps", 4, **settings))
    ok(*pixels("two", "--max-steps", 4, **settings))
    assert alike("one", "two") < TOLERANCE


def test_what_is_wrong_is_said_once_and_ends_all(
    salt: Any, student: Command, ranks: Callable[..., Ranks]
) -> None:
    started = ranks(*student("uneven", batch_size=6, grad_accum_steps=2))
    assert started.end() == [2, 2]
    assert started.said(0) == (
        "salt-vla: batch_size=6 cannot be shared out evenly among 2 processes with grad_accum_steps=2; "
        "choose a multiple of 4\n"
    )
    assert started.said(1) == started.said(0, "out") == started.said(1, "out") == ""
    assert not (salt.root / "runs" / "uneven").exists()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("sweep", "run", "demo_teacher", "steps=1,2", "--name", "s"), "a sweep runs in one process"),
        (("demo",), "the demo runs in one process"),
    ],
)
def test_commands_of_many_runs_are_refused_to_several_processes(
    salt: Any, ranks: Callable[..., Ranks], command: tuple[str, ...], sentence: str
) -> None:
    started = ranks(*command)
    assert started.end() == [2, 2]
    assert started.said(0).startswith(f"salt-vla: {sentence}; start it without torchrun")
    assert started.said(0).count("\n") == 1 and started.said(1) == ""
    assert not [path for path in salt.root.iterdir() if path.is_dir()]


def test_a_signal_to_one_stops_all_at_the_same_step(
    salt: Any, student: Command, ranks: Callable[..., Ranks], curve: Any
) -> None:
    settings = {"steps": 4000, "runtime__checkpoint_every": 1000, "runtime__validate_every": 1000}
    started, run = ranks(*student("run", **settings)), salt.at("run")
    wait_for(lambda: last_step(run) >= 2)
    os.kill(started.pids[1], signal.SIGTERM)
    assert started.end() == [128 + signal.SIGTERM] * 2
    step = last_step(run)
    assert started.said(0).splitlines()[-1] == (
        f"salt-vla: stopped by SIGTERM at step {step} of 4000; the same command goes on from there"
    )
    assert started.said(1) == ""
    assert (run.status().state, run.status().step) == ("stopped", step)
    assert [path.name for path in run.checkpoints.glob("step_*")] == [f"step_{step:08d}"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(
    salt: Any,
    student: Command,
    ranks: Callable[..., Ranks],
    ok: Callable[..., Ranks],
    curve: Any,
    victim: int,
) -> None:
    settings = {"runtime__parallel": "fsdp", "steps": 4000, "runtime__checkpoint_every": 3}
    started, run = ranks(*student("run", **settings)), salt.at("run")
    wait_for(lambda: last_step(run) >= 4)
    os.kill(started.pids[victim], signal.SIGKILL)
    codes = started.end()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2
    if victim:
        assert "another of this run's 2 processes has died without a word" in started.said(0)
        assert started.said(0).count("salt-vla: ") == 1 and "Traceback" not in started.said(0)
        assert run.status().state == "failed"
    else:
        assert "salt-vla: " not in started.said(1) and "Traceback" not in started.said(1)
        assert run.status().state == "killed"
    until = last_step(run) + 3
    ok(*student("run", "--max-steps", until, **settings))
    ok(*student("whole", "--max-steps", until, **settings))
    assert curve(run) == curve(salt.at("whole"))
