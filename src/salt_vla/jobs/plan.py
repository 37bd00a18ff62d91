"""`plan`: all that a run will take before it begins, and what looks wrong with its clips, masks, intervals,
disk and time, around what a step takes (`train_plan`). Trains nothing, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from salt_vla.cache.format import MANIFEST
from salt_vla.config import TrainConfig
from salt_vla.errors import ConfigError, UserError
from salt_vla.jobs.build_cache import find_split
from salt_vla.jobs.data import open_table, split_table
from salt_vla.jobs.resources import target_size
from salt_vla.jobs.train_plan import TIME, TrainPlan, describe, plan_training, scaled
from salt_vla.jobs.train_trial import Measured, measured_steps
from salt_vla.masks import GroupStatistics, build_masks, report_masks
from salt_vla.rundir import root
from salt_vla.training.memory import PROCESS

ROW_BYTES = 700  # A line of metrics, in the mean of the demo's runs.
SEEN = (0.05, 0.6)  # The share of a clip's tokens that its context is, in recipes that work.
MOST_LINES, FEWEST_LINES = 50_000, 20
HOURS_AT_RISK = 2.0  # That an interruption may cost.
MOST_CHECKPOINTING = 0.1  # Share of the time that goes into checkpoints, at `DISK_SPEED` bytes a second.
DISK_SPEED = 3e8
MOST_EPOCHS = 400


@dataclass(frozen=True)
class Clips:
    """How many there are to learn from and held out; `problem` says why that is not known."""

    train: int = 0
    validation: int = 0
    problem: str = ""


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins. Bytes; `steps` is where it ends, of a schedule of `step.steps`. `cache_bytes`
    are still to be written, 0 where the cache is there or none is read."""

    step: TrainPlan
    steps: int
    clips: Clips
    masks: list[GroupStatistics]
    cache_bytes: int
    metrics_bytes: int
    measured: Measured | None
    warnings: list[str]

    @property
    def disk_bytes(self) -> int:
        return self.step.checkpoint_bytes * self.step.checkpoints + self.cache_bytes + self.metrics_bytes

    @property
    def epochs(self) -> float | None:
        return self.steps * self.step.batch_size / self.clips.train if self.clips.train else None

    @property
    def measured_hours(self) -> float | None:
        return None if self.measured is None else self.steps * self.measured.seconds / 3600

    def as_json(self) -> dict[str, Any]:
        measured = None
        if self.measured is not None:
            measured = self.measured.as_json() | {"hours": self.measured_hours}
        return self.step.as_json() | {
            "ends_at": self.steps,
            "train_clips": self.clips.train,
            "validation_clips": self.clips.validation,
            "epochs": self.epochs,
            "masks": [str(group) for group in self.masks],
            "cache_bytes": self.cache_bytes,
            "metrics_bytes": self.metrics_bytes,
            "disk_bytes": self.disk_bytes,
            "measured": measured,
            "warnings": self.warnings,
        }


def plan_run(
    config: TrainConfig,
    gpus: int | None = None,
    tflops: float | None = None,
    max_steps: int | None = None,
    measure: bool = False,
    must_have_clips: bool = False,
) -> RunPlan:
    """The plan; with `measure`, from steps that are really done on this machine. Raises `ConfigError` for
    options that mean nothing, `ResourceError` where no step can be done, and, with `must_have_clips`, what a
    run would raise that cannot read its clips."""
    if measure and gpus is not None and gpus > 1:
        raise ConfigError("--measure does steps on one device: leave out --gpus")
    step = plan_training(config, gpus, tflops)
    ends = min(config.steps, max_steps or config.steps)
    target, clips = target_size(config), count_clips(config, must_have_clips)
    keys = clips.train * config.data.view.num_views + clips.validation
    lines = ends // config.runtime.log_every + ends // config.runtime.validate_every + 2
    plan = RunPlan(
        step=step,
        steps=ends,
        clips=clips,
        masks=report_masks(build_masks(config.masks, config.geometry), min(config.batch_size, 64)).groups,
        cache_bytes=0 if not lacks_cache(config) else keys * target.record_bytes,
        metrics_bytes=lines * ROW_BYTES,
        measured=measured_steps(config) if measure else None,
        warnings=[],
    )
    return replace(plan, warnings=[*step.warnings, *_warnings(config, plan)])


def count_clips(config: TrainConfig, must_be_there: bool = False) -> Clips:
    """Of the recipe's table, as a run would share them out. A table that cannot be read is an error only
    where it `must_be_there`: a recipe may name one of another machine."""
    try:
        table = open_table(config.data.table, config.data.view, config.geometry)
        splits = split_table(table)
    except (UserError, FileNotFoundError) as error:
        if must_be_there:
            raise
        return Clips(problem=str(error))
    return Clips(len(splits.train), len(splits.validation))


def lacks_cache(config: TrainConfig) -> bool:
    """Whether it reads latents that nobody has cached yet, or only some of."""
    target = config.target
    if target.provider != "cache":
        return False
    folder = find_split(root() / target.source, "train") if target.source else None
    return folder is None or not (folder / MANIFEST).is_file()


def _warnings(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    yield from _of_schedule(config, plan)
    yield from _of_clips(config, plan)
    yield from _of_masks(config, plan)
    yield from _of_intervals(config, plan)
    yield from _of_room(config, plan)


def _of_schedule(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    rates = config.optimizer
    if plan.steps < config.steps:
        yield (
            f"the schedules are for {config.steps:,} steps and the run ends at {plan.steps:,}: the rate "
            f"never falls to {rates.lr_final:g}; set steps={plan.steps} for a run that is meant to be short"
        )
    if rates.schedule == "cooldown" and not rates.cooldown_steps:
        yield f"the rate stays at {rates.lr:g} until the end: optimizer.cooldown_steps is 0"
    if rates.lr_start > rates.lr or rates.lr_final > rates.lr:
        yield f"the rate's peak {rates.lr:g} is below its start {rates.lr_start:g} or end {rates.lr_final:g}"


def _of_clips(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    if plan.clips.problem:
        yield f"how many clips there are is not known: {plan.clips.problem}"
        return
    clips, batch, epochs = plan.clips.train, config.batch_size, plan.epochs
    assert epochs is not None
    if clips < batch:
        yield f"a batch of {batch} is more than the {clips} clips to learn from: steps repeat clips"
    elif clips < 10 * batch:
        yield f"an epoch has {clips // batch} steps: {clips} clips in batches of {batch}"
    if epochs < 1:
        yield f"the run sees {epochs:.0%} of its {clips:,} clips"
    elif epochs > MOST_EPOCHS:
        yield f"every clip is seen {epochs:,.0f} times"
    wanted = config.runtime.validation_clips
    if wanted > plan.clips.validation:
        yield f"{wanted} held-out clips are asked for and there are {plan.clips.validation}"


def _of_masks(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    tokens = config.geometry.num_tokens
    for group in plan.masks:
        share = group.context / tokens
        if not SEEN[0] <= share <= SEEN[1]:
            yield (
                f"mask group {group.group} leaves {share:.0%} of the tokens to see; {SEEN[0]:.0%} to "
                f"{SEEN[1]:.0%} is usual (masks.ratio, masks.blocks)"
            )


def _of_intervals(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    runtime, steps = config.runtime, plan.steps
    if not runtime.validation_clips:
        yield "nothing is held out (runtime.validation_clips=0): the loss on what is learned says little"
    elif runtime.validate_every > steps:
        yield f"held-out clips are looked at only at the end: validate_every={runtime.validate_every}"
    if steps // runtime.log_every < FEWEST_LINES:
        yield f"the curve has {steps // runtime.log_every} points: runtime.log_every={runtime.log_every}"
    elif steps // runtime.log_every > MOST_LINES:
        yield f"the curve has {steps // runtime.log_every:,} points: raise runtime.log_every"
    if runtime.checkpoint_every > steps:
        yield f"an interruption costs the whole run: runtime.checkpoint_every={runtime.checkpoint_every}"
    if plan.measured is not None:
        between = plan.measured.seconds * min(runtime.checkpoint_every, runtime.validate_every)
        if between > 3600 * HOURS_AT_RISK:
            yield f"checkpoints lie {between / 3600:.1f} h apart: lower runtime.checkpoint_every"
        share = plan.step.checkpoint_bytes / DISK_SPEED / between
        if share > MOST_CHECKPOINTING:
            yield f"checkpoints take about {share:.0%} of the time: raise runtime.checkpoint_every"


def _of_room(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    of_checkpoints = plan.step.checkpoint_bytes * plan.step.checkpoints
    if of_checkpoints <= plan.step.free_disk < plan.disk_bytes:  # Else it has been said already.
        yield (
            f"checkpoints and the cache take {plan.disk_bytes / 1e9:.1f} GB and "
            f"{plan.step.free_disk / 1e9:.1f} GB are free at {root()}"
        )
    if lacks_cache(config):
        source = config.target.source or "nowhere (--cache)"
        yield f"the latents that it learns from are not cached yet at {source}: salt-vla cache build"
    if plan.measured is not None and plan.measured.bytes > plan.measured.room:
        yield f"a step took {plan.measured.bytes / 1e9:.1f} GB, of {plan.measured.room / 1e9:.1f} GB free"


def describe_run(plan: RunPlan) -> list[dict[str, str]]:
    """Rows for a person; warnings last."""
    step = describe(replace(plan.step, warnings=[]))
    if plan.measured is not None:
        step = [row for row in step if row["field"] != TIME]
    rows: dict[str, str] = {}
    if plan.epochs is not None:
        rows["clips"] = f"{plan.clips.train:,} to learn from, {plan.clips.validation:,} held out"
        rows["epochs"] = f"{plan.epochs:.3g}, of {plan.clips.train / plan.step.batch_size:,.0f} steps"
    for group in plan.masks:
        rows[f"masks, group {group.group}"] = str(group).partition(": ")[2]
    if plan.cache_bytes:
        rows["cache to be built"] = scaled(plan.cache_bytes, "B")
    rows["metrics"] = scaled(plan.metrics_bytes, "B")
    rows["disk in all"] = scaled(plan.disk_bytes, "B")
    if plan.measured is not None:
        rows |= _measured_rows(plan, plan.measured)
    said = step + [{"field": name, "value": value} for name, value in rows.items()]
    return said + [{"field": "warning", "value": text} for text in plan.warnings]


def _measured_rows(plan: RunPlan, measured: Measured) -> dict[str, str]:
    hours = plan.measured_hours or 0.0
    rate = plan.step.flops.total * plan.step.batch_size / measured.seconds / 1e12
    ran = f"{measured.steps} steps on {measured.device}, {measured.precision}"
    whole = f"{hours:.1f} h" if hours >= 1 else f"{math.ceil(60 * hours)} min"
    return {
        "measured": f"{measured.seconds * 1000:,.0f} ms a step, {rate:.3g} TFLOP/s ({ran}, without data)",
        "time then": f"{whole} for {plan.steps:,} steps, validation and checkpoints not counted",
        "memory measured": f"{measured.bytes / 1e9:.2f} GB with the process' {PROCESS['cpu'] / 1e9:.2f} GB",
    }
