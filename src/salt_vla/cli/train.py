"""`salt-vla train`"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.cli.train_plan import Ahead
from salt_vla.config import TrainConfig, override
from salt_vla.errors import ConfigError
from salt_vla.operations.session import recorded
from salt_vla.operations.trackers import require_trackers
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, Status, default_name, launched, root
from salt_vla.verdicts import noted_verdict

LONG_ENOUGH_FOR_PICTURES = 60.0  # Seconds: to a shorter run the second that they take would be a burden.


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    name: str | None = None,
    seed: int | None = None,
    max_steps: int | None = None,
    data: str | None = None,
    cache: str | None = None,
    batch_size: int | None = None,
    allow_change: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    branch: str | None = None,
    memory_limit: str | None = None,
    processes: int = 1,
    track: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
    ahead: Annotated[Ahead, tyro.conf.arg(name="")] = Ahead(),  # noqa: B008
) -> None:
    """Run a recipe; the same command with the same --name resumes it.

    Any field of the recipe can be set as field=value, for example optimizer.lr=3e-4.

    Example: salt-vla train demo_student optimizer.lr=5e-4 --name slower --seed 1

    Args:
        recipe: the experiment (`salt-vla recipes ls`).
        overrides: fields to change, as field=value.
        name: the run's name; default: the variable RUN_NAME, else the recipe's.
        seed: of weights, order, masks and views; default: the recipe's.
        max_steps: stop after this many steps, without changing the schedules.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        cache: the folder of the teacher's cached latents.
        batch_size: clips a step; where grad_accum_steps does not divide it, that is lowered too.
        allow_change: a field or section in which a resume may differ from the run's record; repeatable.
        branch: begin from another run's checkpoint, as RUN@STEP, with other steps or rates.
        memory_limit: what a step may take of the GPU's memory, or of RAM without one, such as 25GB.
        processes: with --detach, so many processes of this machine share the run, started by torchrun.
        track: a tracker that mirrors the metrics (wandb, trackio, tensorboard); repeatable.
    """
    experiment = get_recipe(recipe)
    config = _with_options(override(experiment.config, overrides), seed, batch_size, memory_limit)
    _require_sense(max_steps, branch, apart, ahead)
    require_trackers(track)
    run = RunDirectory.named(default_name(recipe) if name is None else name)
    if apart.detach:
        _require_inputs(run, config, data, cache, branch)
    if apart.starts("train", run.name, {"--data": data, "--cache": cache}, processes):
        return
    with nullcontext() if ahead.is_asked else recorded(run, track):
        from salt_vla.jobs import train as job

        config = job.with_paths(config, data, cache)
        if ahead.is_asked:
            return ahead.tell(config, max_steps, data is not None)
        if branch is not None and launched().rank == 0:  # The others wait until there is a run.
            from salt_vla.jobs.branch import branch as make_branch

            make_branch(run, config, branch, allow_change)
        status = job.train(config, run.name, max_steps, allow_change, experiment)
        _draw(run, status)
    _tell(run, recipe, status)


def _require_sense(max_steps: int | None, branch: str | None, apart: Apart, ahead: Ahead) -> None:
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {max_steps}")
    ahead.require_meaning(branch, max_steps)
    if apart.detach and ahead.is_asked:
        raise ConfigError("--detach would do nothing here: the answer comes at once")


def _require_inputs(
    run: RunDirectory, config: TrainConfig, data: str | None, cache: str | None, branch: str | None
) -> None:
    """What the run would be refused for as soon as it had begun apart, where nobody looks. Paths that are
    given and are not there are `Apart`'s business."""
    if data is None and not config.data.table:
        raise ConfigError("no data: give --data a clip table, a data set's folder, or metaworld-mini")
    target = config.target
    if target.provider in ("cache", "teacher") and cache is None and not target.source:
        raise ConfigError(
            f"target.provider {target.provider!r} needs a source: give --cache FOLDER or target.source=NAME"
        )
    if target.provider == "cache" and (cache is None or (cache.strip() and Path(cache).is_dir())):
        from salt_vla.cache.format import MANIFEST

        place = root() / target.source if cache is None else Path(cache)
        if not any((folder / MANIFEST).is_file() for folder in (place, place / "train")):
            raise ConfigError(
                f"there is no cache of training latents at {place}; build it with `salt-vla cache build`, or "
                "let the run wait for it: `salt-vla queue add --after-cache`"
            )
    if branch is not None:
        from salt_vla.jobs.branch import look_at_branch

        look_at_branch(run, branch)


def _with_options(
    config: TrainConfig, seed: int | None, batch_size: int | None, memory_limit: str | None
) -> TrainConfig:
    if memory_limit is not None:
        config = override(config, [f"runtime.memory_limit={memory_limit}"])
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    if batch_size is not None:
        parts = math.gcd(batch_size, config.grad_accum_steps)  # How it is computed, never what.
        config = dataclasses.replace(config, batch_size=batch_size, grad_accum_steps=parts)
    return config


def _draw(run: RunDirectory, status: Status) -> None:
    """Pictures of a run that has finished and took long enough."""
    if launched().rank == 0 and status.state == "finished" and status.seconds >= LONG_ENOUGH_FOR_PICTURES:
        from salt_vla.jobs.pictures import draw_at_end

        draw_at_end(run)


def _tell(run: RunDirectory, recipe: str, status: Status) -> None:
    print(f"{run.name}: {status.state} at step {status.step}")
    verdict = noted_verdict(run)
    if verdict:
        print(f"{recipe}'s hypothesis: {verdict['verdict']} ({verdict['reason']})")
