"""What surrounds the work of a run in its own process: the log, the mirrors of its metrics, and what is
written anew when it has ended. None of it can slow the work or end it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from salt_vla import capture, senders
from salt_vla.errors import UserError
from salt_vla.operations.asked import asked_of
from salt_vla.operations.trackers import following
from salt_vla.redaction import without_secrets
from salt_vla.rundir import DETACHED, RunDirectory, launched, second_log


@contextmanager
def recorded(run: RunDirectory, trackers: Sequence[str] = ()) -> Iterator[None]:
    """From here on all that the process says is in the run's log too, which ends with how the run did;
    within the block trackers follow its metrics. Of several processes of a run the first one alone."""
    if launched().rank != 0 or _is_anothers(run):
        yield  # It says nothing, or will be refused, and that is no business of the run's log.
        return
    if launched().size == 1:  # Launchers pass signals on, and processes that work together agree on them.
        senders.listen(partial(_farewell, run))
    capture.start(run.log_file, second_log(run.name), mark=DETACHED)
    problem = ""
    try:
        with following(run, trackers):
            senders.listen_again()
            yield
    except BaseException as error:
        problem = without_secrets(f"{type(error).__name__}: {error}")
        raise
    finally:
        _name_who_asked(run)
        after_run(run)
        senders.stop_listening()  # What comes now ends this process as it would any other.
        capture.last_words(_last_words(run, problem))


def _is_anothers(run: RunDirectory) -> bool:
    with suppress(UserError):
        status = run.status()
        return status.state == "running" and status.pid != os.getpid()
    return False


def _farewell(run: RunDirectory, number: signal.Signals, sender: str) -> None:
    """A signal is about to end this process at once: the second one that asked politely, or another."""
    reason = f"ended by {number.name}{sender}, before the step's end"
    with suppress(UserError):
        status = run.status()
        if status.pid == os.getpid() and status.state == "running":
            state = "stopped" if number in senders.POLITE else "killed"
            run.set_status(status.over(state, "signal", reason))
            _name_who_asked(run)
    capture.last_words(_last_words(run, reason))
    capture.say_at_once()


def _name_who_asked(run: RunDirectory) -> None:
    """A signal that `salt-vla runs stop` sent is that one's end, not just anybody's."""
    with suppress(UserError):
        status = run.status()
        asked = asked_of(run.path, process=status.process)
        if asked is not None and status.pid == os.getpid() and status.ending == "signal":
            reason = f"{status.exit_reason} ({asked.words})"
            run.set_status(replace(status, ending="stopped", exit_reason=reason))


def _last_words(run: RunDirectory, problem: str) -> str:
    """The log's last line. The status is another's where this process was refused."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        status = run.status()
    except UserError as error:
        return f"{when} ended: {problem or error}"
    if status.pid == os.getpid() and status.ending:
        why = f": {status.exit_reason}" if status.exit_reason != status.state else ""
        return f"{when} {status.state} at step {status.step}{why}"
    return f"{when} process {os.getpid()} ended before the run began: {problem or 'nothing was to be done'}"


def after_run(run: RunDirectory) -> None:
    """When a run has ended, however: what is said of all runs is written anew."""
    from salt_vla.operations.handoff import refresh

    refresh(run)
