"""`data index`: from a data set in any known layout to its clip table, and what it could not give."""

from __future__ import annotations

from pathlib import Path

from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting, Listing, Problem, SourceOptions, cut_clips
from salt_vla.registry import SOURCES, resolve


def index_data(
    path: Path, cutting: Cutting, source: str = "lerobot", options: SourceOptions = SourceOptions()
) -> tuple[ClipTable, list[Problem]]:
    """The clips of a data set, and the segments that give none."""
    listing: Listing = resolve(SOURCES, source)(path, options)
    return cut_clips(listing, cutting)
