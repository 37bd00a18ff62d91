"""Refusing at the start what cannot end well for lack of disk or memory, with the sum shown."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from salt_vla.config import TrainConfig
from salt_vla.errors import ResourceError

PREFETCHED_BATCHES = 2  # a worker, torch's default
BYTES_PER_ACTIVATION = 40  # measured per token, block and channel of a training step, rounded up


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


def require_memory(config: TrainConfig) -> None:
    """Refuse a step whose activations cannot fit the memory that is available now."""
    geometry = config.geometry
    frames = config.batch_size * geometry.clip_bytes
    if config.data.num_workers:
        shared = shutil.disk_usage("/dev/shm").free
        needed = frames * config.data.num_workers * PREFETCHED_BATCHES
        if needed > shared:
            raise ResourceError(
                f"{config.data.num_workers} workers × {PREFETCHED_BATCHES} batches × {frames / 1e6:.0f} MB "
                f"of frames need {needed / 1e9:.2f} GB of /dev/shm, where {shared / 1e9:.2f} GB are free; "
                "lower data.num_workers or batch_size"
            )
    micro = config.batch_size // config.grad_accum_steps
    width = config.predictor.dim * config.predictor.depth
    needed = frames * 5 + micro * geometry.num_tokens * width * BYTES_PER_ACTIVATION
    available = psutil.virtual_memory().available
    if config.runtime.device != "cuda" and needed > available:
        raise ResourceError(
            f"a batch of {config.batch_size} clips needs about {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available; lower batch_size or raise grad_accum_steps"
        )
