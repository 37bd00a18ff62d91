"""`salt-vla cache …`"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.config import DataConfig, TrainConfig
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from salt_vla.data.clip_table import ClipTable
    from salt_vla.teachers import Teacher


def build(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    teacher: str,
    out: Path,
    split: str = "train",
    data: str = "metaworld-mini",
    recipe: str | None = None,
    encoding: Literal["float16", "int8"] = "float16",
    layer: int = -1,
    final_norm: Literal["model", "none"] = "model",
    num_views: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    memory_limit: str = "",
    workers: int | None = None,
    shard: str = "0/1",
) -> None:
    """Cache a frozen teacher's latents for one split; again with the same arguments goes on.

    Started several times at once, on one machine or on several with a shared disk, they share the work.

    The student's recipe says which frames, crops and views to cache. Without one they are those that the
    teacher was trained with, or, for teachers not trained here, that the clip table was cut for. Any field
    can be set as field=value.

    Example: salt-vla cache build --teacher vjepa2_vitl --recipe salt_vitb --data ssv2.parquet --out caches/s

    Args:
        overrides: fields to change, as field=value, for example data.view.frame_stride=2.
        teacher: a run's name, a directory, a published teacher's name or a hub id (docs/teachers.md).
        out: the cache's folder; a second split built there lies in a folder of its own below it.
        recipe: the student's recipe (`salt-vla recipes ls`).
        split: which clips of the table.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        encoding: float16, or int8 with scales per token and channel (half the bytes).
        layer: take the tokens after this block, 1 … depth, or from the end (-1: the last).
        final_norm: the network's own final norm (`model`), or the raw residual stream (`none`).
        num_views: views of a clip to cache; default: the recipe's, or as the teacher was trained.
        device: where the teacher runs; `auto` is CUDA where there is one.
        dtype: what it computes in.
        memory_limit: as 25GB: let as many clips pass the teacher at once as this holds (default: 32 clips).
        workers: processes that decode videos; default: the recipe's data.num_workers, or what suits here.
        shard: as 2/8: this is builder 2 of 8 (counted from 0), each of which begins with shards of its own.
    """
    from salt_vla.jobs.build_cache import How, build_cache, parse_stripe

    stripe = parse_stripe(shard)
    what = _asked(overrides, teacher, data, split, recipe, layer, final_norm, num_views, device, dtype)
    batch_size = _batch_size(what, out, split, memory_limit)
    if memory_limit:
        print(f"{batch_size} clips pass the teacher at once")
    how = How(workers if workers is not None else what.data.num_workers or None, stripe)
    folder = build_cache(what.teacher, what.table, split, out, what.data, encoding, batch_size, how)
    print(f"{folder}: complete")


def plan(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    teacher: str | None = None,
    out: Path = Path(),
    split: str = "train",
    data: str = "metaworld-mini",
    recipe: str | None = None,
    clips: int | None = None,
    encoding: Literal["float16", "int8"] = "float16",
    layer: int = -1,
    final_norm: Literal["model", "none"] = "model",
    num_views: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    memory_limit: str = "",
    workers: int | None = None,
    seconds: float = 30.0,
    tokens: int | None = None,
    dim: int | None = None,
    json: bool = False,
) -> None:
    """What `cache build` with the same arguments would take: bytes, hours by a measured sample, disk left.

    Exit code 2 when it cannot fit. Nothing stays on disk. Without a teacher, from --tokens, --dim and
    --clips, it says the bytes alone.

    Example: salt-vla cache plan --teacher videomae_base --data ssv2.parquet --out caches/s --clips 168913

    Args:
        overrides: fields to change, as field=value, for example data.view.frame_stride=2.
        teacher: a run's name, a directory, a published teacher's name or a hub id (docs/teachers.md).
        out: where the cache would lie.
        recipe: the student's recipe (`salt-vla recipes ls`).
        split: which clips of the table.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        clips: plan for so many clips like those of the table; default: all of the split.
        encoding: float16, or int8 with scales per token and channel (half the bytes).
        layer: take the tokens after this block, 1 … depth, or from the end (-1: the last).
        final_norm: the network's own final norm (`model`), or the raw residual stream (`none`).
        num_views: views of a clip to cache; default: the recipe's, or as the teacher was trained.
        device: where the teacher runs; `auto` is CUDA where there is one.
        dtype: what it computes in.
        memory_limit: as 25GB: let as many clips pass the teacher at once as this holds (default: 32 clips).
        workers: processes that decode videos; default: the recipe's data.num_workers, or what suits here.
        seconds: how long to measure.
        tokens: of a clip, where no teacher is named.
        dim: width of a token, where no teacher is named.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.build_cache import RECORDS_PER_SHARD, How
    from salt_vla.jobs.cache_plan import describe, plan_bytes, plan_cache

    if teacher is None:
        planned = plan_bytes(out, encoding, tokens, dim, clips, num_views or 1, RECORDS_PER_SHARD)
    else:
        what = _asked(overrides, teacher, data, split, recipe, layer, final_norm, num_views, device, dtype)
        batch_size = _batch_size(what, out, split, memory_limit)
        how = How(workers if workers is not None else what.data.num_workers or None)
        cache = (what.teacher, what.table, split, out, what.data, encoding, batch_size)
        planned = plan_cache(*cache, clips=clips, seconds=seconds, how=how)
    if json:
        print_json(planned.to_json())
    else:
        print_table(describe(planned), ["field", "value"])
    planned.require_fit()


@dataclass(frozen=True)
class _Asked:
    """What shall be cached: a loaded teacher, a split's clips, and how they are seen."""

    teacher: Teacher
    table: ClipTable
    data: DataConfig


def _asked(
    overrides: tuple[str, ...],
    teacher: str,
    data: str,
    split: str,
    recipe: str | None,
    layer: int,
    final_norm: Literal["model", "none"],
    num_views: int | None,
    device: str,
    dtype: str,
) -> _Asked:
    from salt_vla.jobs.data import open_table
    from salt_vla.teachers import load_teacher

    own = None
    if recipe is None and any(name.startswith("encoder.geometry") for name in overrides):
        # Overrides change the clips that the teacher takes by itself, not those of our defaults.
        own = load_teacher(teacher, layer=layer, final_norm=final_norm).geometry
    config, geometry = _wanted((teacher, data), recipe, overrides, device, own)
    loaded = load_teacher(teacher, geometry, config.runtime.device, dtype, layer, final_norm)
    settings = config.data
    if num_views is not None:
        settings = replace(settings, view=replace(settings.view, num_views=num_views))
    table = open_table(data, settings.view, loaded.geometry).select(split=split)
    return _Asked(loaded, table, settings)


def _batch_size(what: _Asked, out: Path, split: str, memory_limit: str) -> int:
    from salt_vla.jobs.build_cache import BATCH_SIZE, fitting_batch
    from salt_vla.jobs.resources import parse_bytes

    if not memory_limit:
        return BATCH_SIZE
    return fitting_batch(what.teacher, out, split, parse_bytes(memory_limit))


def _wanted(
    teacher_and_data: tuple[str, str],
    recipe: str | None,
    overrides: tuple[str, ...],
    device: str,
    own: ClipGeometry | None,
) -> tuple[TrainConfig, ClipGeometry | None]:
    """Which clips to cache: the recipe's, or those that the teacher was trained with (that the table was
    cut for, if no run of ours trained it); None: its geometry.

    `own`: that geometry, where overrides without a recipe change it.
    """
    from salt_vla.cli.train import override
    from salt_vla.jobs.teacher import data_settings
    from salt_vla.recipes import get_recipe
    from salt_vla.training.runtime import resolve_device

    base = TrainConfig(data=data_settings(*teacher_and_data)) if recipe is None else get_recipe(recipe).config
    base = replace(base, runtime=replace(base.runtime, device=device))
    if own is not None:
        base = replace(base, encoder=replace(base.encoder, geometry=own))
    config = resolve_device(override(base, overrides))
    return config, None if recipe is None and own is None else config.geometry
