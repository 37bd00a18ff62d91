"""`salt-vla demo`"""

from __future__ import annotations

from typing import Annotated

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.errors import ConfigError
from salt_vla.rundir import launched


def demo(
    seed: int = 0,
    name: str = "demo",
    data: str = "metaworld-mini",
    seeds: int = 1,
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> None:
    """Train a small teacher on films of simulated robots, cache its latents, train a student, and report.

    Run again it goes on where it was interrupted, and redoes nothing that is finished.

    Example: salt-vla demo --seeds 3

    Args:
        seed: of weights, order, masks and views.
        name: its place: runs/NAME, runs/NAME_teacher, runs/NAME_student, caches/NAME.
        data: metaworld-mini, or the folder of a LeRobot data set.
        seeds: run seeds 0 to seeds - 1, one after another, and join their tables in runs/NAME_seeds.
    """
    if launched().size > 1:
        raise ConfigError("the demo runs in one process; start it without torchrun")
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {seeds}")
    if seeds > 1 and seed:
        raise ConfigError("give --seed or --seeds, not both")
    if apart.starts("demo", name, {"--data": data}):
        return
    if seeds > 1:
        from salt_vla.jobs.demo_seeds import run_seeds

        run_seeds(name, seeds, data)
        return
    from salt_vla.jobs.demo import run_demo
    from salt_vla.jobs.demo_plan import plan_demo

    run_demo(plan_demo(name, seed, data))
