"""What a builder measures before it trusts itself: a teacher's probe, and what int8 costs.

Knows teachers and encodings; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from salt_vla.cache.format import PROBE, Encoding
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.objectives import explained_variance, normalise
from salt_vla.teachers import Teacher
from salt_vla.view_store import ViewSource

PROBE_TOLERANCE = 0.02  # relative L2 between two machines, processors or precisions of one teacher
MIN_COSINE = 0.999  # of int8 against float16, mean over tokens
SAMPLED_CLIPS = 16
DIGITS = 6


def probe_clip(geometry: ClipGeometry) -> np.ndarray:
    """uint8 (1, frames, size, size, 3): noise that is the same on every machine: PCG64's raw bits of seed 0,
    which, unlike what NumPy makes of them, are the same in every version."""
    bits = np.random.PCG64(0).random_raw(-(-geometry.clip_bytes // 8))
    noise = np.asarray(bits, "<u8").view(np.uint8)[: geometry.clip_bytes]
    return noise.reshape(1, geometry.num_frames, geometry.image_size, geometry.image_size, 3)


def probe_of(teacher: Teacher) -> bytes:
    """The content of `probe.safetensors`: `latents` (tokens, dim) of the probe clip."""
    return save({"latents": _latents(teacher, probe_clip(teacher.geometry))[0]})


def check_probe(folder: Path, probe: bytes) -> bool:
    """Whether the cache at `folder` has a probe. Raises `CacheError` when `probe`, of the teacher that is to
    go on with it, is more than `PROBE_TOLERANCE` away: the same weights, but other numbers."""
    try:
        theirs = load((folder / PROBE).read_bytes())["latents"].astype(np.float64)
    except (FileNotFoundError, SafetensorError, KeyError):
        return False  # Lost or damaged: it is written anew.
    mine = load(probe)["latents"].astype(np.float64)
    distance = math.inf
    if mine.shape == theirs.shape:
        distance = float(np.linalg.norm(mine - theirs)) / max(float(np.linalg.norm(theirs)), 1e-12)
    if not distance <= PROBE_TOLERANCE:
        raise CacheError(
            f"this machine's latents are not those of the cache {folder}: for its probe clip they are "
            f"{distance:.1%} apart (relative L2; {PROBE_TOLERANCE:.0%} is allowed), though the teacher's "
            "weights are the same; use the device, precision and library versions it was begun with, or "
            "choose another folder"
        )
    return True


def int8_cost(teacher: Teacher, table: ClipTable, views: ViewSource, batch_size: int) -> dict[str, float]:
    """What int8 does to this teacher's latents, against float16, on view 0 of clips spread over the table.

    `cosine`, `cosine_normalised`: mean over tokens of the cosine, raw and of the layer-normalised tokens that
    students are held to; `worst_token_cosine`: the least of the latter. `r2_cost`: the share of the
    normalised tokens' variance about their channel mean that int8 leaves unexplained, 1 − R². Raises
    `CacheError` when a mean cosine is under `MIN_COSINE`, `DataError` when no clip can be read.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, min(SAMPLED_CLIPS, len(table))).astype(int))
    exact: list[np.ndarray] = []
    error: DataError | None = None
    found = views.read_each((table.rows["clip_id"][int(row)].as_py(), 0) for row in rows)
    while batch := list(islice(found, batch_size)):
        pixels = [view for _, view in batch if not isinstance(view, DataError)]
        error = next((view for _, view in batch if isinstance(view, DataError)), error)
        exact += list(_latents(teacher, np.stack(pixels))) if pixels else []
    if not exact:
        raise error or DataError("there are no clips to measure int8 on")
    return int8_cost_of(exact, f"teacher {teacher.name}")


def int8_cost_of(exact: Sequence[np.ndarray], whose: str) -> dict[str, float]:
    """The same of latents (tokens, dim) in float32, one or more; `whose` names them in a refusal."""
    halves, bytes_ = (
        torch.from_numpy(np.stack([_through(name, latents) for latents in exact])).flatten(0, 1)
        for name in ("float16", "int8")
    )
    targets, normalised = normalise(halves), normalise(bytes_)
    cosines = _cosines(normalised, targets)
    r2 = explained_variance(normalised, targets, targets.mean(dim=0))
    cost = {
        "cosine": _cosines(bytes_, halves).mean(),
        "cosine_normalised": cosines.mean(),
        "worst_token_cosine": cosines.min(),
        "r2_cost": torch.nan_to_num(1 - r2),  # NaN where there is nothing to explain
    }
    measured = {name: round(float(value), DIGITS) for name, value in cost.items()}
    least = min(measured["cosine"], measured["cosine_normalised"])
    if least < MIN_COSINE:
        raise CacheError(
            f"int8 cannot hold the latents of {whose}: on {len(exact)} clips the mean cosine "
            f"to float16 is {measured['cosine']} (layer-normalised {measured['cosine_normalised']}), under "
            f"{MIN_COSINE}; build with --encoding float16"
        )
    return measured


def describe_int8(measured: dict[str, float]) -> str:
    return (
        f"int8 against float16: mean token cosine {measured['cosine']:.6f}, layer-normalised "
        f"{measured['cosine_normalised']:.6f} (the worst token {measured['worst_token_cosine']:.6f}), "
        f"R² cost {measured['r2_cost']:.6f}"
    )


def _latents(teacher: Teacher, frames: np.ndarray) -> np.ndarray:
    return np.asarray(teacher.latents(torch.from_numpy(frames)).cpu().numpy())


def _through(name: str, latents: np.ndarray) -> np.ndarray:
    """Latents as an encoding gives them back."""
    encoding = Encoding("int8" if name == "int8" else "float16", latents.shape)
    return encoding.decode(encoding.encode(latents))


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each pair of tokens; 1 where both are nothing but zeros."""
    values = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    return torch.where((one == other).all(dim=-1), 1.0, values)
