"""`salt-vla data show`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.errors import ConfigError


def show(
    table: Annotated[str, tyro.conf.Positional],
    out: Path,
    clip: tuple[str, ...] = (),
    random: int = 0,
    seed: int = 0,
    masks: tuple[str, ...] | None = None,
    view: int = 0,
    num_frames: int | None = None,
    frame_stride: int | None = None,
    image_size: int | None = None,
) -> None:
    """Draw clips on one picture (PNG) with their ids: what a model sees of them.

    Clips that cannot be read are an empty strip with the reason.

    Example: salt-vla data show so101.parquet --random 12 --masks demo_teacher --out sheet.png

    Args:
        table: a clip table, a data set's folder or list, or metaworld-mini.
        out: the PNG file to write.
        clip: ids of the clips to show.
        random: show so many clips drawn at random (default, without --clip: 8 spread over the table).
        seed: of the draw, and of the masks.
        masks: draw masks, those of the recipe named here (default: V-JEPA's); also its size and crops. Any
            field=value behind it changes the recipe (masks.truncate=pad).
        view: 0: the canonical view; 1, 2, …: the random crops and time shifts of the recipe of --masks.
        num_frames: frames of a clip; default: as the table was cut.
        frame_stride: file frames from one frame to the next; default: as the table was cut.
        image_size: pixels that a clip is cut to; default: the recipe's, else 224.
    """
    from salt_vla.jobs.data_show import Choice, look_at
    from salt_vla.jobs.data_show import show as draw
    from salt_vla.jobs.outputs import PICTURE, require_output
    from salt_vla.rundir import write_bytes

    recipes = [word for word in masks or () if "=" not in word]
    if len(recipes) > 1:
        raise ConfigError(f"--masks takes one recipe, not {len(recipes)}")
    require_output(out, PICTURE, [Path(table)])
    recipe = recipes[0] if recipes else None
    changed = [word for word in masks or () if "=" in word]
    look = look_at(table, recipe, masks is not None, view, num_frames, frame_stride, image_size, changed)
    shown = draw(table, Choice(clip, random, seed), look)
    write_bytes(out, shown.png)
    print(f"{out}: {shown.clips} clips, {len(shown.unreadable)} of them unreadable")
    for line in shown.masks:
        print(f"  {line}")
    for clip_id, reason in shown.unreadable:
        print(f"  {clip_id}: {reason}")
