"""`salt-vla runs stop`, `kill`, `restart`, and `supervise`, which a launch starts and nobody types."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.operations import control
from salt_vla.operations.processes import go_on_apart
from salt_vla.operations.supervisor import supervise as carry_out


def stop(name: Annotated[str, tyro.conf.Positional], wait: float = 600.0) -> None:
    """End a run or job after the step at hand, with a checkpoint; it is not started again by itself.

    Example: salt-vla runs stop demo_student

    Args:
        name: of the run, or of the job that --detach or the queue started.
        wait: seconds to wait for it at most; asked again it goes on waiting.
    """
    reason = control.stop(name, wait, lambda line: print(line, file=sys.stderr))
    print(f"{name}: {reason}")


def kill(name: Annotated[str, tyro.conf.Positional]) -> None:
    """End a run or job at once, with all its processes; its last checkpoint is what is left.

    Example: salt-vla runs kill demo_student

    Args:
        name: of the run, or of the job that --detach or the queue started.
    """
    print(f"{name}: {control.kill(name)}")


def restart(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Start again what --detach or the queue started under that name, from where it stands.

    A run that goes on without its supervisor, which was killed, gets another one.

    Example: salt-vla runs restart demo_student

    Args:
        name: of the run or job.
    """
    print(f"{name}: under supervisor {control.restart(name).supervisor.pid}")


def supervise(folder: Annotated[Path, tyro.conf.Positional], apart: bool = False) -> int:
    """Carry out what a folder's launch.json asks for (`--detach` and the queue start this).

    Example: salt-vla runs supervise runs/demo_student

    Args:
        folder: of the run or job.
        apart: go on in a process that belongs to no terminal, and return when it is at work.
    """
    if apart:
        return go_on_apart(lambda at_work: carry_out(folder, at_work))
    return carry_out(folder)
