"""Meta-World: an empty place is filled with a few simulated episodes, a rendered one is read.

Knows neither the simulator nor the layout: `data/simulation.py` and the LeRobot source do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from salt_vla.data.segments import Listing, SourceOptions
from salt_vla.data.simulation import SimulationConfig, simulate
from salt_vla.data.sources import lerobot

# A look, in seconds; `salt-vla data simulate` has every setting.
FEW_EPISODES = SimulationConfig(
    tasks=("reach", "drawer-open"), train_episodes=2, validation_episodes=1, image_size=96
)


def recognises(path: Path) -> bool:
    """Never: what was rendered is a LeRobot data set, and nothing is rendered without being asked for."""
    return False


def segments(root: Path, options: SourceOptions) -> Listing:
    """As the LeRobot source gives them. Raises `ResourceError` naming the extra when it has to render but
    there is no simulator."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        simulate(FEW_EPISODES, root)
    return replace(lerobot.segments(root, options), source="sim")
