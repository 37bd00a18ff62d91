"""`cache import --compare`: does a teacher, on the stated clips, give the latents that are to be imported?

What was stated of names, frames, crops and layer is then measured. Reads a few files and films, writes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from salt_vla.cache.foreign import ForeignFolder
from salt_vla.cache.foreign_file import read_latents
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import read_or_quarantine
from salt_vla.objectives import explained_variance, normalise
from salt_vla.progress import progress
from salt_vla.teachers import load_teacher

RUN = 4  # clips compared at either end of the table, one after the other, so that shifted names show
# Of the demo's teacher: 0.96 where clips are 3 grey levels brighter, 0.90 where they lie a pixel aside, −0.4
# and less on the next clips of the table.
MIN_R2 = 0.5


@dataclass(frozen=True)
class Clips:
    """Which clips the files are stated to be of, and how the teacher saw them."""

    table: ClipTable
    view: ViewConfig
    geometry: ClipGeometry
    name_of: Mapping[str, str]  # clip → its name in the folder


def teacher_r2(found: ForeignFolder, clips: Clips, teacher: str, layer: int | None) -> float:
    """R² of the teacher's layer-normalised latents as predictions of the files', on view 0 of clips at both
    ends of the table, against each token place's mean over these clips: 1 where they agree, below 0 where
    they are of other clips.

    Raises `CacheError` under `MIN_R2`, saying so where the names have evidently shifted.
    """
    loaded = load_teacher(teacher, clips.geometry, layer=-1 if layer is None else layer)
    with_files = [clip_id for clip_id in clips.table.clip_ids if clip_id in clips.name_of]
    chosen = list(dict.fromkeys(with_files[:RUN] + with_files[-RUN:]))
    reader = ViewReader(clips.table, clips.view, clips.geometry)
    theirs, mine = [], []
    reasons = []
    with progress(f"Comparing with {teacher}", len(chosen), "clips") as advance:
        for clip_id in chosen:
            name = clips.name_of[clip_id]
            (record,) = read_or_quarantine(reader, [(clip_id, 0)])
            try:
                if record.array is None:
                    raise CacheError(record.reason)
                latents = read_latents(found.files[name], name, (loaded.geometry.num_tokens, loaded.dim))
                mine.append(loaded.latents(torch.from_numpy(record.array[None]))[0].float().cpu())
                theirs.append(torch.from_numpy(latents).float())
            except CacheError as error:
                reasons.append(str(error))
            advance(1)
    if len(theirs) < 2:
        why = f"; the first reason: {reasons[0]}" if reasons else ""
        raise CacheError(f"fewer than two clips can be compared with teacher {teacher}{why}")
    files, own = normalise(torch.stack(theirs)), normalise(torch.stack(mine))
    value = _r2(own, files)
    if not value >= MIN_R2:
        raise CacheError(
            f"the latents of {found.folder} are not teacher {teacher}'s of the stated clips: R² is "
            f"{value:.2f} on {len(files)} of them, where 1 is the same{_shift(own, files)}; names, frames, "
            "crops, layer or teacher are others"
        )
    return round(value, 6)


def _r2(predicted: Tensor, targets: Tensor) -> float:
    return float(explained_variance(predicted, targets, targets.mean(dim=0)))


def _shift(own: Tensor, files: Tensor) -> str:
    """Whether the last files are of clips a few places further on, in words."""
    last, further = files[-RUN:], own[-RUN:]
    values = {by: _r2(further[by:], last[:-by]) for by in range(1, len(last) - 1)}
    best = max(values, key=lambda by: values[by], default=0)
    if not best or np.isnan(values[best]) or values[best] < MIN_R2:
        return ""
    return f" (and {values[best]:.2f} with clips {best} further on: the names have shifted, see --unreadable)"
