"""`runs ls` and `runs show` say what is on record of a run or a job, to people and to programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.cli.printing import MANY
from salt_vla.identity import ProcessId
from salt_vla.operations.launch import LAUNCH, Attempt, Launch, Supervision, record, record_event
from salt_vla.rundir import RunDirectory

WriteRun = Callable[..., RunDirectory]
GONE = ProcessId(2**22 + 1, 1.7e9)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main(["runs", *words]) == 0
        return capsys.readouterr().out

    return run


def _launched(folder: Path, command: tuple[str, ...], state: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAUNCH).write_text(json.dumps(asdict(Launch(folder.name, command, "token", restarts=2))))
    attempts = (Attempt(GONE, -9, "killed by SIGKILL", 1.7e9), Attempt(GONE, 1, "exit code 1", 1.7e9))
    record(folder, Supervision("token", state, GONE, attempts, restarts_left=1))
    record_event(folder, "ended", reason="killed by SIGKILL")


def test_a_supervised_run_shows_its_command_and_every_attempt(
    write_run: WriteRun, say: Callable[..., str]
) -> None:
    run = write_run("some", state="failed", exit_reason="RuntimeError: gone")
    _launched(run.path, ("train", "demo_student", "--name", "some"), "ended")
    found = json.loads(say("show", "some", "--json"))
    assert found["supervision"]["command"] == ["train", "demo_student", "--name", "some"]
    assert [each["reason"] for each in found["supervision"]["attempts"]] == [
        "killed by SIGKILL",
        "exit code 1",
    ]
    assert (found["supervision"]["at_work"], found["events"][0]["reason"]) == (False, "killed by SIGKILL")
    shown = say("show", "some")
    for words in ("failed (RuntimeError: gone)", "salt-vla train demo_student", "1 restarts left", "1. pid"):
        assert words in shown, words


@pytest.mark.parametrize("file", [LAUNCH, "supervision.json"])
def test_a_damaged_supervision_hides_no_run(write_run: WriteRun, say: Callable[..., str], file: str) -> None:
    run = write_run("some")
    _launched(run.path, ("train", "demo_student"), "ended")
    (run.path / file).write_text("[]")
    found = json.loads(say("show", "some", "--json"))
    assert found["state"] == "finished" and file in found["supervision_problem"]
    assert "is damaged" in say("show", "some")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        (LAUNCH, "command", [5]), ("supervision.json", "supervisor", {"pid": 1.5, "started": 1.0}),
        ("supervision.json", "attempts", [{"process": {"pid": 1, "started": 1.0}, "code": 1, "reason": 5}]),
        ("supervision.json", "attempts", [{"process": {"pid": 1, "started": 1.0}, "ended": 1e300}]),
        ("supervision.json", "restarts_left", "x"),
    ],
)  # fmt: skip
def test_a_supervision_of_other_kinds_hides_no_run(
    write_run: WriteRun, say: Callable[..., str], file: str, field: str, value: Any
) -> None:
    run = write_run("some")
    _launched(run.path, ("train", "demo_student", "--name", "some"), "running")
    held = json.loads((run.path / file).read_text())
    (run.path / file).write_text(json.dumps(held | {field: value}))
    assert f"{file} is damaged" in json.loads(say("show", "some", "--json"))["supervision_problem"]
    assert "some" in say("watch", "--once") and "step 100" in say("tail", "some")


def test_a_job_without_a_run_is_shown(write_run: WriteRun, say: Callable[..., str], tmp_path: Path) -> None:
    write_run("other")
    _launched(tmp_path / "jobs" / "building", ("cache", "build"), "running")
    (tmp_path / "jobs" / "building" / "log.txt").write_text("shard 3 of 7\n")
    shown = say("show", "building")
    assert "lost before its end" in shown and "shard 3 of 7" in shown and "cache build" in shown
    assert "state" not in json.loads(say("show", "building", "--json"))
    assert [row["name"] for row in json.loads(say("ls", "--json"))] == ["other"]


def test_so_many_runs_that_a_laid_out_table_takes_long_are_a_line_each(
    write_run: WriteRun, say: Callable[..., str]
) -> None:
    for number in range(MANY + 1):
        write_run(f"run{number:03d}", [], state="failed", exit_reason=f"line one\nof {number} \x1b[31m")
    lines = say("ls").splitlines()
    assert len(lines) == MANY + 2
    assert lines[0].split() == ["name", "state", "step", "exit_reason"]
    assert lines[8] == "run007  failed  0/100  line one of 7 \\x1b[31m"
    rows = json.loads(say("ls", "--json"))
    assert [row["name"] for row in rows] == [f"run{number:03d}" for number in range(MANY + 1)]


def test_a_list_of_runs_starts_no_numerical_library(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("some")
    code = "import sys; from salt_vla.cli import main; main(['runs', 'ls']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "some" in said and said.endswith("False\n")
