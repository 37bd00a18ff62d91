"""Finding clips for a command: tables from data sets, and views from the decoder or a store."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from salt_vla.cache import CacheWriter, Key, Record
from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs.data_index import TooManyBad, index_data, kinds_of, place_of, recognised_by
from salt_vla.jobs.pipeline import Pipeline, num_decoders
from salt_vla.jobs.resources import require_room
from salt_vla.jobs.unread_views import Approval
from salt_vla.progress import progress
from salt_vla.rundir import root
from salt_vla.view_store import StoredViews, ViewSource, store_manifest

VIEWS_AT_ONCE = 16  # from the decoder to the disk
HELD_OUT_EVERY = 10  # of the training episodes, where a data set has no validation split


def open_table(spec: str, view: ViewConfig, geometry: ClipGeometry) -> ClipTable:
    """A clip table from `spec`: a Parquet clip table, `metaworld-mini`, or what a source recognises, which is
    then indexed for this view and not kept; what it cannot give is counted on stderr."""
    if not spec:
        raise DataError("no data: give --data a clip table, a data set's folder, or metaworld-mini")
    path = place_of(spec)
    if not path.is_dir() and not recognised_by(path):
        table = ClipTable.read(path)
        if not len(table):
            raise DataError(f"the clip table {spec} has no clips; index a data set that has some")
        return table
    if not recognised_by(path):
        raise DataError(
            f"{spec} holds no data set of a layout that is known here; where you know which it is, "
            f"`salt-vla data index {spec} --source …` makes a clip table of it"
        )
    try:
        table, problems = index_data(path, Cutting(view, geometry.num_frames))
    except TooManyBad as error:
        raise DataError(f"{error}; `salt-vla data index` names each") from error
    if problems:
        said = ", ".join(f"{n} × {kind}" for kind, n in kinds_of(each.reason for each in problems).items())
        print(f"{spec}: left out: {said}; `salt-vla data index` names each", file=sys.stderr)
    return table


@dataclass(frozen=True)
class Splits:
    """Clips to learn from and clips held out, by episode; `note` says where the held-out ones come from."""

    train: ClipTable
    validation: ClipTable
    note: str


def training_clips(table: ClipTable) -> ClipTable:
    """The clips of the split `train`, or all of them where no split is called so."""
    return table.select(split="train") if "train" in table.rows["split"].to_pylist() else table


def split_table(table: ClipTable, may_use_validation: bool = True) -> Splits:
    """The table's own splits; without a usable validation split every tenth training episode is held out."""
    train = training_clips(table)
    if may_use_validation and "validation" in table.rows["split"].to_pylist():
        return Splits(train, table.select(split="validation"), "the data set's validation split")
    names = ("dataset", "episode")
    of_clip = list(zip(*(train.rows[name].to_pylist() for name in names), strict=True))
    episodes = sorted(set(of_clip))
    if len(episodes) < 2:
        raise DataError(f"{table.name} has one training episode; two are needed to hold one out")
    # By number, not by rank: another stride or clip length that drops an episode must not move the others.
    held_out = {key for key in episodes if key[1] % HELD_OUT_EVERY == 0} or {episodes[0]}
    if len(held_out) == len(episodes):
        held_out = {episodes[0]}
    mask = np.array([key in held_out for key in of_clip])
    kept, held = (train.filtered(train.rows.filter(chosen)) for chosen in (~mask, mask))
    return Splits(kept, held, f"every {HELD_OUT_EVERY}th episode of the training split")


def open_views(
    table: ClipTable, data: DataConfig, geometry: ClipGeometry, num_views: int | None = None
) -> tuple[ViewSource, list[str]]:
    """Views of `table`, and the clips whose views can all be read.

    With `store_views` they are decoded once, into a store named by their content; else at every reading.
    """
    if not data.store_views:
        return ViewReader(table, data.view, geometry), table.clip_ids
    count = num_views or data.view.num_views
    manifest = store_manifest(table, data.view, geometry, count)
    identity = [manifest.provenance[name][:8] for name in ("clip_table", "files", "view_hash")]
    folder = root() / "caches" / f"views-{'-'.join(identity)}-{count}"
    build_view_store(table, data.view, geometry, count, folder, data.num_workers or None)
    stored = StoredViews(folder, manifest)
    return stored, list(compress(table.clip_ids, stored.cache.with_views(table.clip_ids, count)))


def build_view_store(
    table: ClipTable,
    view: ViewConfig,
    geometry: ClipGeometry,
    num_views: int,
    folder: Path,
    num_workers: int | None = None,
) -> None:
    """Decode every view of every clip into `folder`, in `num_workers` processes (None: chosen); goes on where
    an earlier call was interrupted, and together with others."""
    manifest = store_manifest(table, view, geometry, num_views)
    require_room(folder, manifest, "the view store")
    with CacheWriter(folder, manifest, table.clip_ids) as writer, stop_on_signals() as stop:

        def check() -> None:
            stop.check("while decoding views")

        left = writer.num_keys - writer.num_keys_done
        reader = ViewReader(table, view, geometry)
        approval = Approval(writer, f"mend the files, remove {folder}, and run again", table)
        if left:
            approval.beginning()
            workers = num_decoders(num_workers, left)
            pipeline = Pipeline(
                writer, reader, lambda views: views, VIEWS_AT_ONCE, workers, check, approve=approval.shard
            )
            done = writer.num_keys - left
            with progress("Decoding views", writer.num_keys, "views", done=done) as advance:
                pipeline.run(advance)
        writer.finish(lambda _: check(), approval.whole)


def read_or_quarantine(views: ViewSource, keys: Sequence[Key]) -> Iterator[Record]:
    """A record a key: its pixels, or the reason why it has none."""
    for key, pixels in views.read_each(keys):
        yield Record(key, None, str(pixels)) if isinstance(pixels, DataError) else Record(key, pixels)
