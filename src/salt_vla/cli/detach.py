"""`--detach` of the commands that work long: the same command line again, under a supervisor."""

from __future__ import annotations

import sys
from uuid import uuid4

from salt_vla.operations.launch import Launch, launch


def start_apart(name: str, restarts: int) -> None:
    """Start this process' command line again, without `--detach`, as the launch `name`."""
    command = tuple(word for word in sys.argv[1:] if word != "--detach")
    now = launch(Launch(name, command, uuid4().hex, restarts))
    print(
        f"{name}: started under supervisor {now.supervisor.pid}; `salt-vla runs show {name}` says how it goes"
    )
