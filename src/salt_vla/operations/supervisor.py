"""The process that stays beside a launched command: starts it, waits for it, starts it again where that was
asked for, and writes down how each attempt ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from salt_vla.operations.launch import (
    Attempt,
    Launch,
    Supervision,
    changed,
    record,
    record_event,
    supervision,
    wanted_in,
)
from salt_vla.operations.processes import identity

SUPERVISED = "SALT_VLA_SUPERVISED"  # In the command's environment: it has no terminal and a log already.


def supervise(folder: Path) -> int:
    """Carry out what `launch.json` asks for; the exit code of the last attempt."""
    wanted = wanted_in(folder)
    before = supervision(folder)
    if before is not None and before.token == wanted.token:
        return 0
    now = Supervision(wanted.token, "starting", identity(), restarts_left=wanted.restarts)
    record(folder, now)
    wait = wanted.backoff_seconds
    while True:
        now, code = _attempt(folder, wanted, now)
        if code == 0 or not now.restarts_left:
            break
        now = replace(now, state="waiting", restarts_left=now.restarts_left - 1)
        record(folder, now)
        time.sleep(wait)
        wait *= 2
    record(folder, replace(now, state="ended", exit_reason=now.attempts[-1].reason))
    return code


def _attempt(folder: Path, wanted: Launch, now: Supervision) -> tuple[Supervision, int]:
    command = [sys.executable, "-m", "salt_vla", *wanted.command]
    environment = os.environ | wanted.environment | {SUPERVISED: str(folder)}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    me = identity(process.pid)
    now = replace(now, state="running", attempts=(*now.attempts, Attempt(me)))
    record(folder, now)
    record_event(folder, "started", pid=me.pid)
    code = process.wait()
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    now = changed(now, me, code=code, reason=reason, ended=time.time())
    record(folder, now)
    record_event(folder, "ended", pid=me.pid, code=code, reason=reason)
    return now, code
