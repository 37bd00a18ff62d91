"""`from salt_vla import train`: the earlier attempt's training function, keyword by keyword, on our loop.

Owns the mapping of its keywords onto the configuration (docs/recipes.md has it as a table); what is done with
that is `jobs.train`'s. Its defaults are those of its first run, `baseline_tiny`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from salt_vla.config import TrainConfig, override
from salt_vla.errors import ConfigError, RunError
from salt_vla.jobs import train as job
from salt_vla.jobs.data import open_table, split_table
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, writing_to

BASE = "baseline_tiny"
TEACHER = "videomaev2_base"  # The earlier attempt's first teacher, for runs without a cache.
STRATEGIES = {"random": "random", "multiblock": "topup_block"}
SWITCHES = ("use_cached_latents", "use_dataloader_masks")
# Keyword → the fields that take its value as it is; the others are seen to in `seed_config` and `train`.
FIELDS = {
    "num_workers": ("data.num_workers",),
    "lr": ("optimizer.lr",),
    "min_lr": ("optimizer.lr_final",),
    "weight_decay_start": ("optimizer.weight_decay",),
    "weight_decay_end": ("optimizer.weight_decay_final",),
    "warmup_steps": ("optimizer.warmup_steps",),
    "log_interval": ("runtime.log_every",),
    "mask_ratio": ("masks.ratio",),
    "student_model_name": ("encoder.name",),
    "grad_clip": ("optimizer.grad_clip",),
    "betas": ("optimizer.betas",),
    "predictor_dim": ("predictor.dim",),
    "predictor_depth": ("predictor.depth",),
    "predictor_num_heads": ("predictor.num_heads",),
    "grad_checkpointing": ("encoder.grad_checkpointing", "predictor.grad_checkpointing"),
    "cudnn_benchmark": ("runtime.cudnn_benchmark",),
    "grad_accum_steps": ("grad_accum_steps",),
    "variance_loss_weight": ("objective.variance_weight",),
    "variance_target": ("objective.variance_target",),
    "covariance_loss_weight": ("objective.covariance_weight",),
    "tubelet_size": ("encoder.geometry.tubelet_size",),
    "patch_size": ("encoder.geometry.patch_size",),
}


def train(
    data_root: str | os.PathLike[str],
    *,
    split: str = "train",
    batch_size: int = 16,
    num_workers: int = 8,
    epochs: int = 10,
    lr: float = 1e-4,
    min_lr: float = 0.0,
    weight_decay_start: float = 0.05,
    weight_decay_end: float = 0.05,
    warmup_steps: int = 100,
    max_steps: int | None = None,
    log_interval: int = 20,
    mask_ratio: float = 0.75,
    masking_strategy: str = "random",
    use_cached_latents: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    student_model_name: str = "vit_tiny_patch16_224",
    grad_clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    predictor_dim: int = 384,
    predictor_depth: int = 6,
    predictor_num_heads: int = 6,
    grad_checkpointing: bool = False,
    cudnn_benchmark: bool = True,
    grad_accum_steps: int = 1,
    variance_loss_weight: float = 0.0,
    variance_target: float = 1.0,
    covariance_loss_weight: float = 0.0,
    use_dataloader_masks: bool = True,
    tubelet_size: int = 2,
    patch_size: int = 16,
    run_name: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    **unknown: object,
) -> RunDirectory:
    """Train a student as the earlier attempt's function of this name did; the run's directory.

    `data_root`: a clip table, a data set's folder, or metaworld-mini; `cache_dir`: the folder of cached
    latents. `batch_size` is what is computed at once, and `grad_accum_steps` of them make an update.
    `max_steps` ends the run early and leaves the schedules as they are. The run is `runs/<run_name>` below
    SALT_VLA_ROOT (default: the student's name); `log_dir` receives a link to it. The same call resumes it.

    Raises `ConfigError` for a keyword or a value that cannot be meant, and what training raises.
    """
    given = dict(locals())
    _require_known(given, unknown)
    config = job.with_paths(
        seed_config(given),
        str(data_root),
        str(cache_dir) if use_cached_latents else None,
    )
    _require_at_least_one(epochs=epochs, max_steps=1 if max_steps is None else max_steps)
    config = replace(config, steps=max(1, epochs * _updates_an_epoch(config)))
    run = RunDirectory.named(student_model_name if run_name is None else run_name)
    job.train(config, run.name, max_steps)
    if log_dir is not None:
        _link(Path(log_dir) / run.name, run.path)
    return run


def seed_config(given: Mapping[str, Any]) -> TrainConfig:
    """The configuration that the keywords mean, but for the data's and the cache's place and the number of
    steps, which takes counting clips."""
    if given["masking_strategy"] not in tuple(STRATEGIES):
        raise ConfigError(
            f"masking_strategy={given['masking_strategy']!r} is neither 'random' nor 'multiblock' (blocks "
            "topped up to the ratio); V-JEPA's own masks are those of recipes such as salt_vitb"
        )
    _require_at_least_one(batch_size=given["batch_size"], grad_accum_steps=given["grad_accum_steps"])
    settings = [(field, given[name]) for name, fields in FIELDS.items() for field in fields]
    settings += [
        ("masks.strategy", STRATEGIES[given["masking_strategy"]]),
        ("batch_size", given["batch_size"] * given["grad_accum_steps"]),
        ("data.masks_in", "loader" if given["use_dataloader_masks"] else "step"),
    ]
    if not given["use_cached_latents"]:
        settings += [("target.provider", "teacher"), ("target.source", TEACHER)]
    return override(get_recipe(BASE).config, [f"{field}={_text(field, value)}" for field, value in settings])


def _text(field: str, value: object) -> str:
    """As an override: text as it stands, all else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{field} cannot be {value!r}: {error}") from error


def _require_known(given: Mapping[str, Any], unknown: Mapping[str, object]) -> None:
    known = [name for name in given if name != "unknown"]
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise ConfigError(f"train has no keyword {name!r}; {hint}")
    for name in SWITCHES:
        if type(given[name]) is not bool:
            raise ConfigError(f"{name} must be True or False, not {given[name]!r}")
    if given["split"] != "train":
        raise ConfigError(
            f"split={given['split']!r}: only 'train' is learned from; others are for evaluation"
        )
    if given["use_cached_latents"] and given["cache_dir"] is None:
        raise ConfigError(
            "use_cached_latents=True needs cache_dir, the folder that `salt-vla cache build --out` wrote; "
            "to run the teacher in the loop give use_cached_latents=False"
        )


def _require_at_least_one(**numbers: object) -> None:
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")


def _updates_an_epoch(config: TrainConfig) -> int:
    """Whole batches of the clips that can be learned from."""
    table = open_table(config.data.table, config.data.view, config.geometry)
    if config.target.provider == "teacher":
        clips = len(split_table(table).train)
    else:
        targets, splits = job.open_targets(config, table, "cpu")
        ids = splits.train.clip_ids
        clips = len(ids) if targets.train is None else int(sum(targets.train.with_views(ids, 1)))
    if clips < config.batch_size:
        raise ConfigError(
            f"{clips} clips to learn from make no batch of {config.batch_size}; lower batch_size"
        )
    return clips // config.batch_size


def _link(link: Path, run: Path) -> None:
    """Let `link` lead to the run; something else of that name is left alone, and said."""
    if link.is_symlink() and link.resolve() == run.resolve():
        return
    if link.is_symlink() or link.exists():
        raise RunError(f"the run is in {run}; {link} is something else, so no link to it was made there")
    with writing_to(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(run.resolve(), target_is_directory=True)
