"""`salt-vla runs supervise`: what a launch starts; nobody types it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.operations.supervisor import supervise as carry_out


def supervise(folder: Annotated[Path, tyro.conf.Positional]) -> int:
    """Carry out what a folder's launch.json asks for (`--detach` and the queue start this).

    Example: salt-vla runs supervise runs/demo_student

    Args:
        folder: of the run or job.
    """
    return carry_out(folder)
