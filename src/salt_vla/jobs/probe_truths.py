"""What a run's online probe is asked for: recorded signals of every view of its clips, and their labels.

Read once, before the first step, into arrays of bounded size; knows neither encoders nor how a probe is fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from salt_vla.config import TrainConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import draw_view
from salt_vla.errors import DataError
from salt_vla.evaluation.targets import build_targets
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import build_masks
from salt_vla.registry import SIGNALS, resolve
from salt_vla.training.flops import mean_step_flops
from salt_vla.training.online_probe import LEAST_CLIPS, OnlineProbe, Truths
from salt_vla.training.probe_plan import plan_probe

AT_ONCE = 8192  # clips whose signals are in memory together
MOST_BYTES = 256 * 2**20  # of all truths: 168,903 clips of 3 views and 25 numbers take 51 MB
MOST_CLASSES = 1000
LABEL = "label"


@dataclass(frozen=True)
class Offer:
    """A probe, or None and why; `note` says what it does without, too."""

    probe: OnlineProbe | None
    note: str = ""


def online_probe(config: TrainConfig, learned: ClipTable, held_out: ClipTable, target_dim: int) -> Offer:
    """The probe that `runtime.probe_clips` asks for, of all that is known of both sides of the split.

    A data set that has neither signals nor labels, or whose signals cannot be read, ends no training.
    """
    if not (config.runtime.probe_clips and config.runtime.validation_clips):
        return Offer(None)
    if min(config.runtime.validation_clips, len(held_out)) < LEAST_CLIPS:
        return Offer(None, f"no online probe: it needs {LEAST_CLIPS} held-out clips at each validation")
    flops = mean_step_flops(config, target_dim, build_masks(config.masks, config.geometry)).total
    plan = plan_probe(config, min(config.runtime.validation_clips, len(held_out)), flops)
    if plan is None:
        return Offer(None, "no online probe: the run is too short for one (runtime.probe_every asks for it)")
    view, geometry, why = config.data.view, config.geometry, ""
    numbers: list[dict[str, np.ndarray]] = [{}, {}]
    try:
        _require_signals(learned)
        numbers = [_numbers(learned, view, geometry, view.num_views), _numbers(held_out, view, geometry, 1)]
    except DataError as error:
        why = str(error)
    classes = _classes(learned, held_out)
    both = [name for name in numbers[0] if name in numbers[1]]
    if not (both or classes):
        return Offer(None, f"no online probe: {why or 'no number is known of both sides'}; and no labels")

    def truths(side: int, table: ClipTable) -> Truths:
        row_of = {clip: row for row, clip in enumerate(table.clip_ids)}
        of_class = {LABEL: classes[side]} if classes else {}
        return Truths(row_of, _episodes(table), {name: numbers[side][name] for name in both}, of_class)

    probe = OnlineProbe(truths(0, learned), truths(1, held_out), plan, config)
    return Offer(probe, f"the online probe reads labels alone: {why}" if why else "")


def _require_signals(table: ClipTable) -> None:
    sources = set(table.rows["source"].to_pylist())
    if not sources <= SIGNALS.keys() or len(table.roots) != 1:
        raise DataError(f"signals come from one data set of: {', '.join(SIGNALS)}")


def _numbers(
    table: ClipTable, view: ViewConfig, geometry: ClipGeometry, num_views: int
) -> dict[str, np.ndarray]:
    """float32 (clips, views, dims) by target: of the frames that each view shows, which may be shifted."""
    found: dict[str, np.ndarray] = {}
    for number, part in _views(table, view, geometry, num_views):
        for start in range(0, len(part), AT_ONCE):
            some = part.filtered(part.rows.slice(start, AT_ONCE))
            signals = resolve(SIGNALS, part.rows["source"][0].as_py())(some, geometry.num_frames, view)
            known = {name: v for name, v in build_targets(signals).items() if v.dtype.kind == "f"}
            if not found:
                size = sum(values.shape[1] for values in known.values())
                _require_size(len(table) * num_views * size * 4)
                found = {
                    name: np.empty((len(table), num_views, values.shape[1]), np.float32)
                    for name, values in known.items()
                }
            for name, values in known.items():
                rows = slice(start, start + len(values))
                found[name][rows, number] = values
                if number == 0 and not view.max_shift:
                    found[name][rows] = values[:, None]
    return found


def _views(
    table: ClipTable, view: ViewConfig, geometry: ClipGeometry, num_views: int
) -> Iterator[tuple[int, ClipTable]]:
    """Each view's number with the table of its first frames; the first alone, where no view is shifted."""
    yield 0, table
    if not view.max_shift or num_views == 1:
        return
    clips = table.clips()
    for number in range(1, num_views):
        shown = [draw_view(clip, number, view, geometry, (1, 1)).frames[0] for clip in clips]
        rows = table.rows
        column = rows.schema.get_field_index("first_frame")
        yield number, table.filtered(rows.set_column(column, "first_frame", pa.array(shown, pa.int64())))


def _require_size(size: int) -> None:
    if size > MOST_BYTES:
        raise DataError(f"what is known of all views takes {size / 2**20:,.0f} MiB, over {MOST_BYTES >> 20}")


def _classes(learned: ClipTable, held_out: ClipTable) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels as numbers, the same on both sides; None where they tell nothing apart or are names of clips."""
    sides = [np.array(table.rows["label"].to_pylist(), dtype=np.str_) for table in (learned, held_out)]
    names, codes = np.unique(np.concatenate(sides), return_inverse=True)
    apart = [len(np.unique(side)) for side in sides]
    if min(apart) < 2 or len(names) > min(MOST_CLASSES, len(learned) // 2):
        return None
    first, second = np.split(codes.astype(np.int64), [len(learned)])
    return first, second


def _episodes(table: ClipTable) -> np.ndarray:
    """A number for each (data set, episode)."""
    named = zip(table.rows["dataset"].to_pylist(), table.rows["episode"].to_pylist(), strict=True)
    known: dict[tuple[str, int], int] = {}
    return np.array([known.setdefault(each, len(known)) for each in named], np.int64)
