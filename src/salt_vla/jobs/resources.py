"""Refusing at the start what cannot end well for lack of disk or memory, with the sum shown."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil

from salt_vla.cache.format import SHARDS, Manifest
from salt_vla.config import TrainConfig
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.models.encoder import vit_size

PREFETCHED_BATCHES = 2  # a worker, torch's default
BYTES_PER_ACTIVATION = 40  # measured per token, block and channel of a training step, rounded up
BYTES_PER_WEIGHT = 28  # float32 weight, gradient, two moments, and the copy that a checkpoint is written from


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


def require_memory(config: TrainConfig) -> None:
    """Refuse weights, or a step's activations, that cannot fit the memory available now."""
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
    activations = frames * 5 + micro * geometry.num_tokens * _width(config) * BYTES_PER_ACTIVATION
    weights = _weights(config) * BYTES_PER_WEIGHT
    available = psutil.virtual_memory().available
    if config.runtime.device != "cuda" and activations + weights > available:
        raise ResourceError(
            f"weights and optimizer need about {weights / 1e9:.1f} GB of memory and a batch of "
            f"{config.batch_size} clips {activations / 1e9:.1f} GB, where {available / 1e9:.1f} GB are "
            "available; lower batch_size, raise grad_accum_steps or choose a smaller encoder"
        )


def _weights(config: TrainConfig) -> float:
    """Parameters of the blocks, which own nearly all of them. Raises `ConfigError` for an unknown encoder."""
    size, predictor = vit_size(config.encoder), config.predictor
    encoder = (4 + 2 * size.mlp_ratio) * size.dim**2 * (config.encoder.depth or size.depth)
    return encoder + 12 * predictor.dim**2 * predictor.depth


def _width(config: TrainConfig) -> int:
    """Channels over all blocks that see every token: the predictor's."""
    return config.predictor.dim * config.predictor.depth


def parse_bytes(text: str) -> int:
    """ "25GB", "500 MB", "16GiB" or a number of bytes. Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match is not None:
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not 0 < size < 2**63:
        raise ConfigError(f"{text!r} is no amount of memory; write it as 25GB, 500MB or 16GiB")
    return size
