"""A run's log and its exit reason, with real runs that end in every way there is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_vla import companion
from salt_vla.identity import identity
from salt_vla.operations.asked import ask

Command = Callable[..., list[object]]
LONG = {"runtime__checkpoint_every": 10_000, "steps": 100_000, "runtime__validate_every": 10_000}
CRASHES = """
import ctypes, os, signal, sys
import salt_vla.training.loop as loop
made = loop.train_step
def deep_inside(at):
    if at == 3:
        {code}
def train_step(*arguments):
    deep_inside(arguments[4])
    return made(*arguments)
loop.train_step = train_step
from salt_vla.cli import main
sys.exit(main())
"""


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")


def companions(run: Any) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if companion.__file__ in words and f'"{run.log_file}"' in words[-1]:
                found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.NoSuchProcess:
            continue
    return found


def log_of(run: Any) -> list[str]:
    """Its lines, when all have been written."""
    wait_for(lambda: not companions(run))
    return run.log_file.read_text().splitlines()


def at_work(run: Any, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: (run.metrics_file.exists() and run.metrics("train")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def test_a_run_that_finishes_says_so_in_its_last_line_and_in_the_second_log(
    salt: Any, pixels: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_LOG_DIR", str(tmp_path / "logs" / "of runs"))
    monkeypatch.setenv("RUN_NAME", "named")
    command = [word for word in pixels("", "--max-steps", 4) if word not in ("--name", "")]
    process = salt.start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = salt.at("named")
    lines = log_of(run)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d finished at step 4", lines[-1])
    assert set(out.splitlines()) <= set(lines) and set(err.splitlines()) <= set(lines)
    status = run.status()
    assert (status.ending, status.exit_reason, status.boot) == ("finished", "finished", identity().boot)
    assert status.ended == pytest.approx(time.time(), abs=300) and status.ticks > 0
    (copy,) = (tmp_path / "logs" / "of runs").iterdir()
    assert re.fullmatch(rf"named_\d{{8}}_\d{{6}}_pid{process.pid}\.log", copy.name)
    assert copy.read_text() == run.log_file.read_text()


def test_a_second_log_that_cannot_be_is_a_sentence(
    salt: Any, pixels: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUN_LOG_DIR", str(tmp_path / "file" / "logs"))
    assert "cannot write" in salt(*pixels("run")).sentence
    assert not salt.at("run").path.exists()


def test_what_is_refused_leaves_no_log(salt: Any, pixels: Command, tmp_path: Path) -> None:
    answer = salt.run(*pixels("run", "--data", tmp_path / "missing.parquet"))
    assert answer.code == 2 and not salt.at("run").path.exists()


@pytest.mark.parametrize("asked", [False, True])
def test_who_stops_a_run_is_in_its_reason(salt: Any, pixels: Command, asked: bool) -> None:
    run = salt.at("run")
    process = salt.start(*pixels("run", **LONG))
    at_work(run, process)
    if asked:  # As `salt-vla runs stop` does.
        ask(run.path, "stop", "", run.status().process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    status = run.status()
    assert f", from process {os.getpid()} (" in status.exit_reason and "stopped by SIGTERM" in err
    assert (status.state, status.ending) == ("stopped", "stopped" if asked else "signal")
    assert ("by `salt-vla runs stop`, user" in status.exit_reason) == asked
    assert log_of(run)[-1].endswith(f"stopped at step {status.step}: {status.exit_reason}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_that_ends_a_run_at_once_is_on_record(
    salt: Any, pixels: Command, number: signal.Signals
) -> None:
    """The second polite one, within a step that takes long, or one that nobody handles."""
    run = salt.at("run")
    program = CRASHES.format(code="print('within', flush=True); __import__('time').sleep(600)")
    process = salt.start_python(program, *pixels("run", **LONG))
    wait_for(lambda: run.log_file.exists() and "within" in run.log_file.read_text())
    if number == signal.SIGTERM:
        process.send_signal(number)
        time.sleep(0.5)  # For the handler to run: two at once are one.
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    status = run.status()
    assert status.ending == "signal" and status.state in ("stopped", "killed")
    assert status.exit_reason.startswith(f"ended by {number.name}, from process {os.getpid()} (")
    assert log_of(run)[-1].endswith(status.exit_reason)


def test_an_exception_is_in_log_and_status(salt: Any, pixels: Command) -> None:
    process = salt.start_python(CRASHES.format(code="raise KeyError('of the step')"), *pixels("run"))
    process.communicate(timeout=300)
    assert process.returncode == 1
    run = salt.at("run")
    lines = log_of(run)
    assert "KeyError: 'of the step'" in lines and any("in deep_inside" in line for line in lines)
    status = run.status()
    assert (status.state, status.ending) == ("failed", "exception")
    assert lines[-1].endswith(f"failed at step {status.step}: KeyError: 'of the step'")


@pytest.mark.parametrize(
    ("code", "number", "said"),
    [
        ("ctypes.string_at(0)", signal.SIGSEGV, "crashed: Segmentation fault; log.txt has the stacks"),
        ("os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL, "killed without a word"),
    ],
)
def test_a_run_that_vanishes_is_explained_by_what_it_left(
    salt: Any, pixels: Command, code: str, number: signal.Signals, said: str, curve: Any
) -> None:
    command = pixels("run", runtime__checkpoint_every=2, steps=6)
    process = salt.start_python(CRASHES.format(code=code), *command)
    process.communicate(timeout=300)
    assert process.returncode == -number
    run = salt.at("run")
    lines = log_of(run)
    assert "is gone without a word" in lines[-1]
    assert any("in deep_inside" in line for line in lines) == (number == signal.SIGSEGV)
    assert run.status().state == "killed"
    shown = salt.json("runs", "show", "run")
    assert shown["state"] == "killed"
    from salt_vla.operations.evidence import explained

    status = explained(run)
    assert status.exit_reason.startswith(said) and run.status() == status
    salt.ok(*command)
    salt.ok(*pixels("whole", runtime__checkpoint_every=2, steps=6))
    assert curve(run) == curve(salt.at("whole"))
    assert run.status().ending == "finished"


def test_a_loader_process_that_crashes_leaves_its_stack(
    salt: Any, pixels: Command, spawned: Callable[..., list[psutil.Process]]
) -> None:
    run = salt.at("run")
    process = salt.start(*pixels("run", **LONG, data__num_workers=1))
    at_work(run, process)
    (worker,) = spawned(psutil.Process(process.pid))
    worker.send_signal(signal.SIGSEGV)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "was killed by SIGSEGV" in err
    assert "Fatal Python error: Segmentation fault" in log_of(run)
    assert run.status().ending == "exception"


def test_a_companion_that_is_killed_ends_no_run(salt: Any, pixels: Command) -> None:
    run = salt.at("run")
    process = salt.start(*pixels("run", "--max-steps", 30))
    killed = set()
    while process.poll() is None:
        for beside in companions(run):
            if len(killed) < 2 and beside.pid not in killed and run.metrics_file.exists():
                killed.add(beside.pid)
                beside.kill()
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert killed and run.status().ending == "finished"
    assert log_of(run)[-1].endswith("finished at step 30")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte, full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_under_the_log_ends_no_run(salt: Any, pixels: Command, small_disk: Path) -> None:
    run = salt.at("run")
    run.path.mkdir(parents=True)
    (small_disk / "filler").write_bytes(b"x" * (1 << 20))
    (small_disk / "log.txt").touch()
    run.log_file.symlink_to(small_disk / "log.txt")
    answer = salt.run(*pixels("run", "--max-steps", 4))
    assert answer.code == 0, answer.err
    assert run.status().ending == "finished" and "run: finished at step 4" in answer.out
    wait_for(lambda: not companions(run))


def test_a_refused_second_start_leaves_the_log_to_the_first(salt: Any, pixels: Command) -> None:
    run = salt.at("run")
    process = salt.start(*pixels("run", **LONG))
    at_work(run, process)
    refused = salt.run(*pixels("run", **LONG))
    assert "is being worked on" in refused.sentence
    assert "being worked on" not in run.log_file.read_text()
    assert len(companions(run)) == 1
    process.kill()
    process.communicate()
    wait_for(lambda: not companions(run))


def test_a_run_that_has_no_settings_yet_is_a_run(salt: Any) -> None:
    folder = salt.at("early").path
    folder.mkdir(parents=True)
    assert not salt.at("early").exists()
    (folder / "launch.json").write_text(json.dumps({"name": "early"}))
    assert salt.at("early").exists()
    assert [row["name"] for row in salt.json("runs", "ls")] == ["early"]
