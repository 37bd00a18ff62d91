"""`salt-vla demo`"""

from __future__ import annotations


def demo(seed: int = 0, name: str = "demo", data: str = "metaworld-mini") -> None:
    """Train a small teacher on films of simulated robots, cache its latents, train a student, and report.

    Run again it goes on where it was interrupted, and redoes nothing that is finished.

    Example: salt-vla demo --seed 1 --name demo_s1

    Args:
        seed: of weights, order, masks and views.
        name: its place: runs/NAME, runs/NAME_teacher, runs/NAME_student, caches/NAME.
        data: metaworld-mini, or the folder of a LeRobot data set.
    """
    from salt_vla.jobs.demo import run_demo
    from salt_vla.jobs.demo_plan import plan_demo

    run_demo(plan_demo(name, seed, data))
