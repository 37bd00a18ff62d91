"""Processes that wait until they are written down, outlive others or go with them, and whose end is seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from salt_vla.errors import RunError
from salt_vla.identity import ProcessId, identity, state_and_ticks
from salt_vla.operations import processes
from salt_vla.operations.heartbeat import Heartbeat, last_heartbeat
from salt_vla.operations.processes import (
    began,
    descendants,
    end_all,
    end_of,
    start_apart,
    start_detached,
    start_held,
    user_manager,
)

PATIENCE = 60.0  # Seconds.


@pytest.fixture
def sleepers() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command or ("sleep", "600")))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def write_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# Starts a child that is held, and is killed before it lets it go (`held`) or after (`begun`).
HOLDS = """
import os, signal, sys
from pathlib import Path
from salt_vla.operations.processes import start_held
place = Path(sys.argv[1])
command = ["/bin/sh", "-c", "echo began >> said; exec sleep 600"]
held = start_held(command, (1, 2), os.environ, place, place / "mark")
print(held.process.pid, held.process.ticks, flush=True)
if sys.argv[2] == "begun":
    held.begin()
    sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("stage", ["held", "begun"])
def test_a_child_begins_when_it_is_written_down_and_never_before(stage: str, tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path), stage], **pipes) as parent:
        pid, ticks = map(int, parent.stdout.readline().split())
        child = ProcessId(pid, 0.0, ticks=ticks)
        if stage == "begun":
            wait_until((tmp_path / "said").exists)
        parent.kill()
    if stage == "begun":
        assert child.is_alive() and began(child, tmp_path / "mark")
        assert os.getsid(pid) == pid
        assert child.send(signal.SIGKILL)
    else:
        wait_until(lambda: not child.is_alive())
        assert not (tmp_path / "said").exists() and not began(child, tmp_path / "mark")


def test_a_child_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        held = start_held(["/nowhere"], (log.fileno(), log.fileno()), os.environ, tmp_path, tmp_path / "mark")
    held.begin()
    assert os.waitstatus_to_exitcode(os.waitpid(held.process.pid, 0)[1]) == 127
    assert "/nowhere cannot be started" in (tmp_path / "log").read_text()


def test_the_end_of_any_process_is_seen_at_once(sleepers: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = sleepers()
    with end_of(identity(process.pid)) as has_ended:
        assert not has_ended(0.01)
        process.kill()
        assert has_ended(PATIENCE)
    with end_of(identity(process.pid)) as has_ended:  # Though nobody has waited for it.
        assert has_ended(PATIENCE)
    assert process.wait() == -signal.SIGKILL
    with end_of(ProcessId(process.pid, 0.0, ticks=1)) as has_ended:
        assert has_ended(0.0)
    with end_of(ProcessId(os.getpid(), 0.0, ticks=1)) as has_ended:  # Its number is another's now.
        assert has_ended(0.0)


def test_the_end_is_seen_on_systems_without_process_descriptors(
    sleepers: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    process = sleepers()
    with end_of(identity(process.pid)) as has_ended:
        assert not has_ended(0.01)
        assert identity(process.pid).send(signal.SIGKILL)
        assert has_ended(PATIENCE)


def test_what_shall_outlive_a_process_is_none_of_its_descendants(
    sleepers: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = identity(sleepers("sh", "-c", "sleep 600 & wait").pid)
    apart = start_detached(["sh", "-c", "sleep 600 & wait"], tmp_path / "said", os.environ)
    wait_until(lambda: len(psutil.Process().children(recursive=True)) >= 4)
    try:
        below = descendants(identity())
        assert child in below and apart not in below
        assert {each.pid for each in descendants(child)} < {each.pid for each in below}
        assert not {each.pid for each in psutil.Process(apart.pid).children()} & {e.pid for e in below}
        assert os.getsid(apart.pid) == apart.pid
    finally:
        for leader in (apart, child):
            for each in psutil.Process(leader.pid).children():
                each.kill()
        apart.send(signal.SIGKILL)
        os.waitpid(apart.pid, 0)


def test_leftovers_get_a_moment_and_are_killed_then(
    sleepers: Callable[..., subprocess.Popen[bytes]],
) -> None:
    quick, slow = sleepers("sleep", "0.2"), sleepers()
    assert end_all([identity(quick.pid), identity(slow.pid)], grace_seconds=1.0) == 1
    assert (quick.wait(), slow.wait()) == (0, -signal.SIGKILL)


SYSTEMCTL = 'echo "Version={version} (distribution)"\necho "SystemState={state}"'
SYSTEMD_RUN = 'echo "$@" > "{place}/asked"\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"'


@pytest.mark.parametrize(("version", "knows_oom"), [(252, False), (253, True), (257, True)])
def test_the_users_service_manager_keeps_it_where_there_is_one(
    version: int, knows_oom: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd's programs here are scripts that note what they are asked; none of ours is."""
    tools = tmp_path / "tools"
    write_program(tools, "systemctl", SYSTEMCTL.format(version=version, state="running"))
    write_program(tools, "systemd-run", SYSTEMD_RUN.format(place=tmp_path))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    manager = user_manager()
    assert manager is not None and manager.version == version
    start_apart(["sh", "-c", "echo worked"], tmp_path / "said", os.environ, "salt-vla-x.scope")
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--user --scope --collect --quiet --unit=salt-vla-x.scope")
    assert ("OOMPolicy=continue" in asked) == knows_oom
    assert (tmp_path / "said").read_text() == "worked\n"


def test_without_a_manager_that_answers_a_session_of_its_own_has_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    write_program(tools, "systemd-run", "exit 1")
    write_program(tools, "systemctl", SYSTEMCTL.format(version=257, state="offline"))
    assert user_manager() is None
    write_program(tools, "systemctl", "exit 1")
    assert user_manager() is None
    write_program(tools, "systemctl", "exec sleep 600")
    monkeypatch.setattr(processes, "SECONDS_TO_ANSWER", 0.2)
    assert user_manager() is None
    write_program(tools, "systemctl", SYSTEMCTL.format(version=257, state="degraded"))
    assert user_manager() is not None  # It answers, and systemd-run fails all the same.
    start_apart(["sh", "-c", "echo $PPID; ps -o sid= -p $$"], tmp_path / "said", os.environ, "x.scope")
    assert int((tmp_path / "said").read_text().split()[1]) != os.getsid(0)
    with pytest.raises(RunError, match="did not start"):
        start_apart(["false"], tmp_path / "said", os.environ, "x.scope")


def test_a_heartbeat_says_when_and_with_what_memory(
    sleepers: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    holds = "data = b'x' * 10**8; import subprocess; print(flush=True); subprocess.run(['sleep', '600'])"
    process = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    known = identity(process.pid)
    wait_until(lambda: descendants(known))
    before = time.time()
    heartbeat = Heartbeat(tmp_path)
    heartbeat.beat(known)
    told = last_heartbeat(tmp_path)
    assert before <= told["time"] + 0.001 and told["pid"] == process.pid and told["processes"] == 2
    assert 0.1 < told["rss_gb"] < 1.0
    assert heartbeat.next_look > time.monotonic()
    end_all([known, *heartbeat.known])
    process.wait()
    heartbeat.beat(known)  # Nobody is there any more: not an error.
    assert last_heartbeat(tmp_path)["rss_gb"] == 0.0
    (tmp_path / "heartbeat.json").write_text('{"time": 1')
    assert last_heartbeat(tmp_path) == {}
    assert not list(tmp_path.glob(".*.part"))


def test_a_gpu_that_does_not_answer_stops_no_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    write_program(tools, "nvidia-smi", 'echo "$@" > "$(dirname "$0")/asked"; printf "1024\\n2048\\n"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    answers, hangs = Heartbeat(tmp_path), Heartbeat(tmp_path)
    answers.beat(identity())
    wait_until(lambda: answers.gpu.process and state_and_ticks(answers.gpu.process)[0] == "Z")
    answers.beat(identity())
    assert last_heartbeat(tmp_path)["gpu_gb"] == pytest.approx(3.221, abs=0.001)
    assert "--id=0,3" in (tools / "asked").read_text()
    write_program(tools, "nvidia-smi", "exec sleep 600")
    for _ in range(3):
        hangs.beat(identity())
    assert "gpu_gb" not in last_heartbeat(tmp_path)
    assert hangs.gpu.process
    os.kill(hangs.gpu.process, signal.SIGKILL)


def test_a_mark_of_another_process_is_none(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert not began(identity(), mark)
    mark.write_text(json.dumps([os.getpid(), identity().ticks + 1]))
    assert not began(identity(), mark)
    mark.write_text("[1, ")
    assert not began(identity(), mark)
    mark.write_text(json.dumps([os.getpid(), identity().ticks]))
    assert began(identity(), mark)
