"""How an attempt of a launched command ended, judged by its exit code and by what it wrote down itself:
whether it is to be started again, and the sentence that says so.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from salt_vla.errors import RunError
from salt_vla.operations.asked import asked_of
from salt_vla.operations.evidence import OomCount, explain_loss
from salt_vla.operations.launch import Attempt, Supervision
from salt_vla.redaction import without_secrets
from salt_vla.rundir import RunDirectory, Status

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
BAD_INPUT, HUNG, TIME_LIMIT = 2, 70, 75  # Exit codes of the command line; the last two are sysexits.h's.
SPEAKER = "salt-vla: "  # How the command line's sentences begin.
LAST_BYTES = 1 << 14
WORDS = {
    0: ("finished", "finished"),
    HUNG: ("hung; the watchdog ended it (exit code 70)", "watchdog"),
    TIME_LIMIT: ("stopped before its time limit (exit code 75)", "time_limit"),
}


@dataclass(frozen=True)
class Judgement:
    """`is_failure`: it is to be started again, as often as that was asked for. `ending`: one of
    `rundir.ENDINGS`."""

    is_failure: bool
    code: int | None
    reason: str
    ending: str


def ending_of(folder: Path, now: Supervision, attempt: Attempt, before: OomCount | None = None) -> Judgement:
    """Of an attempt that has ended; its `code` is None where nobody saw it. `before`: as it was then."""
    judged = _ending_of(folder, now, attempt, before)
    return replace(judged, reason=without_secrets(judged.reason))


def _ending_of(folder: Path, now: Supervision, attempt: Attempt, before: OomCount | None) -> Judgement:
    status, code = _status_of(folder, attempt), attempt.code
    if status is not None and status.state == "finished":
        # Its last checkpoint and its figures are there, whatever became of its process or was asked then.
        return Judgement(False, 0, status.exit_reason or "finished", "finished")
    if status is not None and status.state in ("stopped", "failed"):
        # Also with the exit code of bad input: what fails at work, for lack of memory or of a disk's space or
        # in a loader process, was no bad input when it began.
        fails = status.state == "failed" or status.ending == "time_limit"
        judged = Judgement(fails, code, status.exit_reason, status.ending)
    elif status is not None or code is None or code < 0:
        lost = attempt.process if status is None else status.process
        loss = explain_loss(folder, lost, code if lost == attempt.process else None, before)
        judged = Judgement(code is None or is_failure(code), code, loss.reason, loss.ending)
    else:
        judged = Judgement(is_failure(code), code, *_told_by(code, last_line(folder, code == BAD_INPUT)))
    asked = asked_of(folder, now.token)
    if asked is None or code == 0:
        return judged
    if asked.how == "kill":
        return Judgement(False, code, f"killed {asked.words}", "killed")
    told = judged.reason if asked.words in judged.reason else f"{judged.reason} ({asked.words})"
    ending = "stopped" if judged.ending == "signal" else judged.ending
    return replace(judged, is_failure=False, reason=told, ending=ending)


def is_failure(code: int) -> bool:
    """Whether a restart may help: not after success, bad input, or a signal that asks politely. A run that
    ended before its time limit goes on where it stopped."""
    stopped = {number for each in POLITE for number in (-each, 128 + each)}
    return code not in {0, BAD_INPUT} | stopped


def _told_by(code: int, last_line: str) -> tuple[str, str]:
    """The sentence and the word for an exit code."""
    if code - 128 in POLITE:
        return f"stopped by {signal.Signals(code - 128).name}", "signal"
    if code == BAD_INPUT and last_line:
        return last_line.removeprefix(SPEAKER), "exception"
    return WORDS.get(code, (f"exit code {code}" + f": {last_line}" * bool(last_line), "exception"))


def _status_of(folder: Path, attempt: Attempt) -> Status | None:
    """The run's status, where the process that last worked on it is the attempt's or was started by it."""
    with suppress(RunError):
        status = RunDirectory(folder).status()
        process = attempt.process
        if status.ticks and process.ticks:
            is_of_it = status.boot == process.boot and status.ticks >= process.ticks
        else:
            is_of_it = status.pid == process.pid and status.started == process.started
        return status if is_of_it and status.state != "running" else None
    return None


def complete_status(folder: Path, attempt: Attempt, judged: Judgement) -> bool:
    """Write the ending into the run's status.json where nobody has done so: it still says that the attempt's
    process works, or there is none, or it tells how an earlier process ended, since this one did not get as
    far as to take the run. Whether that was so."""
    run, status = RunDirectory(folder), _status_of(folder, attempt)

    def told(status: Status) -> Status:
        return replace(status, exit_reason=judged.reason, ending=judged.ending, ended=attempt.ended)

    if status is not None:
        found = told(status)
        return status.state == "killed" and not status.ended and run.settle(found) == found
    before = _status_before(run, attempt)
    if before is None or (judged.ending == "finished" and before.ending):
        return False  # It finished without having done anything to the run.
    found = replace(told(before), state=_state_of(judged))
    return run.settle(found, before) == found


def _status_before(run: RunDirectory, attempt: Attempt) -> Status | None:
    """What is to be replaced: not a later process' word, that of one that works, or a run's that has
    finished."""
    with suppress(RunError):
        status = run.status()
        is_earlier = status.started < attempt.process.started
        return status if is_earlier and status.state not in ("running", "finished") else None
    return None


def _state_of(judged: Judgement) -> str:
    if judged.ending == "finished":
        return "finished"
    if judged.ending == "stopped" or (judged.ending == "signal" and not judged.is_failure):
        return "stopped"
    return "killed" if judged.ending in ("signal", "killed", "out_of_memory", "machine") else "failed"


def last_line(folder: Path, is_sentence: bool) -> str:
    """Of the log: the end of a traceback, or what the command line said when it refused."""
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and line.startswith(SPEAKER * is_sentence)]
    return said[-1] if said else ""
