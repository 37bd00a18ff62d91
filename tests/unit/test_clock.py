"""Time as a guard: what hangs ends with a word, and a run stops while a checkpoint can still be written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from salt_vla.errors import ResourceError
from salt_vla.training.clock import HUNG, MACHINE_COLUMNS, SLURM_END, Deadline, Pace, Watchdog


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLURM_END, raising=False)


def minutes_since_start() -> float:
    return (time.time() - psutil.Process().create_time()) / 60


def test_without_a_limit_it_is_never_late() -> None:
    deadline = Deadline(0)
    deadline.learn("step", 1e12)
    assert not deadline and not deadline.is_near()
    deadline.require_room()


def test_the_limit_counts_from_the_process_start_and_leaves_room_for_what_is_slow() -> None:
    deadline = Deadline(minutes_since_start() + 10)
    assert deadline and not deadline.is_near()
    deadline.learn("step", 100.0)
    deadline.learn("checkpoint", 150.0)
    deadline.learn("checkpoint", 20.0)
    assert not deadline.is_near()  # 2 · (100 + 150) s are less than ten minutes.
    deadline.learn("validation", 60.0)
    assert deadline.is_near()


def test_a_limit_that_has_passed_is_a_sentence() -> None:
    with pytest.raises(ResourceError, match=r"no time for a step .*raise runtime\.time_limit_minutes"):
        Deadline(minutes_since_start() / 2).require_room()


def test_the_end_of_a_slurm_job_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLURM_END, str(int(time.time()) + 600))
    assert Deadline(0) and not Deadline(0).is_near()
    assert Deadline(minutes_since_start() + 1).end < Deadline(0).end  # The earlier one counts.
    monkeypatch.setenv(SLURM_END, str(int(time.time())))
    assert Deadline(0).is_near()
    monkeypatch.setenv(SLURM_END, "Unknown")
    assert not Deadline(0)


def watched(log: Path, seconds: float, code: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import sys, time
        from pathlib import Path
        from salt_vla.training.clock import Watchdog

        def somewhere_deep():
            time.sleep(60)

        def told(reason):
            print("told:", reason, flush=True)

        with Watchdog({seconds}, Path({str(log)!r}), told) as watchdog:
{textwrap.indent(textwrap.dedent(code), " " * 12)}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_step_that_hangs_ends_the_process_and_says_where_it_stood(tmp_path: Path) -> None:
    done = watched(tmp_path / "log.txt", 0.3, 'watchdog.beat("step 12")\nsomewhere_deep()')
    assert done.returncode == HUNG
    reason = "step 12 took more than 0.3 s (runtime.watchdog_seconds)"
    assert done.stdout == f"told: {reason}\n"
    assert done.stderr.startswith(f"salt-vla: {reason}")
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith(f"hung: {reason}") and "in somewhere_deep" in log


def test_steps_that_take_less_are_let_alone(tmp_path: Path) -> None:
    code = """
        for number in range(5):
            watchdog.beat(f"step {number}")
            time.sleep(0.5)
        watchdog.beat("reading", grace=60)
        time.sleep(2.5)
    """
    done = watched(tmp_path / "log.txt", 2.0, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "log.txt").exists()


def test_a_process_that_was_suspended_is_not_taken_for_hung(tmp_path: Path) -> None:
    """As by Ctrl-Z, or by a queue that lets another job go first."""
    code = """
        import os, signal, subprocess
        watchdog.beat("step 1")
        subprocess.Popen(["sh", "-c", f"sleep 3.5; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2)
        watchdog.beat("step 2")
        somewhere_deep()
    """
    done = watched(tmp_path / "log.txt", 1.5, code)
    assert done.returncode == HUNG
    assert done.stdout == "told: step 2 took more than 1.5 s (runtime.watchdog_seconds)\n"


def test_a_watchdog_of_zero_seconds_sleeps(tmp_path: Path) -> None:
    with Watchdog(0, tmp_path / "log.txt", lambda _: os.abort()) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.05)


def test_a_row_says_clips_a_second_since_the_last_one() -> None:
    pace = Pace("cpu")
    pace.step(8, waited=0.0)
    time.sleep(0.05)
    row = pace.as_row()
    assert 0 < row["clips_per_s"] <= 8 / 0.05
    assert row["data_wait_share"] == 0
    assert 0.05 < row["memory_gb"] < 100
    assert row.keys() <= set(MACHINE_COLUMNS)
    pace.step(1, waited=0.01)
    time.sleep(0.02)
    assert 0 < pace.as_row()["data_wait_share"] <= 0.5
