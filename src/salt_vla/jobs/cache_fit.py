"""Whether a cache holds the latents that a run wants: compared field by field, refused with a table.

Knows manifests and what a run asks for; reads no record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from salt_vla.cache import ArrayCache
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.cache_diff import FieldDifference, differing, flat, unlike_asked

STATED = ("clip_table", "files", "view_hash", "geometry", "view")  # what an import may leave unknown


def require_fit(
    cache: ArrayCache, clips: ClipTable, view: ViewConfig, geometry: ClipGeometry, num_views: int
) -> None:
    """Refuse a cache whose latents were not made from these clips, views and tokens: `CacheError`, a sentence
    and below it a table of the fields that differ."""
    said = cache.manifest.provenance
    unknown = [name for name in STATED if name in said and said[name] is None]
    if unknown:
        raise CacheError(
            f"the cache {cache.folder} was imported, and nobody has stated its {', '.join(unknown)}; import "
            "it again with --data TABLE and --recipe NAME, if you know which clips and pixels it was made of"
        )
    rows = _without_consequences(unlike_asked(cache.manifest, view, geometry, num_views, clips))
    if rows:
        raise CacheError(
            f"the cache {cache.folder} does not fit this run: they differ in {_named(rows)}; build one from "
            f"the run's clip table and views\n{as_table(rows, 'the cache', 'the run')}"
        )


def _without_consequences(rows: Sequence[FieldDifference]) -> list[FieldDifference]:
    """Other settings have another hash: it is worth a line where it alone differs (pixels decoded or cut
    otherwise)."""
    is_explained = any(row.name.startswith(("view.", "geometry.")) for row in rows)
    return [row for row in rows if not (row.name == "view_hash" and is_explained)]


def require_same_teacher(a: ArrayCache, b: ArrayCache) -> None:
    """Refuse two caches of one run whose latents cannot be compared: other teachers, layers or encodings."""
    rows = differing(*(flat(_teacher_of(cache)) for cache in (a, b)))
    if _teacher_of(a)["fingerprint"] and [row.name for row in rows] == ["teacher"]:
        return  # The same weights under two names.
    if rows:
        raise CacheError(
            f"{a.folder} and {b.folder} hold latents of different teachers, or stored differently: they "
            f"differ in {_named(rows)}; build both alike\n{as_table(rows, str(a.folder), str(b.folder))}"
        )


def _teacher_of(cache: ArrayCache) -> dict[str, Any]:
    manifest = cache.manifest
    provenance = manifest.provenance
    names = ("teacher", "fingerprint", "layer", "dtype")
    said = {name: provenance.get(name) for name in names}
    stored = {"encoding": manifest.encoding, "shape": list(manifest.shape), "order": manifest.token_order}
    return said | stored


def require_as_before(what: str, run: str, now: dict[str, Any], before: dict[str, Any], record: Path) -> None:
    """Refuse to go on with a run whose clips or cache are others than those that it began with."""
    rows = differing(flat(now), flat(before))
    if rows:
        raise CacheError(
            f"run {run!r} began with another {what}: they differ in {_named(rows)} ({record} holds the "
            f"run's); give the run another --name\n{as_table(rows, f'this {what}', 'the run')}"
        )


def _named(rows: Iterable[FieldDifference]) -> str:
    return ", ".join(row.name for row in rows)


def as_table(rows: Sequence[FieldDifference], a: str, b: str) -> str:
    """Lines of three columns, in plain text."""
    cells = [("field", a, b), *((row.name, _shown(row.a), _shown(row.b)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)
