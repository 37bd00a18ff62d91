"""Refusing at the start what cannot end well for lack of disk or memory, with the sum shown."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from salt_vla.cache.format import MANIFEST, SHARDS, Manifest
from salt_vla.config import TrainConfig, parse_bytes
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.loader import SHARED_MEMORY, slots
from salt_vla.masks import build_masks
from salt_vla.models.encoder import vit_size
from salt_vla.rundir import launched, root
from salt_vla.training.flops import GroupSizes
from salt_vla.training.memory import (
    MOST_ROWS,
    PROCESS,
    StepMemory,
    host_memory,
    largest_sizes,
    shared_memory,
    step_memory,
)

USUAL_WIDTH = 768  # of a teacher that is not known yet


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def require_disk(path: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(existing_parent(path)).free
    if needed > free:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB at {path}, where {free / 1e9:.2f} GB are free; "
            "make space or set SALT_VLA_ROOT to another disk"
        )


def require_room(folder: Path, manifest: Manifest, what: str) -> None:
    """As `require_disk`, of a whole cache, of which a part may lie there: known before each shard of what
    can never be is looked for."""
    there = sum(path.stat().st_size for path in folder.glob(f"{SHARDS}/*.bin"))
    require_disk(folder, manifest.num_keys * manifest.record.record_bytes - there, what)


@dataclass(frozen=True)
class TargetSize:
    """How wide targets are, and the bytes of a cached record of them."""

    dim: int
    record_bytes: int = 0


def target_size(config: TrainConfig) -> TargetSize:
    """As far as it can be known before anything is opened: from a cache's manifest, or by the provider."""
    provider, geometry = config.target.provider, config.geometry
    if provider == "pixels":
        return TargetSize(geometry.patch_dim)
    if provider == "ema":
        return TargetSize(vit_size(config.encoder).dim)
    if provider == "cache" and config.target.source:
        path = root() / config.target.source
        for folder in (path, path / "train"):
            if (folder / MANIFEST).is_file():
                record = Manifest.read(folder).record
                return TargetSize(record.shape[-1], record.record_bytes)
    record_bytes = 2 * geometry.num_tokens * USUAL_WIDTH if provider == "cache" else 0
    return TargetSize(USUAL_WIDTH, record_bytes)


def memory_of(config: TrainConfig, gpus: int = 1) -> StepMemory:
    """A step's memory on each of `gpus` devices, with masks as large as the run's first ones."""
    masks = build_masks(config.masks, config.geometry)
    sizes = largest_sizes(masks, config.batch_size, config.seed)
    target = target_size(config)
    return step_memory(config, target.dim, sizes, target.record_bytes, gpus)


def require_memory(config: TrainConfig) -> None:
    """Refuse a run whose batches /dev/shm, or whose step the GPU, RAM or `runtime.memory_limit`, cannot hold.
    Raises `ResourceError` with the sum."""
    ranks, target = launched(), target_size(config)
    shared = shared_memory(config, target.record_bytes, ranks.size) * ranks.local_size
    _require_shared_memory(config, target, shared, ranks.size)
    needed = memory_of(config, ranks.size)
    available, where = room_for_step(config)
    limit = parse_bytes(config.runtime.memory_limit) if config.runtime.memory_limit else available
    if limit < available:
        available, where = limit, f"runtime.memory_limit allows {config.runtime.memory_limit}"
    if needed.total > available:
        raise ResourceError(does_not_fit(config, needed, where, ranks.size))
    if config.runtime.device.startswith("cuda"):
        host = host_memory(config, target.dim, target.record_bytes, ranks.size) * ranks.local_size
    else:
        host = config.data.num_workers * PROCESS["cpu"] + needed.total
    free = psutil.virtual_memory().available
    if host + shared > free:
        raise ResourceError(
            f"the training's processes need {host / 1e9:.2f} GB of RAM and loaders {shared / 1e9:.2f} GB of "
            f"{SHARED_MEMORY}, which is RAM too, and {free / 1e9:.2f} GB are available; lower "
            "data.num_workers, data.prefetch or batch_size"
        )


def room_for_step(config: TrainConfig) -> tuple[int, str]:
    """Bytes that a step may take on the run's device, and where that is from, as a phrase."""
    if config.runtime.device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(config.runtime.device)
        return free, f"{free / 1e9:.2f} GB of the GPU's memory are free"
    free = psutil.virtual_memory().available
    return free, f"{free / 1e9:.2f} GB of RAM are available"


def does_not_fit(config: TrainConfig, needed: StepMemory, where: str, gpus: int = 1) -> str:
    """The sentence with the arithmetic, at the start and when memory has run out."""
    rows = config.batch_size // gpus
    return (
        f"a step of {rows} clip{'s' * (rows > 1)}, {-(-rows // config.grad_accum_steps)} at once, needs "
        f"about {needed}, and {where}: lower batch_size, raise grad_accum_steps (a clip less at once saves "
        f"{needed.of_clip / 1e9:.3f} GB), set encoder.grad_checkpointing=true, or choose a smaller encoder; "
        "`salt-vla train … --find-batch` says what fits"
    )


def _require_shared_memory(config: TrainConfig, target: TargetSize, shared: int, ranks: int) -> None:
    place = Path(SHARED_MEMORY)
    free = shutil.disk_usage(place).free if place.is_dir() else shared
    if shared > free:
        data, rows = config.data, -(-config.batch_size // ranks)
        frames, records = rows * config.geometry.clip_bytes / 1e6, rows * target.record_bytes / 1e6
        raise ResourceError(
            f"{data.num_workers} loader processes × {slots(data.prefetch)} batches × ({frames:.0f} MB of "
            f"frames + {records:.0f} MB of records) need {shared / 1e9:.2f} GB of {SHARED_MEMORY}, where "
            f"{free / 1e9:.2f} GB are free; lower data.num_workers, data.prefetch or batch_size, or mount a "
            "larger one (docker: --shm-size)"
        )


@dataclass(frozen=True)
class Fitting:
    """The largest batch in one piece, and the run's own batch in as few pieces as fit; 0 where none does."""

    limit: int
    batch_size: int
    memory: StepMemory
    accumulation: int
    with_accumulation: StepMemory


def find_batch(config: TrainConfig, limit: int, gpus: int = 1) -> Fitting:
    """By the arithmetic, for each of `gpus` devices that may take `limit` bytes. Raises `ConfigError` without
    a device."""
    if gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, not {gpus}")
    target, masks = target_size(config), build_masks(config.masks, config.geometry)

    @cache
    def sizes(clips: int) -> list[GroupSizes]:
        return largest_sizes(masks, clips, config.seed)

    def memory(batch_size: int, parts: int) -> StepMemory:
        tried = replace(config, batch_size=batch_size, grad_accum_steps=parts)
        # Of the batch that is tried: contexts are cut to its shortest, so few clips have longer ones.
        drawn = sizes(min(batch_size, MOST_ROWS))
        return step_memory(tried, target.dim, drawn, target.record_bytes, gpus)

    low, high = 0, 1  # in clips a device
    while memory(high * gpus, 1).total <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle * gpus, 1).total <= limit else (low, middle)
    parts = (n for n in range(1, config.batch_size + 1) if config.batch_size % (n * gpus) == 0)
    fewest = next((n for n in parts if memory(config.batch_size, n).total <= limit), 0)
    return Fitting(
        limit, low * gpus, memory(max(low, 1) * gpus, 1), fewest, memory(config.batch_size, max(fewest, 1))
    )
