"""What `examples/overnight.sh` does when things stand otherwise than in its own story: called from another
folder, called twice, with nobody at work, with nothing left to kill.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.operations.processes import identity
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.rundir import RunDirectory, Status

SCRIPT = Path(__file__).parents[2] / "examples" / "overnight.sh"
SECONDS = 120.0  # that anything here may take at most
Script = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """`script(phase, **variables)`: in `tmp_path`, with relative paths wherever a path is asked for."""
    program = tmp_path / "salt-vla"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m salt_vla "$@"\n')
    program.chmod(0o755)
    started = []

    def run(phase: str, **variables: str) -> subprocess.Popen[str]:
        given = {"SALT_VLA_ROOT": "night", "SALT": "./salt-vla", "DATA": "films.parquet", "WAIT": "0.1"}
        environment = {key: value for key, value in os.environ.items() if key != "RUN_NAME"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["sh", str(SCRIPT), phase]
        started.append(
            subprocess.Popen(command, env=environment | given | variables, cwd=tmp_path, **pipes)  # type: ignore[call-overload]
        )
        return started[-1]

    yield run
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    (tmp_path / "night").mkdir()
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path / "night"))
    return Queue()


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=SECONDS)[0]


def test_paths_are_those_of_the_folder_in_which_it_was_called(script: Script, tmp_path: Path) -> None:
    process = script("evening", SALT="echo")  # Which says the command lines, and finds every job queued.
    out = said(process)
    assert process.returncode == 0, out
    assert f"--data {tmp_path}/films.parquet" in out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["night"]
    assert list((tmp_path / "night").iterdir()) == []


def test_an_evening_that_is_given_again_adds_what_is_missing_alone(script: Script, tmp_path: Path) -> None:
    program = tmp_path / "all-but-exp2"
    program.write_text('#!/bin/sh\n[ "$*" != "queue show exp2" ] && echo "$@"\n')
    program.chmod(0o755)
    (tmp_path / "night" / "caches" / "overnight").mkdir(parents=True)
    (tmp_path / "night" / "caches" / "overnight" / "manifest.json").write_text('{\n  "complete": true\n}')
    process = script("evening", SALT="./all-but-exp2")
    out = said(process)
    assert process.returncode == 0, out
    added = [line for line in out.splitlines() if line.startswith("queue add")]
    assert len(added) == 1
    assert "train exp2_high_mask" in added[0]
    assert "cache build" not in out


def test_an_accident_waits_for_no_run_that_will_never_be_and_kills_no_other_process(
    script: Script, queue: Queue, tmp_path: Path
) -> None:
    queue.add(Wanted(("train", "demo_student", "--name", "exp1"), str(tmp_path), "exp1"))
    queue.cancel("exp1")
    bystander = subprocess.Popen(["sleep", str(SECONDS)])
    try:
        run = RunDirectory.named("exp1")
        (run.path / "checkpoints" / "step_5").mkdir(parents=True)
        now = identity(bystander.pid)
        its = Status("finished", pid=now.pid, started=now.started, boot=now.boot, ticks=now.ticks)
        # The very process, of a run that is over; and another one that has got its number.
        for status in (its, replace(its, state="running", ticks=now.ticks - 1)):
            run.set_status(status)
            process = script("accident")
            assert "exp1 is not at work, and will not be" in said(process)
            assert process.returncode == 1
            assert bystander.poll() is None
        run.set_status(replace(its, state="running"))
        process = script("accident")
        assert said(process) == f"killing process {now.pid} of exp1\n"
        assert bystander.wait(SECONDS) == -9
    finally:
        bystander.kill()
        bystander.wait()


def test_a_morning_that_waits_in_vain_says_so(script: Script, queue: Queue, tmp_path: Path) -> None:
    queue.add(Wanted(("recipes", "ls"), str(tmp_path), "exp1"))
    process = script("morning")
    assert process.stdout is not None
    end = time.monotonic() + SECONDS

    def says(sentence: str, times: int) -> None:
        while times:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line and time.monotonic() < end
            times -= sentence in line

    says("No runner is at work", 2)  # The first is that of the table.
    queue.pause()
    says("The queue is paused", 1)
    queue.cancel("exp1")
    said(process)  # It goes on to the comparison, of runs that are not there.
