"""`cache plan`: what a cache will take in bytes and in hours, before anybody waits for it.

The hours come from a sample that goes through the very pipeline of `cache build`, to the same disk.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from salt_vla.cache import CacheWriter, Encoding, Manifest
from salt_vla.cache.format import LEASES, SHARDS, EncodingName
from salt_vla.cache.leases import living
from salt_vla.config import DataConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.read_ahead import RUN_BYTES
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import ConfigError, DataError, ResourceError
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs.build_cache import ALONE, How, latents_manifest, latents_of, manifest_at, split_folder
from salt_vla.jobs.cache_checks import probe_clip
from salt_vla.jobs.pipeline import Pipeline, num_decoders
from salt_vla.jobs.resources import existing_parent
from salt_vla.rundir import writing_to
from salt_vla.teachers import Teacher

SECONDS = 30.0
WARM_UP = 0.25  # of the sample's time: not counted, since buffers fill and caches are cold
GOLDEN = (5**0.5 - 1) / 2
MAX_SAMPLE = 4096  # clips
MOST = 10**15  # of anything that is counted; longer numbers are slips of the keyboard
SAMPLE_FOLDER = ".salt-vla-plan-"
ID_BYTES = 64.0  # of a clip id that is not known


@dataclass(frozen=True)
class Size:
    """What a cache of `clips` × `views` records takes. `bytes` are the records', exactly; `other_bytes` are
    what footers, index and probe take beside them, by the length of the ids, rounded up."""

    clips: int
    views: int
    shards: int
    record_bytes: int
    bytes: int
    other_bytes: int


@dataclass(frozen=True)
class Sample:
    """What went through the pipeline. `shares`: of the time, by what was waited for."""

    views: int
    seconds: float
    views_per_second: float
    batch_size: int
    num_workers: int
    shares: str


@dataclass(frozen=True)
class Plan:
    """`seconds`: of the whole build, by the sample; None without one. `done_bytes`: on disk already.
    `view_store_bytes`: of decoded views, which `data.store_views` keeps under SALT_VLA_ROOT besides."""

    out: str
    size: Size
    done_bytes: int
    free_bytes: int
    view_store_bytes: int = 0
    sample: Sample | None = None
    seconds: float | None = None

    @property
    def needed_bytes(self) -> int:
        return max(self.size.bytes + self.size.other_bytes - self.done_bytes, 0)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"needed_bytes": self.needed_bytes, "fits": self.fits}

    def require_fit(self) -> None:
        """Raises `ResourceError` with the arithmetic when the disk cannot hold it."""
        if self.fits:
            return
        size = self.size
        done = f", of which {self.done_bytes / 1e9:.2f} GB are there" if self.done_bytes else ""
        raise ResourceError(
            f"the cache does not fit: {size.clips:,} clips × {size.views} view(s) × {size.record_bytes:,} "
            f"bytes and {size.other_bytes / 1e9:.2f} GB for footers and index are "
            f"{(size.bytes + size.other_bytes) / 1e9:.2f} GB{done}, and {self.out} has "
            f"{self.free_bytes / 1e9:.2f} GB free; make space, choose another disk, or take --encoding int8 "
            "or fewer views"
        )


def size_of(encoding: Encoding, clips: int, views: int, per_shard: int, id_bytes: float) -> Size:
    """`id_bytes`: of a clip id, on average."""
    keys = clips * views
    shards = -(-keys // per_shard)
    footers = keys * (id_bytes + 40) + shards * 256  # JSON: id, view, up to 20 digits
    index = clips * (id_bytes + 8 + 9 * views + 12) * 1.001
    other = footers + index + 4 * math.prod(encoding.shape) + 65536  # A probe in float32, manifest, headers.
    return Size(clips, views, shards, encoding.record_bytes, keys * encoding.record_bytes, int(other))


def plan_bytes(
    out: Path,
    encoding: EncodingName,
    shape: tuple[int | None, int | None],
    clips: int | None,
    views: int,
    per_shard: int,
) -> Plan:
    """Bytes alone, of a teacher that is not at hand. `shape`: tokens of a clip, and their width."""
    tokens, dim = shape
    if tokens is None or dim is None or clips is None:
        raise ConfigError("give --teacher, or --tokens, --dim and --clips")
    for name, number in {"tokens": tokens, "dim": dim, "clips": clips, "num-views": views}.items():
        _require_count(name, number)
    return plan_size(out, size_of(Encoding(encoding, (tokens, dim)), clips, views, per_shard, ID_BYTES))


def _require_count(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"--{name} must be at least 1, not {number}")
    if number > MOST:
        raise ConfigError(f"--{name} must be at most {MOST:,}")


def plan_size(out: Path, size: Size, folder: Path | None = None) -> Plan:
    """Without a sample. `folder`: where a part of it may lie already."""
    done = 0
    if folder is not None and (folder / SHARDS).is_dir():
        done = sum(path.stat().st_blocks * 512 for path in (folder / SHARDS).glob("*.bin"))
    return Plan(str(out.resolve()), size, done, shutil.disk_usage(existing_parent(out)).free)


def plan_cache(
    teacher: Teacher,
    table: ClipTable,
    split: str,
    out: Path,
    data: DataConfig,
    encoding: EncodingName,
    batch_size: int,
    clips: int | None = None,
    seconds: float = SECONDS,
    how: How = ALONE,
) -> Plan:
    """The plan of `build_cache` with these arguments, or of as many `clips` like them.

    A sample that is spread over the table passes the pipeline for some `seconds`; the rate is that of its
    steady state. Nothing stays on disk. Raises `DataError` when no clip can be read, `ConfigError` for
    counts that cannot be.
    """
    if clips is not None:
        _require_count("clips", clips)
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds must be a positive number, not {seconds}")
    manifest = latents_manifest(teacher, table, split, data.view, encoding, batch_size)
    folder = split_folder(out, split)
    before = manifest_at(folder)
    is_ours = before is not None and not before.differences(manifest) and clips in (None, len(table))
    id_bytes = float(pc.mean(pc.binary_length(table.rows["clip_id"])).as_py() or 0)
    count = len(table) if clips is None else clips
    size = size_of(manifest.record, count, manifest.num_views, manifest.records_per_shard, id_bytes)
    plan = plan_size(out, size, folder if is_ours else None)
    if data.store_views:
        stored = count * size.views * teacher.geometry.clip_bytes
        plan = dataclasses.replace(plan, view_store_bytes=stored)
    if not plan.fits:
        return plan  # Nobody waits for a sample of what cannot be.
    sample = measure(teacher, table, manifest, out, data, seconds, how)
    return dataclasses.replace(plan, sample=sample, seconds=count * size.views / sample.views_per_second)


def measure(
    teacher: Teacher,
    table: ClipTable,
    manifest: Manifest,
    out: Path,
    data: DataConfig,
    seconds: float,
    how: How = ALONE,
) -> Sample:
    """How fast a sample of the table's clips becomes shards on `out`'s disk."""
    batch_size = int(manifest.provenance["batch_size"])
    batch_size = max(min(batch_size, int(seconds / 8 / _seconds_a_clip(teacher))), 1)
    clips = spread(table, teacher.geometry.clip_bytes * data.view.num_views)
    events: list[tuple[float, int]] = []
    with writing_to(out):
        _sweep_samples(existing_parent(out))
        place = tempfile.TemporaryDirectory(dir=existing_parent(out), prefix=SAMPLE_FOLDER)
    with place, CacheWriter(Path(place.name), manifest, clips.clip_ids) as writer, stop_on_signals() as stop:
        began = time.monotonic()

        def check() -> None:
            stop.check("while measuring a sample")
            if events and time.monotonic() - began > seconds and len(events) > 3:
                raise _Enough

        views = ViewReader(clips, data.view, teacher.geometry)
        workers = num_decoders(how.num_workers, len(table) * data.view.num_views, teacher.device)
        pipeline = Pipeline(writer, views, latents_of(teacher), batch_size, workers, check, "teacher")
        with suppress(_Enough):
            pipeline.run(lambda amount=1, note="": events.append((time.monotonic(), pipeline.computed)))
    if not events:
        raise DataError(f"there are no clips in {table.name} to measure a sample of")
    rate = _steady_rate(began, events)
    elapsed = events[-1][0] - began
    return Sample(events[-1][1], elapsed, rate, batch_size, workers, str(pipeline.shares))


def _sweep_samples(parent: Path) -> None:
    """Remove what plans that were killed have left, unless it may be of one that goes on."""
    for folder in parent.glob(f"{SAMPLE_FOLDER}*"):
        if (folder / LEASES).is_dir() and not folder.is_symlink() and not living(folder / LEASES):
            shutil.rmtree(folder, ignore_errors=True)  # It may be another user's.


class _Enough(Exception):
    """The sample has run for its time."""


def spread(table: ClipTable, bytes_a_clip: int) -> ClipTable:
    """Up to `MAX_SAMPLE` clips in stretches that a decoder would take in one pass, in an order of which any
    beginning is spread over the whole table (multiples of the golden ratio)."""
    length = max(RUN_BYTES // bytes_a_clip, 1)
    stretches = np.argsort(np.arange(-(-len(table) // length)) * GOLDEN % 1, kind="stable")
    rows = (stretches[:, None] * length + np.arange(length)).reshape(-1)
    return table.filtered(table.rows.take(rows[rows < len(table)][:MAX_SAMPLE]))


def _seconds_a_clip(teacher: Teacher) -> float:
    """Of the second call: the first one allocates."""
    clip = torch.from_numpy(probe_clip(teacher.geometry))
    for _ in range(2):
        began = time.monotonic()
        teacher.latents(clip).cpu()
    return max(time.monotonic() - began, 1e-6)


def _steady_rate(began: float, events: list[tuple[float, int]]) -> float:
    """Views a second after the warm-up, or over all where there is nothing after it."""
    end, total = events[-1]
    first = next(event for event in events if event[0] - began >= WARM_UP * (end - began))
    if first[1] < total:
        return (total - first[1]) / max(end - first[0], 1e-9)
    return total / max(end - began, 1e-9)


def describe(plan: Plan) -> list[dict[str, str]]:
    """Rows for a person."""
    size = plan.size
    rows = {
        "clips": f"{size.clips:,}" + (f" × {size.views} views" if size.views > 1 else ""),
        "shards": f"{size.shards:,}",
        "bytes a record": f"{size.record_bytes:,}",
        "records": f"{size.bytes:,} bytes ({size.bytes / 1e9:.2f} GB)",
        "footers, index": f"{size.other_bytes / 1e9:.3f} GB at most",
        "free": f"{plan.free_bytes / 1e9:.2f} GB at {plan.out}",
        "left": f"{(plan.free_bytes - plan.needed_bytes) / 1e9:.2f} GB",
    }
    if plan.view_store_bytes:
        rows["view store"] = f"{plan.view_store_bytes / 1e9:.2f} GB, under SALT_VLA_ROOT"
    if plan.done_bytes:
        rows["there already"] = f"{plan.done_bytes / 1e9:.2f} GB"
    if plan.sample is not None and plan.seconds is not None:
        sample = plan.sample
        hours, minutes = divmod(round(plan.seconds / 60), 60)
        rows["sample"] = (
            f"{sample.views} views in {sample.seconds:.1f} s, {sample.num_workers} decoder(s), "
            f"batches of {sample.batch_size}; {sample.shares}"
        )
        rows["rate"] = f"{sample.views_per_second:.2f} views/s"
        rows["time"] = f"{hours} h {minutes:02d} min"
    return [{"field": key, "value": value} for key, value in rows.items()]
