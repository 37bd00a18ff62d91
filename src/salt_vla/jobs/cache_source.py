"""What a cache's records were computed from, opened again as its manifest says; refused when it is another.

Knows neither shards nor damage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from salt_vla.cache.format import Manifest, describe_differences
from salt_vla.config import RuntimeConfig, TrainConfig, ViewConfig, from_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.build_cache import latents_manifest
from salt_vla.jobs.data import open_table
from salt_vla.teachers import Teacher, load_teacher
from salt_vla.training.runtime import resolve_device


@dataclass(frozen=True)
class Source:
    """What a cache's records were computed from: the teacher, the clips of its split, and their views."""

    teacher: Teacher
    table: ClipTable
    view: ViewConfig


FindSource = Callable[[Manifest], Source]


def source_of(teacher: str, data: str, device: str = "auto") -> FindSource:
    """How to open what a cache was made of; how it was used is in its manifest. Raises as `load_teacher` and
    `open_table` do."""

    def find(manifest: Manifest) -> Source:
        said = manifest.provenance
        _require_computed(manifest)
        settings = {**said["view"], "num_views": manifest.num_views}
        view = from_json(ViewConfig, json.dumps(settings), "the manifest's provenance.view")
        geometry = ClipGeometry(**said["geometry"])
        norm: Literal["model", "none"] = "model" if said["teacher"].endswith("/norm") else "none"
        where = resolve_device(TrainConfig(runtime=RuntimeConfig(device=device))).runtime.device
        loaded = load_teacher(teacher, geometry, where, said["dtype"], said["layer"], norm)
        return Source(loaded, open_table(data, view, geometry).select(split=said["split"]), view)

    return find


def _require_computed(manifest: Manifest) -> None:
    if manifest.kind != "latents" or not manifest.provenance.get("fingerprint"):
        raise CacheError(
            "the records of this cache are no latents that this program has computed; remove it, and decode "
            "or import them again"
        )


def require_same(manifest: Manifest, source: Source, folder: Path) -> None:
    """Refuse a source that is not what the cache was made of, field by field."""
    _require_computed(manifest)
    provenance = manifest.provenance
    wanted = latents_manifest(
        source.teacher,
        source.table,
        provenance["split"],
        source.view,
        manifest.encoding,
        provenance["batch_size"],
    )
    # A teacher's name says where it lay; its fingerprint, what it is.
    wanted = replace(
        wanted,
        records_per_shard=manifest.records_per_shard,
        provenance=wanted.provenance | {"teacher": provenance["teacher"]},
    )
    if differences := manifest.differences(wanted):
        raise CacheError(
            f"{folder} was made from something else ({describe_differences(differences)}); give the teacher "
            "and the data that its manifest names"
        )
