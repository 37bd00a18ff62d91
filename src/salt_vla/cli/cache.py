"""`salt-vla cache …`"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.config import TrainConfig
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry


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
) -> None:
    """Cache a frozen teacher's latents for one split; again with the same arguments goes on.

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
    """
    from salt_vla.jobs.build_cache import BATCH_SIZE, build_cache, fitting_batch
    from salt_vla.jobs.data import open_table
    from salt_vla.jobs.resources import parse_bytes
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
    batch_size = BATCH_SIZE
    if memory_limit:
        batch_size = fitting_batch(loaded, out, split, parse_bytes(memory_limit))
        print(f"{batch_size} clips pass the teacher at once")
    folder = build_cache(loaded, table, split, out, settings, encoding, batch_size)
    print(f"{folder}: complete")


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


def show(path: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
    """A cache's manifest.

    Example: salt-vla cache show caches/demo --json

    Args:
        path: the cache's folder.
        json: print JSON instead of a table.
    """
    from salt_vla.cache import Manifest

    manifest = asdict(Manifest.read(path))
    if json:
        print_json(manifest)
    else:
        flat = {**{k: v for k, v in manifest.items() if k != "provenance"}, **manifest["provenance"]}
        print_table([{"field": key, "value": value} for key, value in flat.items()], ["field", "value"])


def verify(path: Annotated[Path, tyro.conf.Positional], json: bool = False) -> int:
    """Check every record against its checksum; exit code 1 when one is damaged.

    Example: salt-vla cache verify caches/demo

    Args:
        path: the cache's folder.
        json: print JSON instead of a table.
    """
    from salt_vla.cache import open_cache
    from salt_vla.cache.verify import verify as verify_records
    from salt_vla.progress import progress

    cache = open_cache(path, check="always")
    total = cache.manifest.num_records
    bad = []
    with progress("Verifying", total, "records") as advance:
        for found in verify_records(cache):
            bad += [found] if found else []
            advance(1)
    if json:
        print_json({"records": total, "bad": bad})
    else:
        print_table(bad, ["clip_id", "view", "file", "offset", "reason"])
        print(f"{total} records, {len(bad)} damaged")
    if not total:
        raise CacheError(f"{path} holds no records")
    return 1 if bad else 0
