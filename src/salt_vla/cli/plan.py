"""`salt-vla plan`: the same as `train … --plan`, for whoever asks before there is a run."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from salt_vla.cli.train_plan import show_plan
from salt_vla.config import override
from salt_vla.errors import ConfigError
from salt_vla.recipes import get_recipe


def plan(
    recipe: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    max_steps: int | None = None,
    data: str | None = None,
    cache: str | None = None,
    batch_size: int | None = None,
    gpus: int | None = None,
    tflops: float | None = None,
    measure: bool = False,
    json: bool = False,
) -> None:
    """What a run will take, before it begins: work, parameters, memory, time, disk; and what looks wrong.

    Warns of schedules, batches, masks and intervals that do not fit the run's length, its clips or its disk.
    Without --measure the time is for GPUs of an assumed rate (--tflops); of a processor none is known then.
    With neither --gpus nor --tflops it is for this machine. Nothing is trained or written.

    Example: salt-vla plan demo_student --data metaworld-mini --measure

    Args:
        recipe: the experiment (`salt-vla recipes ls`).
        overrides: fields to change, as field=value.
        max_steps: the run would stop after this many steps, without changing the schedules.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        cache: the folder of the teacher's cached latents.
        batch_size: clips a step.
        gpus: devices that share the work; not given: one of this machine, or its processor.
        tflops: what each of them is assumed to sustain.
        measure: do 20 steps here, with random pixels, and reckon with their time and memory.
        json: print JSON instead of a table.
    """
    config = override(get_recipe(recipe).config, overrides)
    if batch_size is not None:
        config = dataclasses.replace(config, batch_size=batch_size)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {max_steps}")
    from salt_vla.jobs.train import with_paths

    show_plan(with_paths(config, data, cache), gpus, tflops, max_steps, measure, json, data is not None)
