"""The caches below the root as lines of a table: manifests and sizes alone, no record is read."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from salt_vla.cache.format import LEASES, SHARDS, Manifest, is_of_others, manifests_below
from salt_vla.cache.leases import living
from salt_vla.errors import CacheError
from salt_vla.rundir import root

DEEPEST = 3  # folders below caches/ that are looked into: caches/NAME/SPLIT, and one more
MOST = 500


def cache_rows() -> list[dict[str, Any]]:
    """One a cache, by path; of a damaged one what is wrong with it."""
    found = (folder for folder in manifests_below(root() / "caches", DEEPEST) if not is_of_others(folder))
    return [_row(folder) for folder in islice(found, MOST)]


def manifest_of(path: str) -> dict[str, Any]:
    """Every field of a manifest by its dotted name; `path` as `cache_rows` gives it. Empty for another."""
    folder = (root() / path).resolve()
    if not folder.is_relative_to((root() / "caches").resolve()):
        return {}
    try:
        return _flat(json.loads(Manifest.read(folder).to_text()))
    except CacheError as error:
        return {"problem": str(error)}


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(folder.relative_to(root()))}
    builders = living(folder / LEASES)
    try:
        manifest = Manifest.read(folder)
    except CacheError as error:
        return row | {"complete": "damaged", "problem": str(error)}
    state = f"being built by {builders[0]}" if builders else "unfinished"
    provenance = manifest.provenance
    return row | {
        "complete": "complete" if manifest.complete else state,
        "kind": manifest.kind,
        "teacher": str(provenance.get("teacher", "")),
        "split": str(provenance.get("split", "")),
        "clips": manifest.num_clips,
        "views": manifest.num_views,
        "shape": " × ".join(map(str, manifest.shape)),
        "encoding": manifest.encoding,
        "quarantined": manifest.num_quarantined,
        "gigabytes": _bytes(folder) / 1e9,
    }


def _bytes(folder: Path) -> int:
    shards = folder / SHARDS
    return sum(file.stat().st_size for file in shards.iterdir()) if shards.is_dir() else 0


def _flat(said: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in said.items():
        inside = value if isinstance(value, dict) else None
        flat |= _flat(inside, f"{before}{name}.") if inside else {f"{before}{name}": value}
    return flat
