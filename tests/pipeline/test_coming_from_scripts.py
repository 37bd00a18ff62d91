"""docs/coming-from-scripts.md is run: every command on the page, in its order, on small films and networks.

The test reads the commands from the page and puts small things in the places of large ones; a command that
it does not know how to make small is run as it stands.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from-scripts.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
HABITS: dict[str, str] = dict(SECTION.findall(PAGE.read_text()))
SIZE = (
    *("encoder.name=vit_micro", "encoder.depth=1", "encoder.geometry.num_frames=4"),
    *("encoder.geometry.image_size=32", "encoder.geometry.tubelet_size=2", "encoder.geometry.patch_size=8"),
    *("predictor.depth=1", "predictor.dim=24", "predictor.num_heads=3", "data.view.frame_stride=2"),
    *("data.view.num_views=2", "data.view.max_shift=2", "data.view.crop_scale=0.75,1.0", "batch_size=4"),
    *("optimizer.warmup_steps=4", "runtime.device=cpu", "runtime.precision=float32", "runtime.threads=1"),
    *("runtime.log_every=1", "runtime.validate_every=20", "runtime.validation_clips=6", "data.num_workers=0"),
)
# The run that is watched, stopped and started again goes on for as long as the test may take.
LONG, SHORT = ("steps=20000", "runtime.checkpoint_every=50"), ("steps=20", "runtime.checkpoint_every=10")
TEACHERS = {"videomae_v1_base": "small_teacher", "videomae_v1_large": "other_teacher"}
# `doctor` speaks of the machine that it runs on, whatever that lacks; two teachers' caches differ.
ANSWERS = {"doctor": (0, 1), "cache diff": (1,)}
ASKED = {
    "run tests": "Run the tests before a long run",
    "nohup training": "Train in the background",
    "tail the log": "Look at the log",
    "grep the minimum": "Find the lowest loss",
    "setsid relaunch": "Stop it, and start it again",
    "queue after cache metadata": "Start when the cache is there",
    "integrity test": "Test a cache's integrity",
    "roll back to old masks": "Roll back to the old masks",
    "re-cache with another teacher": "Cache again with another teacher",
    "RUN_NAME, RUN_LOG_DIR": "Name a run by variables, and have the log elsewhere too",
    "handoff notes": "Write down where things stand",
}


def commands(habit: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", HABITS[habit], re.MULTILINE | re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if line.strip()]


def test_every_habit_has_its_place_and_its_command() -> None:
    assert set(ASKED.values()) <= set(HABITS)
    for habit, body in HABITS.items():
        assert "```text\n" in body, f"{habit}: how it went is missing"
        assert commands(habit), f"{habit}: what does it now is missing"


@pytest.fixture
def small(salt: Any, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """`small(line)` runs a line of the page, made small; its exit code, output and errors."""
    monkeypatch.chdir(salt.root)
    shutil.copy(workshop.table, salt.root / "ssv2.parquet")
    small, other = TEACHERS.values()
    shutil.copytree(workshop.teacher, salt.root / "runs" / small)
    salt.ok(*salt.train("demo_teacher", other, "--data", "ssv2.parquet", "--seed", 5, "--max-steps", 2))

    def run(line: str) -> Any:
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            monkeypatch.setenv(name, value)
        if words[0] == "make":  # The suite does not run itself; what it would do is said.
            made = subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            return made.returncode, made.stdout, made.stderr
        assert words[0] == "salt-vla", line
        words = [TEACHERS.get(word, word) for word in words[1:]]
        for place in [place for place, word in enumerate(words) if word == "train"]:
            length = LONG if words[place + 2 : place + 4] == ["--name", "exp1"] else SHORT
            words[place + 2 : place + 2] = [*SIZE, *length]
        # A log of its own is a process' own.
        answer = salt.run(*words) if line.startswith("RUN_NAME") else salt(*words)
        for name in ("RUN_NAME", "RUN_LOG_DIR"):
            monkeypatch.delenv(name, raising=False)
        return answer.code, answer.out, answer.err

    yield run
    if (salt.root / "runs" / "exp1" / "launch.json").is_file():
        salt("runs", "kill", "exp1")


def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_every_command_of_the_page_does_what_it_says(salt: Any, small: Callable[[str], Any]) -> None:
    said: dict[str, str] = {}
    for habit in HABITS:
        for line in commands(habit):
            if habit == ASKED["tail the log"]:
                until(lambda: bool(salt.at("exp1").metrics("train")))
            code, out, err = small(line)
            assert code in ANSWERS.get(" ".join(line.split()[1:3]), (0,)), f"{line}\n{out}\n{err}"
            said[line] = out
            if line.startswith("salt-vla runs restart"):
                until(lambda: bool(salt.json("runs", "show", "exp1")["resumed_from"]))
                salt.ok("runs", "kill", "exp1")  # It would take the time that the others need.

    def of(habit: str) -> str:
        return "\n".join(said[line] for line in commands(ASKED[habit]))

    assert "pytest" in of("run tests") and "lint-imports" in of("run tests")
    assert "exp1" in of("nohup training")
    assert "step" in of("tail the log")
    assert "exp2" in of("grep the minimum") and "loss" in of("grep the minimum")
    assert "36 records" in of("integrity test")
    states = {job["name"]: job["state"] for job in salt.json("queue", "ls", "--all")["jobs"]}
    assert states == {"base": "finished", "exp3": "finished", "exp2_instead": "skipped"}
    settings = json.loads(salt.at("old_masks").config_file.read_text())
    assert settings["masks"]["strategy"] == "random"
    assert "fingerprint" in of("re-cache with another teacher")
    logs = list((salt.root / "logs").glob("exp2_*_pid*.log"))
    assert len(logs) == 1 and "finished" in logs[0].read_text()
    assert salt.at("exp2").log_file.is_file()
    page = (salt.root / "PROGRESS.md").read_text()
    assert all(f"| {name} (" in page for name in ("base", "exp2", "exp3", "old_masks"))
    assert "exp1: killed" in page
