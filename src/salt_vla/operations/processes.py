"""Processes that outlive whoever starts them: apart from any terminal, under the user's service manager where
there is one. Whether they live and what is sent to them is `identity`'s business.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from salt_vla.identity import ProcessId, boot_id, identity

__all__ = ["ProcessId", "boot_id", "identity", "start_detached"]


def start_detached(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> ProcessId:
    """Start `command` in a session of its own, without a terminal and with nobody waiting for it; what it
    says goes to the end of `output`. `environment` replaces this process' own."""
    with output.open("ab") as said:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=dict(environment),
            start_new_session=True,
            close_fds=True,
        )
    started = identity(process.pid)
    process.returncode = 0  # Nobody here waits for it: it outlives this process.
    return started
