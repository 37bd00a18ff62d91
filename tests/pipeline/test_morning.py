"""The night that `examples/overnight.sh` tells, run as it is written: small networks, real processes, a shell
that is killed and a training process that is killed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from salt_vla.operations.launch import supervision
from salt_vla.operations.queue import Queue
from salt_vla.operations.slots import runner_name
from salt_vla.rundir import RunDirectory, read_json

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "overnight.sh"
RUNS = ("exp1", "exp2", "exp3")
SECONDS = 600.0  # More than a busy machine needs.
SIZE = (
    "encoder.name=vit_micro encoder.depth=1 encoder.geometry.num_frames=4 encoder.geometry.image_size=32 "
    "encoder.geometry.tubelet_size=2 encoder.geometry.patch_size=8 predictor.depth=1 predictor.dim=24 "
    "predictor.num_heads=3 data.view.frame_stride=2 data.view.num_views=2 data.view.max_shift=2 "
    "data.view.crop_scale=1.0,1.0 data.num_workers=0"
)
PACE = (
    "batch_size=4 optimizer.warmup_steps=4 runtime.device=cpu runtime.precision=float32 runtime.threads=1 "
    "runtime.log_every=1 runtime.checkpoint_every=5 runtime.validate_every=50 runtime.validation_clips=6"
)


@pytest.fixture
def night(tmp_path: Path, workshop) -> Iterator[Callable[..., subprocess.Popen[str]]]:  # type: ignore[no-untyped-def]
    """`night(phase)`: a phase of the script, in a session of its own; what it started is gone in the end."""
    program = tmp_path / "salt-vla"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m salt_vla "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"SALT_VLA_ROOT": str(tmp_path / "night"), "SALT": str(program)}
    environment |= {"DATA": str(workshop.table), "SIZE": SIZE, "PACE": PACE, "OMP_NUM_THREADS": "1"}
    environment |= {"TEACHER_STEPS": "6", "STEPS": "120", "WAIT": "0.3"}

    def run(phase: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["sh", SCRIPT, phase], env=environment, start_new_session=True, **pipes)

    yield run
    for folder in [*(tmp_path / "night").glob("runs/*"), *(tmp_path / "night").glob("jobs/*")]:
        now = supervision(folder)
        for process in (now.supervisor, *(each.process for each in now.attempts)) if now else ():
            process.send(signal.SIGKILL)


def said(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out
    return out


def fenced(page: str, heading: str) -> list[str]:
    """The command lines below a heading."""
    section = re.split(r"^## ", page.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)).splitlines()


def test_the_night_goes_on_without_its_shell_and_the_morning_knows_all(
    night: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    salt,  # type: ignore[no-untyped-def]
    curve: Callable[[RunDirectory], list[dict[str, object]]],
    weights: Callable[[RunDirectory], dict[str, bytes]],
) -> None:
    salt.root = tmp_path / "night"
    evening = night("evening")
    queued = salt.root / "jobs" / runner_name("cpu") / "supervision.json"
    until = time.monotonic() + SECONDS
    while not queued.is_file() and evening.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(evening.pid, signal.SIGKILL)  # The shell, and whatever still belongs to it.
    assert queued.is_file(), evening.communicate()[0]
    evening.communicate()

    assert "killing process" in said(night("accident"))
    morning = said(night("morning"))

    # All three, each exactly once; the one that was killed went on.
    jobs = {job.name: job for job in Queue(salt.root / "queue.db").jobs()}
    assert set(jobs) == {"held-out", *RUNS}
    assert {job.state for job in jobs.values()} == {"finished"}
    assert [job.attempt for job in jobs.values()] == [1, 1, 1, 1]
    history = Queue(salt.root / "queue.db").history()
    assert sorted(event.job for event in history if event.event == "started") == sorted(jobs)
    for name in RUNS:
        assert salt.json("runs", "show", name)["step"] == 120
    attempts = supervision(salt.at("exp1").path).attempts
    assert [each.code for each in attempts] == [-signal.SIGKILL, 0]
    assert salt.json("runs", "show", "exp1")["resumed_from"]
    assert [len(supervision(salt.at(name).path).attempts) for name in RUNS[1:]] == [1, 1]

    # What the morning reads.
    page = (salt.root / "PROGRESS.md").read_text()
    assert page in morning
    assert all(f"| {name} (" in page for name in RUNS)
    assert re.search(r"^- ✓ exp1: now finished; went on from step \d+; before: .*killed", page, re.MULTILINE)
    assert re.search(r"^- .*exp1: .*loss", page, re.MULTILINE)
    assert "caches/overnight" in page and "No run is at work." in page
    for name in RUNS:
        assert re.search(rf"^\| {name} \| finished \|", page, re.MULTILINE), "the queue's last word"

    # The page is enough to make the same run again: unbroken, it is the same to the last bit.
    again = next(line for line in fenced(page, "Commands to reproduce") if "exp1-again" in line)
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            *again.replace("salt-vla", "salt_vla", 1).split()[:1],
            *shlex.split(again)[1:],
        ],
        cwd=salt.root,
        env=os.environ | {"SALT_VLA_ROOT": str(salt.root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert curve(salt.at("exp1")) == curve(salt.at("exp1-again"))
    assert weights(salt.at("exp1")) == weights(salt.at("exp1-again"))
    assert read_json(salt.at("exp1").path / "status.json", dict)["resumed_from"]
    assert "exp1-again" in (salt.root / "PROGRESS.md").read_text()  # Written anew when that run ended.


def test_the_script_without_a_word_says_what_it_does() -> None:
    answer = subprocess.run(["sh", SCRIPT], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert all(phase in answer.stdout for phase in ("evening", "accident", "morning"))
