"""`salt-vla cache …`"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import CacheError


def build(
    teacher: str,
    out: Path,
    split: str = "train",
    data: str = "metaworld-mini",
    encoding: Literal["float16", "int8"] = "float16",
    layer: int = -1,
    num_views: int | None = None,
) -> None:
    """Cache a frozen teacher's latents for one split; again with the same arguments goes on.

    Frames, stride and crops are those the teacher was trained with.

    Example: salt-vla cache build --split train --teacher demo_teacher --data metaworld-mini --out caches/mine

    Args:
        teacher: a run's name, a directory, a published teacher's name or a hub id (docs/teachers.md).
        out: the cache's folder; a second split built there lies in a folder of its own below it.
        split: which clips of the table.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        encoding: float16, or int8 with scales per token and channel (half the bytes).
        layer: take the tokens after this block, 1 … depth, or from the end (-1: the last).
        num_views: views of a clip to cache; default: as the teacher was trained.
    """
    from salt_vla.jobs.build_cache import build_cache
    from salt_vla.jobs.data import open_table
    from salt_vla.jobs.teacher import teacher_and_data

    loaded, data_config = teacher_and_data(teacher, layer)
    if num_views is not None:
        data_config = replace(data_config, view=replace(data_config.view, num_views=num_views))
    table = open_table(data, data_config.view, loaded.geometry).select(split=split)
    folder = build_cache(loaded, table, split, out, data_config, encoding)
    print(f"{folder}: complete")


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
    from salt_vla.progress import progress

    cache = open_cache(path)
    bad = []
    with progress("Verifying", len(cache.keys), "records") as advance:
        for found in cache.verify():
            bad += [found] if found else []
            advance(1)
    if json:
        print_json({"records": len(cache.keys), "bad": bad})
    else:
        print_table(bad, ["clip_id", "view", "file", "offset", "reason"])
        print(f"{len(cache.keys)} records, {len(bad)} damaged")
    if not cache.keys:
        raise CacheError(f"{path} holds no records")
    return 1 if bad else 0
