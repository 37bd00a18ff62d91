"""A process is known by what no other has: its pid, the tick of its start, and the machine's boot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.identity import ProcessId, boot_id, identity, state_and_ticks

HOUR = 3600.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_process_is_found_and_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    known = identity(sleeper.pid)
    assert known.is_alive() and known.boot == boot_id() != ""
    assert known.send(signal.SIGTERM)
    assert sleeper.wait() == -signal.SIGTERM
    assert not known.is_alive() and not known.send(signal.SIGTERM)


def test_what_has_ended_is_not_alive_though_nobody_has_waited_for_it(
    sleeper: subprocess.Popen[bytes],
) -> None:
    known = identity(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert state_and_ticks(sleeper.pid)[0] == "Z"
    assert not known.is_alive() and not known.send(signal.SIGTERM)


def test_a_clock_that_is_set_changes_nobodys_identity(sleeper: subprocess.Popen[bytes]) -> None:
    """Start times of day shift with the clock (the kernel counts from boot): only ticks are compared."""
    known = identity(sleeper.pid)
    assert replace(known, started=known.started + HOUR).is_alive()
    assert replace(known, started=known.started - HOUR).is_alive()


@pytest.mark.parametrize("other", ["ticks", "boot", "started"])
def test_a_pid_that_is_used_again_is_never_touched(sleeper: subprocess.Popen[bytes], other: str) -> None:
    known = identity(sleeper.pid)
    foreign = {
        "ticks": replace(known, ticks=known.ticks - 1),
        "boot": replace(known, boot="another start of the machine"),
        "started": ProcessId(known.pid, known.started - HOUR),  # As older versions wrote it.
    }[other]
    assert not foreign.is_alive() and not foreign.send(signal.SIGKILL)
    assert sleeper.poll() is None


def test_what_older_versions_wrote_down_is_still_found(sleeper: subprocess.Popen[bytes]) -> None:
    known = identity(sleeper.pid)
    assert ProcessId(known.pid, known.started + 0.5).is_alive()


def test_no_process_has_pid_nought_or_less() -> None:
    """Signals to such numbers go to whole groups."""
    assert not ProcessId(0, 0.0).send(signal.SIGTERM)
    assert not ProcessId(-1, 0.0).send(signal.SIGTERM)


def test_a_name_with_spaces_and_parentheses_hides_no_start(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert identity(process.pid).ticks == state_and_ticks(process.pid)[1] > 0
        assert identity(process.pid).ticks >= identity().ticks
        process.kill()


def test_there_is_no_identity_of_nobody() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        identity(process.pid)
