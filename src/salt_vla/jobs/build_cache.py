"""`cache build`: a frozen teacher's latents for every view of every clip of a split, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from salt_vla.cache import ArrayCache, CacheWriter, Manifest
from salt_vla.cache.format import MANIFEST, EncodingName, describe_differences
from salt_vla.cache.shards import Key, Record
from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash, view_settings
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs.data import open_views, read_or_quarantine, refuse_too_many_bad
from salt_vla.jobs.resources import require_disk
from salt_vla.progress import progress
from salt_vla.teachers import Teacher
from salt_vla.teachers.batch_size import largest_batch
from salt_vla.view_store import ViewSource

RECORDS_PER_SHARD = 64
BATCH_SIZE = 32


def latents_manifest(
    teacher: Teacher,
    table: ClipTable,
    split: str,
    view: ViewConfig,
    encoding: EncodingName,
    batch_size: int,
) -> Manifest:
    """What a cache of these latents must say of itself."""
    geometry = teacher.geometry
    return Manifest(
        kind="latents",
        encoding=encoding,
        shape=(geometry.num_tokens, teacher.dim),
        num_views=view.num_views,
        num_clips=len(table),
        records_per_shard=RECORDS_PER_SHARD,
        provenance={
            "teacher": teacher.name,
            "fingerprint": teacher.fingerprint,
            "layer": teacher.block,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "split": split,
            "clip_table": table.hash,
            "files": table.files_hash,
            "view_hash": view_hash(view, geometry),
            "view": view_settings(view),
            "geometry": dataclasses.asdict(geometry),
            "batch_size": batch_size,
        },
    )


def split_folder(out: Path, split: str) -> Path:
    """Where a split's cache lies below `out`: `out` itself for the first one built there, `out/<split>` for
    a further one."""
    if (out / MANIFEST).exists() and Manifest.read(out).provenance.get("split") != split:
        return out / split
    return out


def find_split(path: Path, split: str) -> Path | None:
    """The folder at or below `path` that holds the cache of `split`, if there is one."""
    for folder in (path, path / split):
        if (folder / MANIFEST).exists() and Manifest.read(folder).provenance.get("split") == split:
            return folder
    return None


def build_cache(
    teacher: Teacher,
    table: ClipTable,
    split: str,
    out: Path,
    data: DataConfig,
    encoding: EncodingName = "float16",
    batch_size: int = BATCH_SIZE,
) -> Path:
    """Build (or go on building) the cache of one split; the folder it lies in.

    `table` holds that split's clips only. `batch_size` clips pass the teacher at once, from the first of each
    shard on, so that a rebuild with the same number gives the same bytes. Raises `CacheError` when the folder
    holds latents of another teacher, table, view or batch size, naming each difference.
    """
    folder = split_folder(out, split)
    manifest = latents_manifest(teacher, table, split, data.view, encoding, batch_size)
    with CacheWriter(folder, manifest, table.clip_ids) as writer, stop_on_signals() as stop:
        total, done = writer.num_keys, writer.num_keys_done
        if done < total:
            require_disk(folder, (total - done) * manifest.record.record_bytes, "the latent cache")
            views, readable = open_views(table, data, teacher.geometry)
            usable = set(readable)
            with progress(f"Caching {split} latents", total, "views", done=done) as advance:
                for shard in writer.pending(lambda _: stop.check("while caching latents")):
                    writer.write_shard(shard, _records(teacher, views, shard.keys, usable, batch_size))
                    advance(len(shard.keys))
                    stop.check(f"while caching {split} latents")
        refuse_too_many_bad(writer.finish().num_quarantined, total, folder)
    return folder


def fitting_batch(teacher: Teacher, out: Path, split: str, limit_bytes: int) -> int:
    """The largest batch that the teacher takes within `limit_bytes`, or that of the cache that has begun."""
    folder = split_folder(out, split)
    if (folder / MANIFEST).exists():
        return int(Manifest.read(folder).provenance["batch_size"])
    return min(largest_batch(teacher, limit_bytes), RECORDS_PER_SHARD)


def canonical_only(data: DataConfig) -> DataConfig:
    """The same settings with view 0 alone: held-out clips need no more."""
    return dataclasses.replace(data, view=dataclasses.replace(data.view, num_views=1))


def _records(
    teacher: Teacher, views: ViewSource, keys: tuple[Key, ...], usable: set[str], batch_size: int
) -> Iterator[Record]:
    """Latents of one shard's clips, in batches whose boundaries are fixed by the shard; or why there are
    none."""
    good = [key for key in keys if key[0] in usable]
    records = read_or_quarantine(views, good)
    for _ in range(0, len(good), batch_size):
        seen, frames = [], []
        for record in islice(records, batch_size):
            if record.array is None:
                yield record
                continue
            seen.append(record.key)
            frames.append(record.array)
        if seen:
            latents = teacher.latents(torch.from_numpy(np.stack(frames))).cpu().numpy()
            yield from map(Record, seen, latents)
    for key in keys:
        if key[0] not in usable:
            yield Record(key, None, "its views could not be decoded; see the view store's quarantine")


def check_cache(
    cache: ArrayCache, table: ClipTable, view: ViewConfig, geometry: ClipGeometry, num_views: int
) -> None:
    """Refuse a cache whose latents were not made from this run's clips and views, field by field."""
    mine = cache.manifest.provenance
    wanted = {
        "clip_table": table.hash,
        "files": table.files_hash,
        "view_hash": view_hash(view, geometry),
        "geometry": dataclasses.asdict(geometry),
    }
    differences = {key: (mine.get(key), value) for key, value in wanted.items() if mine.get(key) != value}
    if differences:
        raise CacheError(
            f"the cache {cache.folder} does not fit this run: {describe_differences(differences)}; "
            "build one from the run's clip table and views"
        )
    if cache.num_views < num_views:
        raise CacheError(
            f"the cache {cache.folder} holds {cache.num_views} view(s) of a clip, the run wants {num_views}; "
            "lower data.view.num_views or build it again"
        )
