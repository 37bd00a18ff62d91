"""A run directory says who works on it, keeps whole rows only, and never shows half a file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from salt_vla.errors import ResourceError, RunError
from salt_vla.identity import identity
from salt_vla.rundir import (
    ENDINGS,
    RunDirectory,
    Status,
    all_runs,
    default_name,
    num_cores,
    root,
    second_log,
    to_json_line,
    write_atomically,
    write_text,
    writing_to,
)

PRELUDE = """
import resource, signal, sys
from pathlib import Path
from salt_vla.errors import UserError
from salt_vla.rundir import RunDirectory, write_text
run = RunDirectory(Path(sys.argv[1]))
"""
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "runs" / "first"
    path.mkdir(parents=True)
    return RunDirectory(path)


@pytest.fixture
def start(run: RunDirectory) -> Iterator[Start]:
    """Start a Python process that works on `run`; all are gone at the end."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(run.path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


CLAIM_AND_WAIT = """
run.claim(total_steps=9)
print("claimed", flush=True)
signal.pause()
"""


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*.part"))


def test_new_run_is_queued(run: RunDirectory) -> None:
    assert run.status() == Status(state="queued")


def test_claimed_run_is_running_in_this_process(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "absent" / "run")
    run.claim(total_steps=9)
    status = run.status()
    assert (status.state, status.pid, status.total_steps) == ("running", os.getpid(), 9)
    assert run.claim(total_steps=12).total_steps == 12


def test_claim_refuses_a_run_that_a_live_process_works_on(run: RunDirectory, start: Start) -> None:
    process = start(CLAIM_AND_WAIT)
    assert heard(process) == "claimed"
    before = (run.path / "status.json").read_bytes()
    with pytest.raises(RunError, match=f"run 'first' is being worked on by process {process.pid}; stop it"):
        run.claim(total_steps=9)
    assert (run.path / "status.json").read_bytes() == before


@pytest.mark.parametrize("waited_for", [False, True])
def test_run_of_a_killed_process_is_killed_and_can_be_taken_over(
    run: RunDirectory, start: Start, waited_for: bool
) -> None:
    """Also while nobody has waited for the dead process, which then still has its entry (a zombie)."""
    process = start(CLAIM_AND_WAIT)
    assert heard(process) == "claimed"
    run.set_status(replace(run.status(), step=4, seconds=2.5, resumed_from=[2]))
    process.send_signal(signal.SIGKILL)
    if waited_for:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.pid_exists(process.pid)
    killed = run.status()
    assert (killed.state, killed.step) == ("killed", 4)
    assert killed.exit_reason == "killed without a word (the process is gone)"
    taken = run.claim(total_steps=9)
    assert (taken.state, taken.pid, taken.exit_reason) == ("running", os.getpid(), "")
    assert (taken.step, taken.seconds, taken.resumed_from) == (4, 2.5, [2])


def test_pid_that_was_used_again_is_not_the_run(run: RunDirectory) -> None:
    """This process is alive, but it is not the one that started at that time."""
    started = psutil.Process().create_time()
    run.set_status(Status(state="running", pid=os.getpid(), started=started - 60))
    assert run.status().state == "killed"
    run.set_status(Status(state="running", pid=os.getpid(), started=started))
    assert run.status().state == "running"


def test_of_several_claims_at_once_one_wins(run: RunDirectory, start: Start) -> None:
    code = """
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            run.claim(total_steps=9)
            print("won", flush=True)
        except UserError as error:
            print("lost", flush=True)
        signal.pause()
    """
    processes = [start(code) for _ in range(4)]
    assert [heard(process) for process in processes] == ["ready"] * 4
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [heard(process) for process in processes]
    assert sorted(said) == ["lost", "lost", "lost", "won"]
    assert run.status().pid == processes[said.index("won")].pid


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "queued"])
def test_ended_run_keeps_its_state_and_can_be_claimed(run: RunDirectory, state: str) -> None:
    run.set_status(Status(state=state, pid=1, step=3, exit_reason="because"))
    assert (run.status().state, run.status().exit_reason) == (state, "because")
    assert run.claim(total_steps=9).step == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"stage": "running"}',
        '{"state": "stopped", "seconds": "x"}',
        '{"state": "x", "step": -1}',
    ],
)
def test_damaged_status_is_a_sentence_with_a_cure(run: RunDirectory, text: str) -> None:
    write_text(run.path / "status.json", text)
    with pytest.raises(RunError, match=r"status\.json is damaged .*; remove it to let the run resume"):
        run.status()


def test_lines_are_on_disk_before_the_checkpoint_that_follows_them(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, int]] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    monkeypatch.setattr(os, "fsync", noted)
    for step in (1, 2):
        run.log_metrics({"kind": "train", "step": step})
        file = run.metrics_file.stat()
        assert flushed[-1] == (file.st_ino, file.st_size)


def test_a_claim_removes_what_the_dead_left_and_nothing_of_the_living(
    run: RunDirectory, start: Start
) -> None:
    """Who is about to be refused may just be writing: its file must not vanish below it."""
    (run.path / ".recipe.json.x.part").write_text("")
    code = """
        def slow(path):
            path.write_text("whole")
            print("writing", flush=True)
            sys.stdin.readline()
        from salt_vla.rundir import write_atomically
        write_atomically(run.path / "recipe.json", slow)
        print("written", flush=True)
    """
    killed, living = start(code), start(code)
    assert heard(killed) == heard(living) == "writing"
    killed.kill()
    killed.wait()
    run.claim(total_steps=9)
    assert len(leftovers(run.path)) == 1 and f".{living.pid}-" in leftovers(run.path)[0]
    assert living.communicate("go\n")[0] == "written\n"
    assert (run.path / "recipe.json").read_text() == "whole" and leftovers(run.path) == []


def test_metrics_come_back_in_order_and_by_kind(run: RunDirectory) -> None:
    assert run.metrics() == []
    rows = [{"kind": kind, "step": step, "loss": 0.1} for step in (1, 2) for kind in ("train", "val")]
    for row in rows:
        run.log_metrics(row)
    assert run.metrics() == rows
    assert run.metrics("val") == [rows[1], rows[3]]


def test_what_is_not_a_number_is_null(run: RunDirectory) -> None:
    run.log_metrics({"kind": "train", "step": 1, "loss": float("nan"), "r2": float("-inf"), "lr": 1e-30})
    assert run.metrics() == [{"kind": "train", "step": 1, "loss": None, "r2": None, "lr": 1e-30}]
    assert "NaN" not in run.metrics_file.read_text()
    assert json.loads(to_json_line({"x": 0.1 + 0.2}))["x"] == 0.1 + 0.2


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 3, "loss": 1}', " "])
def test_row_torn_by_a_crash_is_ignored_and_then_overwritten(run: RunDirectory, torn: str) -> None:
    """Even one that happens to be valid: without its newline nobody knows that it is whole."""
    rows = [{"kind": "train", "step": step, "loss": 1.5} for step in (1, 2)]
    for row in rows:
        run.log_metrics(row)
    with run.metrics_file.open("a") as file:
        file.write(torn)
    assert run.metrics() == rows
    run.trim_metrics(2)
    run.log_metrics({"kind": "train", "step": 3, "loss": 1.0})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_trim_drops_what_will_be_computed_again(run: RunDirectory) -> None:
    for step in (1, 2, 3, 4):
        run.log_metrics({"kind": "train", "step": step, "loss": 1 / 3})
    before = run.metrics_file.read_text().splitlines(keepends=True)
    run.trim_metrics(2)
    assert run.metrics_file.read_text() == "".join(before[:2])
    run.trim_metrics(0)
    assert run.metrics() == []


def test_trim_of_a_run_without_metrics_makes_an_empty_file(run: RunDirectory) -> None:
    run.trim_metrics(0)
    assert run.metrics_file.read_text() == ""


def test_row_damaged_in_the_middle_is_a_sentence(run: RunDirectory) -> None:
    write_text(run.metrics_file, '{"kind": "train", "step": 1}\n{"kind"\n{"kind": "train", "step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged .*'\{\"kind\"'"):
        run.metrics()


def test_log_appends_lines(run: RunDirectory) -> None:
    run.log("started")
    run.log("finished")
    assert run.log_file.read_text() == "started\nfinished\n"


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "first, long")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_failed_atomic_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_full_disk_is_a_sentence_and_leaves_the_old_file(run: RunDirectory, start: Start) -> None:
    """A limit on the size of files stands in for the disk: the write fails half-way."""
    code = """
        write_text(run.path / "file.txt", "old")
        run.log_metrics({"kind": "train", "step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for write in (
            lambda: write_text(run.path / "file.txt", "x" * 10_000),
            lambda: run.log_metrics({"kind": "train", "step": 2, "note": "x" * 10_000}),
            lambda: run.log("x" * 10_000),
        ):
            try:
                write()
            except UserError as error:
                print(type(error).__name__, error, flush=True)
    """
    said, _ = start(code).communicate()
    lines = said.splitlines()
    assert len(lines) == 2  # A log that has no room ends nothing.
    for line, name in zip(lines, ("file.txt", "metrics.jsonl"), strict=True):
        place = run.path / name
        assert (
            line == f"ResourceError cannot write {place}: File too large; make space or choose another folder"
        )
    assert (run.path / "file.txt").read_text() == "old"
    assert [row["step"] for row in run.metrics()] == [1]
    assert leftovers(run.path) == []


def test_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*/file: .*; make space or choose another folder"):
        write_text(tmp_path / "file" / "below.txt", "text")
    with (
        pytest.raises(ResourceError, match=r"cannot write /there: permission denied; choose another folder"),
        writing_to(tmp_path),
    ):
        raise PermissionError(13, "Permission denied", "/there")


@pytest.mark.parametrize("name", ["a", "exp1_higher-lr.v2", "0"])
def test_run_lies_below_the_root(name: str) -> None:
    assert RunDirectory.named(name).path == root() / "runs" / name
    assert RunDirectory.named(name).name == name


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../a", "a b", "a\n", "-x", "ä"])
def test_name_that_could_leave_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(RunError, match=r"may hold only letters, digits.* --name"):
        RunDirectory.named(name)


def test_absent_run_is_a_sentence(run: RunDirectory) -> None:
    with pytest.raises(RunError, match=r"there is no run at .*/first; `salt-vla runs ls` lists the runs"):
        run.require()
    write_text(run.config_file, "{}")
    assert run.require() is run


def test_all_runs_are_those_with_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    assert root() == tmp_path and all_runs() == []
    for name in ("b", "a"):
        write_text(RunDirectory.named(name).config_file, "{}")
    (tmp_path / "runs" / "c").mkdir()
    assert [run.name for run in all_runs()] == ["a", "b"]


def test_root_is_the_current_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SALT_VLA_ROOT", "")
    assert root() == tmp_path


def test_cores_are_counted_on_systems_that_know_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert num_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_a_run_is_known_by_its_boot_and_ticks_whatever_the_clock_says(run: RunDirectory) -> None:
    """A clock that is set changes what a process' start seems to be, and makes nobody another one."""
    run.claim(total_steps=9)
    mine = run.status()
    assert mine.process == identity() and mine.ticks > 0
    run.set_status(replace(mine, started=mine.started - 3600))
    assert run.status().state == "running"
    run.set_status(replace(mine, ticks=mine.ticks + 1))
    assert (run.status().state, run.status().ending) == ("killed", "killed")
    run.set_status(replace(mine, boot="00000000-1111-2222-3333-444444444444"))
    lost = run.status()
    assert (lost.state, lost.ending) == (
        "killed",
        "machine",
    ) and "restarted or lost its power" in lost.exit_reason


def test_an_end_is_a_word_a_sentence_and_a_time_and_a_claim_takes_them_back(run: RunDirectory) -> None:
    over = run.claim(total_steps=9).over("stopped", "signal", "stopped by SIGTERM")
    assert over.ending in ENDINGS and over.ended == pytest.approx(time.time(), abs=60)
    run.set_status(over)
    assert run.status() == over
    again = run.claim(total_steps=9)
    assert (again.state, again.ending, again.exit_reason, again.ended) == ("running", "", "", 0.0)


@pytest.mark.parametrize("name", ["config.json", "status.json", "launch.json"])
def test_a_run_exists_from_its_first_file_on(run: RunDirectory, name: str) -> None:
    assert not run.exists()
    with pytest.raises(RunError, match="there is no run at"):
        run.require()
    write_text(run.path / name, "{}")
    assert run.exists() and run.require() is run


def test_a_second_log_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_LOG_DIR", raising=False)
    assert second_log("run") is None
    monkeypatch.setenv("RUN_LOG_DIR", str(tmp_path / "logs"))
    path = second_log("run")
    assert path is not None and path.is_file() and path.parent == tmp_path / "logs"
    assert re.fullmatch(rf"run_\d{{8}}_\d{{6}}_pid{os.getpid()}\.log", path.name)
    monkeypatch.setenv("RUN_LOG_DIR", str(path / "below a file"))
    with pytest.raises(ResourceError, match="cannot write"):
        second_log("run")


def test_a_run_without_a_name_has_that_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_NAME", raising=False)
    assert default_name("recipe") == "recipe"
    monkeypatch.setenv("RUN_NAME", "mine")
    assert default_name("recipe") == "mine"
