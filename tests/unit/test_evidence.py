"""Why a process is gone: told by what is left of it, and written down once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.identity import ProcessId, identity
from salt_vla.operations import evidence, kernel_log
from salt_vla.operations.asked import ask
from salt_vla.operations.evidence import OomCount, explain_loss, explained, kills_in, oom_count
from salt_vla.operations.kernel_log import KernelLine
from salt_vla.operations.launch import Supervision, record
from salt_vla.rundir import RunDirectory, Status

OTHER_BOOT = "00000000-1111-2222-3333-444444444444"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    found = RunDirectory.named("lost")
    found.path.mkdir(parents=True)
    return found


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        with process:
            process.kill()


def a_process(started: list[subprocess.Popen[bytes]], code: str = "input()") -> ProcessId:
    started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
    return identity(started[-1].pid)


def ended(started: list[subprocess.Popen[bytes]], number: signal.Signals = signal.SIGKILL) -> int:
    started[-1].send_signal(number)
    return started[-1].wait()


def working(run: RunDirectory, process: ProcessId, **more: Any) -> None:
    known = {"pid": process.pid, "started": process.started, "boot": process.boot, "ticks": process.ticks}
    run.set_status(Status("running", step=4, total_steps=9, **known, **more))


def beat(run: RunDirectory, **figures: object) -> str:
    when = time.time() - 3
    (run.path / "heartbeat.json").write_text(json.dumps({"time": when} | figures))
    return time.strftime(evidence.TIME, time.localtime(when))


def test_a_real_kill_is_told_with_the_last_that_was_seen(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    at = beat(run, rss_gb=3.21, gpu_gb=20.04)
    loss = explain_loss(run.path, process, ended(started))
    assert loss.ending == "killed"
    seen = f"; last seen at {at} with 3.2 GB of memory and 20.0 GB on the GPU"
    assert loss.reason == f"killed by SIGKILL; the kernel does not say by whom{seen}"
    unseen = explain_loss(run.path, process)  # Where nobody was there to see the exit code.
    assert (unseen.ending, unseen.reason) == (
        "killed",
        f"killed without a word (the process is gone){seen}",
    )


def test_a_kill_on_purpose_names_who_asked(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    ask(run.path, "kill", "", process)
    loss = explain_loss(run.path, process, ended(started))
    assert loss.ending == "killed" and loss.reason.startswith("killed by `salt-vla runs kill`, user ")
    other = replace(process, ticks=process.ticks + 1)
    assert "runs kill" not in explain_loss(run.path, other).reason


def test_a_signal_and_an_exit_code_are_told(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    loss = explain_loss(run.path, process, ended(started, signal.SIGTERM))
    assert (loss.ending, loss.reason) == ("signal", "ended by SIGTERM")
    loss = explain_loss(run.path, process, 1)
    assert (loss.ending, loss.reason) == ("exception", "ended with exit code 1; the end of log.txt says why")


@pytest.mark.parametrize("code", [None, -signal.SIGSEGV])
def test_a_crash_is_told_by_the_stack_in_the_log(run: RunDirectory, started: Any, code: int | None) -> None:
    process = a_process(started)
    ended(started)
    crash = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n"
    run.log_file.write_text(f"started, step 0; …\n{crash}  File 'x.py', line 1 in f\n")
    loss = explain_loss(run.path, process, code)
    assert loss.ending == "signal" and "crashed" in loss.reason and "Segmentation fault" in loss.reason
    assert "log.txt has the stacks" in loss.reason
    with run.log_file.open("a") as file:
        file.write("resumed at step 2; …\n")  # What is above was another process' end.
    assert "Segmentation fault" not in explain_loss(run.path, process, code).reason


def test_a_kill_for_want_of_memory_is_told_by_the_kernels_lines(
    run: RunDirectory, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = a_process(started)
    beat(run, rss_gb=3.9)
    lines = (
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/job_7,"
        f"task_memcg=/job_7,task=python,pid={process.pid},uid=0",
        f"Memory cgroup out of memory: Killed process {process.pid} (python) total-vm:8kB, "
        "anon-rss:3906250kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:1kB oom_score_adj:0",
    )
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    recorded = [KernelLine(now, line) for line in lines]
    monkeypatch.setattr(kernel_log, "kernel_lines", lambda: recorded)
    loss = explain_loss(run.path, process, ended(started))
    assert loss.ending == "out_of_memory" and loss.lines == lines
    said = "killed by the kernel for want of memory (the memory limit of /job_7 was reached)"
    assert loss.reason.startswith(f"{said} when it held 4.0 GB; last seen at ")
    assert explain_loss(run.path, process).ending == "out_of_memory"
    recorded[:] = [KernelLine(now - 1e6, line) for line in lines]  # Of another process, which had its pid.
    assert explain_loss(run.path, process).ending == "killed"


def test_a_count_of_the_control_group_tells_where_the_kernel_cannot_be_heard(
    run: RunDirectory, started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_log, "kernel_lines", list)
    process = a_process(started)
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 812\noom 3\noom_kill 1\noom_group_kill 0\n")
    before = OomCount(events, kills_in(events.read_text()))
    code = ended(started)
    assert explain_loss(run.path, process, code, before).ending == "killed"
    events.write_text("low 0\nhigh 0\nmax 900\noom 4\noom_kill 2\noom_group_kill 0\n")
    loss = explain_loss(run.path, process, code, before)
    assert loss.ending == "out_of_memory" and "in its control group, for want of memory" in loss.reason
    assert explain_loss(run.path, process, -signal.SIGTERM, before).ending == "signal"
    events.unlink()
    assert before.since() == 0


def test_counts_are_read_of_both_kinds_of_control_groups() -> None:
    assert kills_in("oom 4\noom_kill 2\noom_group_kill 7\n") == 2
    assert kills_in("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n") == 5
    assert kills_in("oom_kill_disable 0\nunder_oom 0\n") == 0
    assert oom_count(2**30) is None


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 40 MB."""
    folder = GROUPS / f"salt-vla-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(40 << 20))
    except OSError:
        pytest.skip("no control group can be made here")
    yield folder
    for _ in range(100):
        try:
            folder.rmdir()
            break
        except OSError:
            time.sleep(0.05)


def test_a_process_that_takes_too_much_is_killed_by_the_kernel_for_real(
    run: RunDirectory, started: Any, small_group: Path
) -> None:
    process = a_process(started, "input(); held = b'x' * (1 << 30)")
    (small_group / "cgroup.procs").write_text(str(process.pid))
    before = oom_count(process.pid)
    assert before is not None and before.kills == 0
    started[-1].stdin.write(b"\n")
    started[-1].stdin.close()
    code = started[-1].wait(timeout=60)
    loss = explain_loss(run.path, process, code, before)
    assert code == -signal.SIGKILL and loss.ending == "out_of_memory"
    assert "for want of memory" in loss.reason
    if os.access("/dev/kmsg", os.R_OK):
        assert loss.lines and f"the memory limit of /{small_group.name} was reached" in loss.reason


def test_a_machine_that_went_down_is_told(run: RunDirectory) -> None:
    process = ProcessId(os.getpid(), time.time() - 90_000, OTHER_BOOT, 4711)
    at = beat(run, rss_gb=1.0)
    loss = explain_loss(run.path, process)
    assert loss.ending == "machine"
    assert loss.reason.startswith("the machine went down while it worked (it was restarted, or it lost its")
    assert f"last seen at {at} with 1.0 GB of memory" in loss.reason
    working(run, process)
    status = run.status()
    assert (status.state, status.ending) == ("killed", "machine") and "restarted" in status.exit_reason


@pytest.mark.parametrize("held", ["", "{", "[]", '{"time": "now"}', '{"rss_gb": 1}'])
def test_a_damaged_heartbeat_tells_nothing(run: RunDirectory, started: Any, held: str) -> None:
    process = a_process(started)
    (run.path / "heartbeat.json").write_text(held)
    assert "last seen" not in explain_loss(run.path, process, ended(started)).reason


def test_what_is_found_out_is_written_down_once(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    working(run, process)
    assert explained(run).state == "running" and not run.log_file.exists()
    ended(started)
    assert (run.status().state, run.status().ended) == ("killed", 0.0)
    found = explained(run)
    assert (found.state, found.ending, found.step) == ("killed", "killed", 4) and found.ended > 0
    assert run.status() == found == explained(run)
    (line,) = run.log_file.read_text().splitlines()
    assert line.endswith(f"killed: {found.exit_reason}")


def test_a_run_that_others_have_taken_meanwhile_is_left_alone(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    working(run, process)
    ended(started)
    found = replace(run.status(), ending="out_of_memory", exit_reason="found late", ended=1.0)
    run.claim(9)
    assert run.settle(found).state == "running" and run.status().pid == os.getpid()
    run.set_status(run.status().over("finished", "finished", "finished"))
    assert run.settle(found).state == "finished"


def test_what_a_supervisor_is_about_to_write_down_is_left_to_it(run: RunDirectory, started: Any) -> None:
    process = a_process(started)
    working(run, process)
    ended(started)
    record(run.path, Supervision("token", "running", identity()))
    assert explained(run).ended == 0.0 and run.status().ended == 0.0
    record(run.path, Supervision("token", "running", process))  # That one is gone, too.
    assert explained(run).ended > 0


def test_where_nothing_can_be_written_it_is_only_told(
    run: RunDirectory, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = a_process(started)
    working(run, process)
    ended(started)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = (run.path / "status.json").read_bytes()
    assert explained(run).ended > 0
    assert (run.path / "status.json").read_bytes() == before and not run.log_file.exists()


def test_a_status_from_before_these_fields_is_read(run: RunDirectory) -> None:
    old = asdict(Status("stopped", step=3, exit_reason="because"))
    for name in ("ending", "ended", "boot", "ticks"):
        old.pop(name)
    (run.path / "status.json").write_text(json.dumps(old))
    assert explained(run) == Status("stopped", step=3, exit_reason="because")
