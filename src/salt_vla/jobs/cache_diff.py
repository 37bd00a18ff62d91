"""`cache diff`: two caches, or a cache and a recipe, field by field, and how many records are equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from salt_vla.cache import ArrayCache, Manifest, open_cache
from salt_vla.config import TrainConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash, view_settings
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import split_table

CHUNK = 1 << 16  # clips that are compared at once
NAMED = 8  # differing records that are named
FOLLOWS = ("index_bytes", "index_checksum", "quarantine_checksum", "checksum")  # say nothing of their own
MISSING = "–"


@dataclass(frozen=True)
class FieldDifference:
    """A field that two sides do not agree in; `MISSING` where a side lacks it."""

    name: str
    a: Any
    b: Any


@dataclass
class RecordCounts:
    """Records of two caches by (clip, view): equal and different ones by their checksums, and those that only
    one has. `differing` names the first few."""

    equal: int = 0
    different: int = 0
    only_a: int = 0
    only_b: int = 0
    differing: list[tuple[str, int]] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        return not (self.different or self.only_a or self.only_b)


@dataclass(frozen=True)
class Difference:
    """What differs; `records` is None where they cannot be compared, for the reason `why_no_records`."""

    fields: list[FieldDifference]
    records: RecordCounts | None = None
    why_no_records: str = ""

    @property
    def is_same(self) -> bool:
        return not self.fields and (self.records is None or self.records.is_same)

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.is_same,
            "fields": [{"field": row.name, "a": row.a, "b": row.b} for row in self.fields],
            "records": None if self.records is None else asdict(self.records),
        }


def diff_caches(a: Path, b: Path) -> Difference:
    """Every field of the two manifests, and the records where both caches are finished and encode alike.

    Checksums are taken from the indexes, so no record is read. Raises `CacheError` for a damaged one.
    """
    manifests = Manifest.read(a), Manifest.read(b)
    fields = differing(*(flat(asdict(manifest)) for manifest in manifests))
    reason = ""
    if not all(manifest.complete for manifest in manifests):
        reason = "unfinished"
    elif manifests[0].record != manifests[1].record:
        reason = "stored in another encoding or shape"
    if reason:
        return Difference(fields, None, reason)
    return Difference(fields, compare_records(open_cache(a), open_cache(b)))


def diff_recipe(a: Path, config: TrainConfig, table: ClipTable | None) -> Difference:
    """What of a cache a run of `config` would not accept; without a table, clips are not compared.

    Raises `ConfigError` for a store of views, of which a recipe asks nothing.
    """
    manifest = Manifest.read(a)
    if manifest.kind != "latents":
        raise ConfigError(
            f"{a} holds pixels, and a recipe asks for latents; give a cache of a teacher's latents"
        )
    # Held-out clips need no more than view 0.
    num_views = config.data.view.num_views if manifest.provenance.get("split") == "train" else 1
    clips = None if table is None else _clips_of(table, manifest.provenance)
    return Difference(unlike_asked(manifest, config.data.view, config.geometry, num_views, clips))


def unlike_asked(
    manifest: Manifest, view: ViewConfig, geometry: ClipGeometry, num_views: int, clips: ClipTable | None
) -> list[FieldDifference]:
    """Where latents (`a`) are not what a run asks for (`b`): of these views, tokens and, if given, clips."""
    have: dict[str, Any] = {
        "kind": manifest.kind,
        "token_order": manifest.token_order,
        "tokens": manifest.shape[0],
        "num_views": manifest.num_views,
        "num_clips": manifest.num_clips,
    }
    wanted: dict[str, Any] = {
        "kind": "latents",
        "token_order": "time,row,column",
        "tokens": geometry.num_tokens,
        "num_views": max(num_views, manifest.num_views),  # More than a run draws do no harm.
        "geometry": asdict(geometry),
        "view": view_settings(view),
        "view_hash": view_hash(view, geometry),
    }
    if clips is not None:
        wanted |= {"clip_table": clips.hash, "files": clips.files_hash, "num_clips": len(clips)}
    have = {name: have[name] if name in have else manifest.provenance.get(name) for name in wanted}
    return differing(flat(have), flat(wanted))


def _clips_of(table: ClipTable, provenance: Mapping[str, Any]) -> ClipTable:
    """The clips that a run would compare with a cache of this split: where every tenth episode is held out, a
    cache of all training clips serves, or one of those that are left."""
    splits = set(table.rows["split"].to_pylist())
    split = provenance.get("split")
    clips = table.select(split=split) if split in splits else table
    if split == "train" and provenance.get("clip_table") != clips.hash and "validation" not in splits:
        left = split_table(table).train
        return left if left.hash == provenance["clip_table"] else clips
    return clips


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects as one, names joined by dots, values as JSON gives them back."""
    said = json.loads(json.dumps(dict(fields)))
    return dict(_flat(said, ""))


def _flat(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[FieldDifference]:
    """Fields in which the two disagree; those that follow from the records are left to them."""
    rows = [
        FieldDifference(name, a.get(name, MISSING), b.get(name, MISSING))
        for name in sorted(a.keys() | b.keys())
        if name not in FOLLOWS
    ]
    return [row for row in rows if row.a != row.b]


def compare_records(a: ArrayCache, b: ArrayCache) -> RecordCounts:
    """Counts by clip id, whatever the order of the clips; `CHUNK` clips in memory at a time."""
    counts = RecordCounts()
    seen = 0
    ids, present, checksums = a.index.all_ids(), a.index.all_present(), a.index.all_checksums()
    ids_b, present_b, checksums_b = b.index.all_ids(), b.index.all_present(), b.index.all_checksums()
    views = min(a.num_views, b.num_views)
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        clips = ids.slice(start, CHUNK)
        rows = _rows_of(clips, start, ids_b, b)
        known = rows >= 0
        ours, theirs = present[part].astype(bool), present_b[rows[known]].astype(bool)
        both = ours[known][:, :views] & theirs[:, :views]
        unlike = checksums[part][known][:, :views] != checksums_b[rows[known]][:, :views]
        common = int(both.sum())
        counts.different += int((both & unlike).sum())
        counts.equal += common - int((both & unlike).sum())
        counts.only_a += int(ours.sum()) - common
        seen += common
        for row, view in np.argwhere(both & unlike)[: NAMED - len(counts.differing)]:
            counts.differing.append((clips[int(np.flatnonzero(known)[row])].as_py(), int(view)))
    counts.only_b = b.manifest.num_records - seen
    return counts


def _rows_of(clips: pa.Array, start: int, ids_b: pa.Array, b: ArrayCache) -> np.ndarray:
    """Each clip's row in `b`, or −1: at the same place in caches of one table, else by looking it up."""
    same_place = ids_b.slice(start, len(clips))
    if clips.equals(same_place):
        return np.arange(start, start + len(clips))
    return b.index.rows_of(clips)
