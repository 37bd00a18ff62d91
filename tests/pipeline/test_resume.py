"""Whatever interrupts a run, the same command goes on from its last checkpoint and computes the same bits."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

Command = Callable[..., list[object]]


def wait_for(condition: Callable[[], Any], process: Popen[str]) -> None:
    """Until `condition` holds, or the process has ended before it did."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def repeated(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    counts = Counter((row["kind"], row["step"]) for row in rows)
    return [key for key, count in counts.items() if count > 1]


def test_a_run_in_two_parts_is_bitwise_the_run_in_one(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    salt.ok(*student("whole", "--max-steps", 8))
    salt.ok(*student("parts", "--max-steps", 4))
    shown = salt.json("runs", "show", "parts")
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 4, [])
    second = salt.run(*student("parts", "--max-steps", 8))
    assert second.code == 0, second.err
    shown = salt.json("runs", "show", "parts")
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 8, [4])
    whole, parts = salt.at("whole"), salt.at("parts")
    assert curve(whole) == curve(parts)
    assert not repeated(parts.metrics())
    assert weights(whole) == weights(parts)
    assert whole.config_file.read_bytes() == parts.config_file.read_bytes()


def test_a_finished_run_is_not_run_again(salt: Any, pixels: Command, weights: Any) -> None:
    salt.ok(*pixels("run", "--max-steps", 4))
    run = salt.at("run")
    before = (run.metrics(), weights(run))
    times = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    for steps in (4, 3):
        salt.ok(*pixels("run", "--max-steps", steps))
        assert (run.metrics(), weights(run)) == before
        assert times == {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
        assert (run.status().step, run.status().resumed_from) == (4, [])


def test_killed_at_any_step_the_run_ends_in_the_same_bits(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    steps, settings = 60, {"runtime__checkpoint_every": 3, "steps": 80}
    salt.ok(*student("whole", "--max-steps", steps, **settings))
    run = salt.at("killed")
    chosen = random.Random(0)
    for at_least in (2, 8, 15):
        process = salt.start(*student("killed", "--max-steps", steps, **settings))
        goal = at_least + chosen.randrange(5)
        wait_for(lambda goal=goal: run.metrics_file.exists() and len(run.metrics("train")) >= goal, process)
        process.kill()
        process.wait()
        shown = salt.json("runs", "show", "killed")
        assert (shown["state"], shown["pid"]) == ("killed", process.pid)
        assert "killed" in shown["exit_reason"]
    salt.ok(*student("killed", "--max-steps", steps, **settings))
    whole = salt.at("whole")
    assert curve(whole) == curve(run)
    assert not repeated(run.metrics())
    assert weights(whole) == weights(run)
    resumed = run.status().resumed_from
    # The validation every four steps leaves a checkpoint where it is the best so far.
    assert resumed and resumed == sorted(resumed) and all(step % 3 == 0 or step % 4 == 0 for step in resumed)
    assert not list(run.path.rglob("*.part")) and not list(run.checkpoints.glob(".writing-*"))


def test_killed_before_its_first_checkpoint_it_begins_again(
    salt: Any, pixels: Command, curve: Any, weights: Any
) -> None:
    """Whether or not the configuration had been written."""
    settings = {"runtime__checkpoint_every": 1000, "runtime__validate_every": 1000, "steps": 1000}
    salt.ok(*pixels("whole", "--max-steps", 6, **settings))
    run = salt.at("run")
    for begun in (run.path / "status.json", run.metrics_file):
        process = salt.start(*pixels("run", **settings))
        wait_for(begun.exists, process)
        process.kill()
        process.wait()
        shown = salt.json("runs", "show", "run")
        assert (shown["state"], shown["step"]) == ("killed", 0)
    salt.ok(*pixels("run", "--max-steps", 6, **settings))
    assert curve(salt.at("whole")) == curve(run)
    assert weights(salt.at("whole")) == weights(run)
    assert run.status().resumed_from == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_writes_a_checkpoint_and_says_so(
    salt: Any, pixels: Command, curve: Any, sent: signal.Signals, code: int
) -> None:
    """And while it lives, nobody else may work on it."""
    settings = {"runtime__checkpoint_every": 10_000, "steps": 100_000, "runtime__validate_every": 10_000}
    run = salt.at("run")
    process = salt.start(*pixels("run", **settings))
    wait_for(lambda: run.metrics_file.exists() and len(run.metrics("train")) >= 3, process)
    log = run.log_file.read_bytes()
    refused = salt(*pixels("run", **settings)).sentence
    assert refused == f"run 'run' is being worked on by process {process.pid}; stop it first"
    assert run.log_file.read_bytes().startswith(log) and refused not in run.log_file.read_text()
    assert salt.json("runs", "show", "run")["state"] == "running"
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {sent.name} at step" in said and "Traceback" not in said
    shown = salt.json("runs", "show", "run")
    assert shown["state"] == "stopped" and sent.name in shown["exit_reason"]
    step = shown["step"]
    assert step >= 3 and [path.name for path in run.checkpoints.iterdir()] == [f"step_{step:08d}"]
    salt.ok(*pixels("run", "--max-steps", step + 2, **settings))
    shown = salt.json("runs", "show", "run")
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", step + 2, [step])
    assert [row["step"] for row in run.metrics("train")] == list(range(1, step + 3))


def test_a_damaged_checkpoint_is_a_sentence(salt: Any, pixels: Command) -> None:
    salt.ok(*pixels("run", "--max-steps", 2))
    weights_file = salt.at("run").checkpoints / "step_00000002" / "encoder.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    said = salt(*pixels("run", "--max-steps", 4)).sentence
    assert str(weights_file) in said
    assert salt.at("run").status().state == "failed"


def test_a_damaged_configuration_is_a_sentence(salt: Any, pixels: Command, tmp_path: Path) -> None:
    salt.ok(*pixels("run", "--max-steps", 1))
    file = salt.at("run").config_file
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"batch_size": "four"}))
    assert f"{file}.batch_size must be int" in salt(*pixels("run", "--max-steps", 2)).sentence
    file.write_text("{")
    assert str(file) in salt(*pixels("run", "--max-steps", 2)).sentence
