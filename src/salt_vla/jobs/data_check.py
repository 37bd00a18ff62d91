"""`data check`: every clip of a table decoded once, and the bad ones named with their reasons."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.data.workers import Lost, map_in_workers
from salt_vla.errors import ConfigError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data_index import without_path
from salt_vla.progress import progress
from salt_vla.rundir import write_text

CLIPS_AT_ONCE = 16  # of one episode: they share its decoding
SECONDS_A_CLIP = 90.0  # decoding gives up by itself before
GROUPS_WORTH_A_PROCESS = 16  # Its start takes as long as decoding so many short films.
IMAGE_SIZE = 16  # Every frame is decoded; what it is resized to says nothing of the file.


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be read."""

    clip_id: str
    file: str
    reason: str


@dataclass(frozen=True)
class Checked:
    """How many clips were decoded, in how many seconds, and which could not be."""

    clips: int
    seconds: float
    bad: tuple[BadClip, ...]

    @property
    def clips_per_second(self) -> float:
        return self.clips / max(self.seconds, 1e-9)


def check_table(table: ClipTable, cutting: Cutting, num_workers: int = 0, sample: int = 0) -> Checked:
    """Decode view 0 of all clips, or of `sample` of them drawn at random (always the same ones).

    With workers a file that kills its decoder costs the clips of that file alone.
    """
    if sample < 0:
        raise ConfigError(f"--sample must be 0 (all clips) or more, not {sample}")
    clip_ids = table.clip_ids
    if 0 < sample < len(clip_ids):
        drawn = np.random.default_rng(0).choice(len(clip_ids), sample, replace=False)
        clip_ids = [clip_ids[row] for row in sorted(drawn.tolist())]
    geometry = ClipGeometry(cutting.num_frames, IMAGE_SIZE, tubelet_size=1, patch_size=IMAGE_SIZE)
    read = partial(_reasons, ViewReader(table, cutting.view, geometry))
    groups = list(_groups(table, clip_ids))
    workers = min(num_workers, 1 + len(groups) // GROUPS_WORTH_A_PROCESS)
    reasons: dict[str, str] = {}
    started = time.monotonic()
    with progress("Decoding clips", len(clip_ids), "clips") as advance:
        lost: list[list[str]] = []
        limit = SECONDS_A_CLIP * CLIPS_AT_ONCE
        for group, found in zip(groups, map_in_workers(read, groups, workers, limit), strict=True):
            if isinstance(found, Lost) and len(group) > 1:
                lost += [[clip_id] for clip_id in group]
                continue
            reasons |= {group[0]: found.reason} if isinstance(found, Lost) else found
            advance(len(group), note=f"{len(reasons)} bad" if reasons else "")
        # Who of a lost group killed the worker comes out when each has one to itself.
        for group, found in zip(
            lost, map_in_workers(read, lost, min(workers, len(lost)), limit), strict=True
        ):
            reasons |= {group[0]: found.reason} if isinstance(found, Lost) else found
            advance()
    files = dict(zip(table.clip_ids, table.rows["file"].to_pylist(), strict=True))
    bad = tuple(BadClip(clip, files[clip], reasons[clip]) for clip in clip_ids if clip in reasons)
    return Checked(len(clip_ids), time.monotonic() - started, bad)


def write_bad(checked: Checked, out: Path) -> None:
    write_text(out, json.dumps([asdict(clip) for clip in checked.bad], indent=1) + "\n")


def _groups(table: ClipTable, clip_ids: Sequence[str]) -> Iterator[list[str]]:
    """The clips in the table's order, in groups of one episode."""
    rows = table.rows
    places = zip(
        *(rows[name].to_pylist() for name in ("dataset", "file", "episode_first_frame")), strict=True
    )
    place_of = dict(zip(table.clip_ids, places, strict=True))
    group: list[str] = []
    for clip_id in clip_ids:
        if group and (place_of[clip_id] != place_of[group[0]] or len(group) == CLIPS_AT_ONCE):
            yield group
            group = []
        group.append(clip_id)
    if group:
        yield group


def _reasons(reader: ViewReader, clip_ids: Sequence[str]) -> dict[str, str]:
    """Of those that cannot be read; what they hold is dropped."""
    found = {}
    for clip_id in clip_ids:
        try:
            reader.read(clip_id)
        except DataError as error:
            clip = reader.table.clip(clip_id)
            said = DataError(str(error).removeprefix(f"clip {clip_id!r}, view 0: "))
            found[clip_id] = without_path(said, reader.table.roots[clip.dataset] / clip.file)
    return found
