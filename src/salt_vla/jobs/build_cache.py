"""`cache build`: a frozen teacher's latents for every view of every clip of a split, once."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from salt_vla.cache import CacheWriter, Manifest
from salt_vla.cache.format import (
    INDEX,
    INDEX_PAGES,
    MANIFEST,
    PROBE,
    QUARANTINE,
    SHARDS,
    DamagedManifest,
    EncodingName,
    NoManifest,
)
from salt_vla.cache.writer import LEASE_SECONDS
from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader, view_hash, view_settings
from salt_vla.errors import ConfigError
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs.cache_checks import check_probe, describe_int8, int8_cost, probe_of
from salt_vla.jobs.data import open_views
from salt_vla.jobs.pipeline import Compute, Pipeline, nothing, num_decoders
from salt_vla.jobs.resources import require_room
from salt_vla.jobs.unread_views import Approval, repair_cure
from salt_vla.progress import Advance, progress
from salt_vla.teachers import Teacher
from salt_vla.teachers.batch_size import largest_batch

OWN_NAMES = {MANIFEST, INDEX, INDEX_PAGES, QUARANTINE, PROBE, SHARDS}
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
    a further one. Raises `ConfigError` for a name that leads elsewhere."""
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", split) or split in OWN_NAMES or split != split.strip():
        raise ConfigError(f"a split's name is that of a folder, which {split!a} cannot be; choose another")
    if out.is_symlink() and not out.exists():
        raise ConfigError(f"{out} is a link that leads nowhere; remove it or choose another folder")
    there, below = manifest_at(out), manifest_at(out / split)
    if there is None:  # Nothing, or a damaged manifest: what lies below is of this split for certain.
        return out if below is None else out / split
    return out if there.provenance.get("split") == split else out / split


def manifest_at(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none, or one that `cache build` writes anew."""
    try:
        return Manifest.read(folder)
    except (NoManifest, DamagedManifest):
        return None


def find_split(path: Path, split: str) -> Path | None:
    """The folder at or below `path` that holds the cache of `split`, if there is one."""
    for folder in (path, path / split):
        if (folder / MANIFEST).exists() and Manifest.read(folder).provenance.get("split") == split:
            return folder
    return None


@dataclasses.dataclass(frozen=True)
class How:
    """How a cache is built, where that does not change what comes of it. `num_workers`: processes that decode
    (None: chosen). `stripe` (i, N): begin with every N-th shard from the i-th on, as one of N builders.
    """

    num_workers: int | None = None
    stripe: tuple[int, int] = (0, 1)
    lease_seconds: float = LEASE_SECONDS

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"--workers must be 0 (none) or more, not {self.num_workers}")
        index, count = self.stripe
        if not 0 <= index < count:
            raise ConfigError(
                f"--shard {index}/{count}: builders are numbered 0/{count} … {count - 1}/{count}"
            )


ALONE = How()


def parse_stripe(text: str) -> tuple[int, int]:
    """ "2/8" → (2, 8). Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not int(match[2]):
        raise ConfigError(f"--shard is I/N, as 0/4 for the first of four builders, not {text!r}")
    return int(match[1]), int(match[2])


def build_cache(
    teacher: Teacher,
    table: ClipTable,
    split: str,
    out: Path,
    data: DataConfig,
    encoding: EncodingName = "float16",
    batch_size: int = BATCH_SIZE,
    how: How = ALONE,
    make: Callable[[Pipeline, Advance], None] = Pipeline.run,
) -> Path:
    """Build (or go on building) the cache of one split; the folder it lies in.

    `table` holds that split's clips only. `batch_size` clips pass the teacher at once, from the first of each
    shard on, so that a rebuild with the same number gives the same bytes, whoever else builds along. `make`
    makes the shards: here, or on a cluster. Raises `CacheError` when the folder holds latents of another
    teacher, table, view or batch size, naming each difference, when the teacher's numbers are not those it
    was begun with, or when int8 cannot hold them; `DataError` when films cannot be read or are others than at
    the start; `Stopped` after a signal. All finished shards stay on disk.
    """
    with stop_on_signals() as stop:

        def check() -> None:
            stop.check(f"while caching {split} latents")

        begun = (teacher, table, split, out, data, encoding, batch_size, how, check)
        with opened(*begun) as (writer, pipeline):
            total, done = writer.num_keys, writer.num_keys_done
            if pipeline is not None:
                with progress(f"Caching {split} latents", total, "views", done=done) as advance:
                    make(pipeline, advance)
            approval = Approval(writer, repair_cure(writer.folder))
            finished = writer.finish(lambda _: check(), approval.whole)
    if finished.num_quarantined:
        print(
            f"{finished.num_quarantined} of {total} clip views are not in it ({QUARANTINE} says why): "
            f"{repair_cure(writer.folder)}",
            file=sys.stderr,
        )
    return writer.folder


@contextmanager
def opened(
    teacher: Teacher,
    table: ClipTable,
    split: str,
    out: Path,
    data: DataConfig,
    encoding: EncodingName,
    batch_size: int,
    how: How,
    check: Callable[[], None] = nothing,
) -> Iterator[tuple[CacheWriter, Pipeline | None]]:
    """A cache under construction, as `build_cache` takes it, and what makes its shards (None: all are there).

    Its manifest and the teacher's probe are on disk. Raises what `build_cache` does.
    """
    folder = split_folder(out, split)
    manifest = latents_manifest(teacher, table, split, data.view, encoding, batch_size)
    require_room(folder, manifest, "the latent cache")
    measured = _measured(folder, manifest, teacher, table, data)
    with CacheWriter(folder, manifest, table.clip_ids, how.stripe, how.lease_seconds) as writer:
        left = 0
        if not writer.is_complete():
            left = writer.num_keys - writer.num_keys_done
            _keep_probe(writer, teacher)
            if measured and not Manifest.read(folder).measured:
                writer.note(measured)
        if not left:
            yield writer, None
            return
        decoded = None if data.store_views else table
        approval = Approval(writer, repair_cure(folder), decoded)
        approval.beginning()
        views, _ = open_views(table, data, teacher.geometry)
        compute = latents_of(teacher)
        workers = num_decoders(how.num_workers, left, teacher.device)
        yield (
            writer,
            Pipeline(writer, views, compute, batch_size, workers, check, "teacher", approval.shard),
        )


def latents_of(teacher: Teacher) -> Compute:
    """What a pipeline computes: raw latents, float32 (batch, tokens, dim), of uint8 clips."""
    return lambda frames: teacher.latents(torch.from_numpy(frames)).cpu().numpy()


def _measured(
    folder: Path, manifest: Manifest, teacher: Teacher, table: ClipTable, data: DataConfig
) -> dict[str, float]:
    """What int8 costs, measured unless it is on record, and said; empty for other encodings."""
    if manifest.encoding != "int8":
        return {}
    before = manifest_at(folder)
    if before is not None and before.differences(manifest):
        return {}  # Another cache's folder, which the writer refuses.
    measured = before.measured if before is not None else {}
    if not measured:
        views = ViewReader(table, data.view, teacher.geometry)
        measured = int8_cost(teacher, table, views, int(manifest.provenance["batch_size"]))
    print(describe_int8(measured))
    return measured


def _keep_probe(writer: CacheWriter, teacher: Teacher) -> None:
    """Hold the teacher against the latents that the cache was begun with, or begin it with its own."""
    probe = probe_of(teacher)
    writer.write_probe(probe, unless=lambda: check_probe(writer.folder, probe))


def fitting_batch(teacher: Teacher, out: Path, split: str, limit_bytes: int) -> int:
    """The largest batch that the teacher takes within `limit_bytes`, or that of the cache that has begun."""
    folder = split_folder(out, split)
    before = manifest_at(folder)
    if before is not None and (begun_with := before.provenance.get("batch_size")):  # None of an import.
        return int(begun_with)
    return min(largest_batch(teacher, limit_bytes), RECORDS_PER_SHARD)


def canonical_only(data: DataConfig) -> DataConfig:
    """The same settings with view 0 alone: held-out clips need no more."""
    return dataclasses.replace(data, view=dataclasses.replace(data.view, num_views=1))
