"""How an attempt of a launched command ended, judged by its exit code and by what it wrote down itself:
whether it is to be started again, and the sentence that says so.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from salt_vla.errors import RunError
from salt_vla.operations.asked import asked_of
from salt_vla.operations.launch import Attempt, Supervision
from salt_vla.rundir import RunDirectory, Status

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
BAD_INPUT, HUNG, TIME_LIMIT = 2, 70, 75  # Exit codes of the command line; the last two are sysexits.h's.
UNSEEN = "gone, while no supervisor was there to see why"
WORDS = {
    0: "finished",
    BAD_INPUT: "refused: exit code 2, the log's last line says why",
    HUNG: "hung: the watchdog ended it (exit code 70)",
    TIME_LIMIT: "stopped before its time limit (exit code 75)",
}


@dataclass(frozen=True)
class Judgement:
    """`is_failure`: it is to be started again, as often as that was asked for."""

    is_failure: bool
    code: int | None
    reason: str


def ending_of(folder: Path, now: Supervision, attempt: Attempt) -> Judgement:
    """Of an attempt that has ended; its `code` is None where nobody saw it."""
    said = _own_word(folder, attempt)
    code = attempt.code
    if code is None and said is not None and said.state == "finished":
        code = 0
    asked = asked_of(folder, now.token)
    if asked is not None:
        return Judgement(False, code, _reason(said, code) + ("" if code == 0 else f", {asked.words}"))
    if said is not None and said.state == "stopped":
        return Judgement(said.exit_reason.startswith("stopped: time limit"), code, said.exit_reason)
    if code is None:
        return Judgement(True, None, said.exit_reason if said else UNSEEN)
    return Judgement(is_failure(code), code, _reason(said, code))


def is_failure(code: int) -> bool:
    """Whether a restart may help: not after success, bad input, or a signal that asks politely. A run that
    ended before its time limit goes on where it stopped."""
    stopped = {number for each in POLITE for number in (-each, 128 + each)}
    return code not in {0, BAD_INPUT} | stopped


def _reason(said: Status | None, code: int | None) -> str:
    if said is not None and said.exit_reason:
        return said.exit_reason
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code is not None and code - 128 in POLITE:
        return f"stopped by {signal.Signals(code - 128).name}"
    return UNSEEN if code is None else WORDS.get(code, f"exit code {code}")


def _own_word(folder: Path, attempt: Attempt) -> Status | None:
    """The run's status, where a process of this very attempt wrote it, and itself: not "killed", which is
    said of it by others."""
    with suppress(RunError):
        status = RunDirectory(folder).status()
        mine = status.pid == attempt.process.pid or status.started >= attempt.process.started
        return status if mine and status.pid and status.state in ("finished", "stopped", "failed") else None
    return None
