"""`salt-vla runs pictures`"""

from __future__ import annotations

from typing import Annotated

import tyro

from salt_vla.rundir import RunDirectory


def pictures(name: Annotated[str, tyro.conf.Positional], clip: str | None = None) -> None:
    """Draw a run's masks and what its encoder makes of a held-out clip, into runs/NAME/pictures/.

    A run that took a minute or more draws them when it has finished; the dashboard shows them.

    Example: salt-vla runs pictures demo_student

    Args:
        name: the run's name.
        clip: another clip, by its id (`salt-vla data show` prints ids).
    """
    run = RunDirectory.named(name).require()
    from salt_vla.jobs.pictures import draw_pictures

    for path in draw_pictures(run, clip):
        print(path)
