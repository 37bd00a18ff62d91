"""`salt-vla data …`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def index(
    root: Annotated[Path, tyro.conf.Positional],
    out: Path,
    num_frames: int = 16,
    frame_stride: int = 4,
    hop: int = 16,
    camera: tuple[str, ...] = (),
    source: str = "lerobot",
) -> None:
    """Write the clip table of a data set.

    Example: salt-vla data index ~/datasets/so101 --out so101.parquet --num-frames 16 --frame-stride 4

    Args:
        root: the data set's folder.
        out: the Parquet file to write.
        num_frames: frames of a clip.
        frame_stride: file frames from one of a clip's frames to the next.
        hop: file frames from one clip's start to the next.
        camera: only these cameras (default: all).
        source: the data set's layout.
    """
    from salt_vla.config import ViewConfig
    from salt_vla.data.segments import Cutting, SourceOptions
    from salt_vla.errors import ConfigError
    from salt_vla.jobs.data_index import index_data

    for name, value in (("num-frames", num_frames), ("frame-stride", frame_stride), ("hop", hop)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
    cutting = Cutting(ViewConfig(frame_stride=frame_stride), num_frames, hop)
    table, _ = index_data(root, cutting, source, SourceOptions(cameras=camera))
    table.write(out)
    print(f"{out}: {len(table)} clips")


def simulate(
    out: Path,
    task: tuple[str, ...] = (),
    train_episodes: int = 20,
    validation_episodes: int = 10,
    image_size: int = 128,
    seed: int = 0,
) -> None:
    """Render robot episodes in Meta-World as a LeRobot data set; needs the extra `sim`.

    The defaults make metaworld-mini, the data set that comes with the package.

    Example: salt-vla data simulate --out datasets/metaworld-large --train-episodes 200

    Args:
        out: the new data set's folder.
        task: Meta-World tasks (default: the twelve of metaworld-mini).
        train_episodes: per task.
        validation_episodes: per task.
        image_size: height and width in pixels.
        seed: of starts, goals, noise and cameras.
    """
    from salt_vla.data.simulation import DEFAULT_TASKS, SimulationConfig
    from salt_vla.data.simulation import simulate as render

    config = SimulationConfig(
        tasks=task or DEFAULT_TASKS,
        train_episodes=train_episodes,
        validation_episodes=validation_episodes,
        image_size=image_size,
        seed=seed,
    )
    print(f"{render(config, out)}: done")
