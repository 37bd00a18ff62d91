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
from salt_vla.operations.launch import Attempt, Supervision
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


def ending_of(folder: Path, now: Supervision, attempt: Attempt) -> Judgement:
    """Of an attempt that has ended; its `code` is None where nobody saw it."""
    said, code = _own_word(folder, attempt), attempt.code
    if said is not None:
        code = 0 if code is None and said.state == "finished" else code
        # Also with the exit code of bad input: what fails at work, for lack of memory or of a disk's space or
        # in a loader process, was no bad input when it began.
        fails = said.state == "failed" or said.ending == "time_limit"
        judged = Judgement(fails, code, said.exit_reason, said.ending)
    elif code is None:
        judged = Judgement(True, None, "gone, while no supervisor was there to see why", "killed")
    else:
        judged = Judgement(
            is_failure(code), code, *_told_by(code, last_line(folder, SPEAKER if code == BAD_INPUT else ""))
        )
    asked = asked_of(folder, now.token)
    if asked is None or code == 0:
        return judged
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
    number = -code if code < 0 else code - 128
    if number in POLITE:
        return f"stopped by {signal.Signals(number).name}", "signal"
    if code < 0:
        return f"killed by {signal.Signals(number).name}", "killed" if number == signal.SIGKILL else "signal"
    if code in WORDS:
        return WORDS[code]
    if code == BAD_INPUT and last_line:
        return last_line.removeprefix(SPEAKER), "exception"
    return f"exit code {code}" + f": {last_line}" * bool(last_line), "exception"


def _own_word(folder: Path, attempt: Attempt) -> Status | None:
    """What a process of this very attempt said of its end itself."""
    with suppress(RunError):
        status = RunDirectory(folder).status()
        if is_of(status, attempt) and status.state in ("finished", "stopped", "failed"):
            return status
    return None


def is_of(status: Status, attempt: Attempt) -> bool:
    """Whether the process that last worked on the run is the attempt's or was started by it."""
    process = attempt.process
    if not (status.ticks and process.ticks):
        return status.pid == process.pid and status.started == process.started
    return status.boot == process.boot and status.ticks >= process.ticks


def complete_status(folder: Path, attempt: Attempt, judged: Judgement) -> bool:
    """Write the ending into the run's status.json where nobody has done so: it still says that the attempt's
    process works, or there is none. Whether that was so."""
    run = RunDirectory(folder)
    with suppress(RunError):
        status = run.status()
        is_lost = status.state == "killed" and not status.ended and is_of(status, attempt)
        if not is_lost and status.state != "queued":
            return False
        state = "killed" if is_lost else "stopped" if judged.ending in ("stopped", "signal") else "failed"
        ended = replace(status, state=state, exit_reason=judged.reason, ending=judged.ending)
        run.set_status(replace(ended, ended=attempt.ended))
        return True
    return False


def last_line(folder: Path, beginning: str = "") -> str:
    """Of the log, of those that begin so: the end of a traceback, or what the command line said when it
    refused."""
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and line.startswith(beginning)]
    return said[-1] if said else ""
