"""`salt-vla cache import`: a cache of others' latents, and what is said of where they come from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from salt_vla.cli.printing import print_json
from salt_vla.errors import ConfigError

if TYPE_CHECKING:
    from salt_vla.config import ViewConfig
    from salt_vla.data.clip_table import ClipTable
    from salt_vla.geometry import ClipGeometry
    from salt_vla.jobs.import_cache import Imported

STATEMENT = {  # What an imported cache's provenance rests on, in the words for it.
    "stated": "stated at the import",
    "claimed": "claimed by its metadata.json",
    "unknown": "known to nobody",
}


def import_folder(
    folder: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    out: Path,
    data: str | None = None,
    split: str | None = None,
    recipe: str | None = None,
    teacher_name: str | None = None,
    layer: int | None = None,
    names: Literal["check", "clip-ids", "rows"] = "check",
    unreadable: Path | None = None,
    compare: str | None = None,
    encoding: Literal["float16", "int8"] = "float16",
    json: bool = False,
) -> None:
    """Make a cache of a folder with one .pt or .npy file of latents a clip; again goes on.

    Nothing in the files is run. What you state here and what nobody knows are written into the manifest; to
    train from the cache, state its clips (--data) and their frames and crops (--recipe).

    Example: salt-vla cache import latents/train --out caches/old --data ssv2.parquet --recipe exp1_higher_lr

    Args:
        folder: the folder, with a metadata.json if there is one.
        overrides: fields of the recipe to change, as field=value, for example data.view.frame_stride=2.
        out: the cache's folder.
        data: the clip table of the clips.
        split: which clips of the table (default: what metadata.json says).
        recipe: the recipe whose frames, crops and tokens the latents were made of.
        teacher_name: what made them (default: what metadata.json says).
        layer: the teacher's block that they come from, where it is known.
        names: check: refuse files that are named by row numbers or have evidently shifted; clip-ids: trust
            their names; rows: they follow the order of the list in metadata.json, else of the clip table.
        unreadable: a file naming the clips that their maker could not read: names that went on counting are
            moved back past them.
        compare: a teacher (a run's name, a directory, a published name) to run on a few of the clips first:
            latents that are not its own are refused.
        encoding: float16, or int8 with scales per token and channel (half the bytes).
        json: print JSON instead of sentences.
    """
    from salt_vla.jobs.import_cache import Stated, import_latents, read_ids

    view, geometry, table = _clips(recipe, overrides, data)
    stated = Stated(split, table, view, geometry, teacher_name, layer)
    skipped = read_ids(unreadable) if unreadable is not None else ()
    done = import_latents(folder, out, stated, names, skipped, encoding, compare)
    manifest = done.manifest
    if json:
        print_json(asdict(manifest) | {"left_out": done.left_out, "warnings": list(done.warnings)})
    else:
        _print_import(done)


def _clips(
    recipe: str | None, overrides: tuple[str, ...], data: str | None
) -> tuple[ViewConfig | None, ClipGeometry | None, ClipTable | None]:
    """How an imported cache's clips were seen, and which they are, as far as that is stated."""
    from salt_vla.config import TrainConfig, override
    from salt_vla.jobs.data import open_table
    from salt_vla.recipes import get_recipe

    if overrides and recipe is None:
        raise ConfigError(f"{overrides[0]!r} changes a recipe; give --recipe, too")
    config = TrainConfig() if recipe is None else override(get_recipe(recipe).config, overrides)
    table = None if data is None else open_table(data, config.data.view, config.geometry)
    return (None, None, table) if recipe is None else (config.data.view, config.geometry, table)


def _print_import(done: Imported) -> None:
    manifest = done.manifest
    print(f"{done.folder}: {manifest.num_records:,} records, {manifest.num_quarantined:,} quarantined")
    if "teacher_r2" in manifest.measured:
        print(f"R² of the teacher's latents on some of the clips: {manifest.measured['teacher_r2']:.4f}")
    if "r2_cost" in manifest.measured:
        from salt_vla.jobs.cache_checks import describe_int8

        print(describe_int8(manifest.measured))
    if done.left_out:
        print(f"{done.left_out:,} files are of none of its clips and were left out")
    print_statement(manifest.provenance)
    for warning in done.warnings:
        print(f"warning: {warning}")
    if {"clip_table", "view"} & set(manifest.provenance["unknown"]):
        print("to train from it, import it again into another folder with --data and --recipe")


def print_statement(provenance: dict[str, Any]) -> None:
    """What an imported cache's provenance rests on."""
    for name, title in STATEMENT.items():
        print(f"{title}: {', '.join(provenance[name]) or 'nothing'}")
