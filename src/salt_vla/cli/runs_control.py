"""`salt-vla runs supervise`: what a launch starts; nobody types it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.operations.processes import go_on_apart
from salt_vla.operations.supervisor import supervise as carry_out


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
