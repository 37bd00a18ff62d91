"""Which ends of a launched command are failures that a restart may mend, and in which words they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.identity import identity
from salt_vla.operations.asked import ask, asked_of
from salt_vla.operations.endings import complete_status, ending_of, is_failure
from salt_vla.operations.launch import Attempt, Supervision
from salt_vla.rundir import ENDINGS, RunDirectory, Status

ME = identity()
NOW = Supervision("token", "running", ME)
OF_ME = {"pid": ME.pid, "started": ME.started, "boot": ME.boot, "ticks": ME.ticks}


def attempt(code: int | None) -> Attempt:
    return Attempt(ME, code, ended=1.0)


@pytest.mark.parametrize("code", [1, 3, 70, 75, 134, 137, 139, -6, -7, -9, -11])
def test_crashes_hangs_and_time_limits_are_started_again(code: int, tmp_path: Path) -> None:
    assert is_failure(code)
    judged = ending_of(tmp_path, NOW, attempt(code))
    assert judged.is_failure and judged.code == code and judged.reason and judged.ending in ENDINGS


@pytest.mark.parametrize("code", [0, 2, 129, 130, 138, 143, -1, -2, -10, -15])
def test_success_bad_input_and_polite_signals_are_not(code: int, tmp_path: Path) -> None:
    judged = ending_of(tmp_path, NOW, attempt(code))
    assert not judged.is_failure and judged.reason


def test_what_was_asked_for_is_not_started_again_and_is_told(tmp_path: Path) -> None:
    ask(tmp_path, "kill", NOW.token, None)
    judged = ending_of(tmp_path, NOW, attempt(-9))
    assert not judged.is_failure
    assert judged.reason.startswith("killed by `salt-vla runs kill`, user ")


def test_what_was_asked_of_an_earlier_launch_or_another_process_does_not_count(tmp_path: Path) -> None:
    ask(tmp_path, "stop", "an earlier token", ME)
    assert ending_of(tmp_path, NOW, attempt(-9)).is_failure
    assert asked_of(tmp_path, process=ME) is not None
    assert asked_of(tmp_path, process=replace(ME, ticks=ME.ticks + 1)) is None
    (tmp_path / "asked.json").write_text('{"how": ')
    assert asked_of(tmp_path, "an earlier token") is None


def test_a_refusal_is_told_in_the_commands_own_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("salt-vla: an old one\nx\nsalt-vla: no such recipe\n12:00 it ended\n")
    assert ending_of(tmp_path, NOW, attempt(2)).reason == "no such recipe"
    assert ending_of(tmp_path, NOW, attempt(1)).reason == "exit code 1: 12:00 it ended"


def test_a_runs_own_word_counts_more_than_the_exit_code(tmp_path: Path) -> None:
    """torchrun's exit code is 1 whatever happened below it."""
    run = RunDirectory(tmp_path)
    run.set_status(Status("stopped", **OF_ME, exit_reason="stopped by SIGTERM", ending="signal"))
    judged = ending_of(tmp_path, NOW, attempt(1))
    assert (judged.is_failure, judged.reason, judged.ending) == (False, "stopped by SIGTERM", "signal")
    run.set_status(Status("stopped", **OF_ME, exit_reason="time limit", ending="time_limit"))
    assert ending_of(tmp_path, NOW, attempt(1)).is_failure
    run.set_status(Status("failed", **OF_ME, exit_reason="ValueError: x", ending="exception"))
    assert ending_of(tmp_path, NOW, attempt(None)).is_failure
    assert ending_of(tmp_path, NOW, attempt(2)).is_failure  # Such as a disk that was full at night.


def test_the_end_of_a_run_that_nobody_saw_is_known_by_its_status(tmp_path: Path) -> None:
    assert ending_of(tmp_path, NOW, attempt(None)).is_failure
    RunDirectory(tmp_path).set_status(Status("finished", **OF_ME, exit_reason="finished", ending="finished"))
    judged = ending_of(tmp_path, NOW, attempt(None))
    assert (judged.is_failure, judged.code) == (False, 0)


def test_the_word_of_an_earlier_process_is_not_this_ones(tmp_path: Path) -> None:
    before = OF_ME | {"ticks": ME.ticks - 1}
    RunDirectory(tmp_path).set_status(Status("finished", **before, exit_reason="finished"))
    assert ending_of(tmp_path, NOW, attempt(-9)).reason.startswith("killed by SIGKILL")


def test_a_loss_is_written_where_the_run_still_says_that_it_works(tmp_path: Path) -> None:
    gone = replace(ME, ticks=ME.ticks + 1)
    run, lost = RunDirectory(tmp_path), replace(attempt(-9), process=gone)
    run.set_status(Status("running", step=7, **OF_ME | {"ticks": gone.ticks}))
    assert complete_status(tmp_path, lost, ending_of(tmp_path, NOW, lost))
    status = run.status()
    assert (status.state, status.ending, status.step) == ("killed", "killed", 7)
    assert status.exit_reason.startswith("killed by SIGKILL") and status.ended == 1.0
    assert not complete_status(tmp_path, lost, ending_of(tmp_path, NOW, attempt(1)))
    assert run.status() == status


def test_a_run_that_failed_before_it_had_a_status_gets_one(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("Traceback\nModuleNotFoundError: No module named 'torch'\n")
    assert complete_status(tmp_path, attempt(1), ending_of(tmp_path, NOW, attempt(1)))
    status = RunDirectory(tmp_path).status()
    assert (status.state, status.ending) == ("failed", "exception")
    assert "No module named 'torch'" in status.exit_reason


def test_nothing_is_written_over_another_process_that_works(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.set_status(Status("running", step=3, **OF_ME))
    other = replace(attempt(2), process=replace(ME, ticks=ME.ticks - 5))
    assert not complete_status(tmp_path, other, ending_of(tmp_path, NOW, other))
    assert run.status().state == "running"


@pytest.mark.parametrize("code", [-9, -15, -11, 1, 143])
def test_a_run_that_has_finished_has_finished_whatever_ended_its_process_then(
    code: int, tmp_path: Path
) -> None:
    """Also where somebody asked it to end, too late."""
    RunDirectory(tmp_path).set_status(Status("finished", **OF_ME, exit_reason="finished", ending="finished"))
    ask(tmp_path, "stop", NOW.token, ME)
    judged = ending_of(tmp_path, NOW, attempt(code))
    assert (judged.is_failure, judged.code, judged.reason) == (False, 0, "finished")
    assert not complete_status(tmp_path, attempt(code), judged)


def test_an_attempt_that_ends_before_it_takes_the_run_is_its_last_word(tmp_path: Path) -> None:
    run, earlier = RunDirectory(tmp_path), {"ticks": ME.ticks - 1, "started": ME.started - 1.0}
    lost = Status("killed", step=7, **OF_ME | earlier, exit_reason="killed by SIGKILL", ending="killed")
    run.set_status(lost)
    ask(tmp_path, "stop", NOW.token, None)
    assert complete_status(tmp_path, attempt(-15), ending_of(tmp_path, NOW, attempt(-15)))
    status = run.status()
    assert (status.state, status.ending, status.step, status.ended) == ("stopped", "stopped", 7, 1.0)
    assert "ended by SIGTERM" in status.exit_reason and "runs stop`" in status.exit_reason
    (tmp_path / "log.txt").write_text("salt-vla: no such cache\n")
    assert complete_status(tmp_path, attempt(2), ending_of(tmp_path, replace(NOW, token="t"), attempt(2)))
    assert (run.status().state, run.status().exit_reason) == ("failed", "no such cache")


@pytest.mark.parametrize(
    "more", [{"state": "finished"}, {"started": ME.started + 60.0, "boot": "a later one"}]
)
def test_what_has_finished_and_what_came_later_is_not_told_anew(more: dict[str, Any], tmp_path: Path) -> None:
    earlier = OF_ME | {"ticks": ME.ticks - 1, "started": ME.started - 1.0, "state": "stopped"}
    RunDirectory(tmp_path).set_status(Status(**earlier | more, exit_reason="as it was", ending="stopped"))
    assert not complete_status(tmp_path, attempt(1), ending_of(tmp_path, NOW, attempt(1)))
    assert RunDirectory(tmp_path).status().exit_reason == "as it was"


def test_what_did_nothing_to_a_run_did_not_fail(tmp_path: Path) -> None:
    """Such as a plan."""
    judged = ending_of(tmp_path, NOW, attempt(0))
    assert complete_status(tmp_path, attempt(0), judged)
    assert RunDirectory(tmp_path).status().state == "finished"
