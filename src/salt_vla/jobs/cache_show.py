"""`cache show`: what the records of a cache are like, and what they look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from salt_vla.cache import ArrayCache, CorruptRecord, Key
from salt_vla.config import ViewConfig, from_json
from salt_vla.data.view_lock import ViewReader, view_hash
from salt_vla.errors import CacheError
from salt_vla.evaluation.latent_statistics import LatentStatistics, LatentSums
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table, read_or_quarantine
from salt_vla.objectives import normalise
from salt_vla.progress import progress

if TYPE_CHECKING:
    from salt_vla.data.clip_table import ClipTable

SAMPLE = 64  # records that statistics are taken of
AT_ONCE = 8
SHOWN = 4  # clips on a picture


@dataclass(frozen=True)
class Sampled:
    """Statistics of `records` records spread over the cache and the channels that vary most; how many further
    records could not be read."""

    records: int
    damaged: int
    top_channels: list[int]
    statistics: LatentStatistics

    def to_json(self) -> dict[str, Any]:
        said = asdict(self)
        return said | said.pop("statistics")


def spread_keys(cache: ArrayCache, count: int) -> list[Key]:
    """Up to `count` records, evenly over the clips, their views in turn."""
    clips = len(cache.clip_ids)
    if not clips:
        raise CacheError(f"the cache {cache.folder} holds no records; its quarantine.json says why")
    places = np.unique(np.linspace(0, clips - 1, min(count, clips)).astype(int))
    keys = [(cache.clip_ids[int(place)], turn % cache.num_views) for turn, place in enumerate(places)]
    return [key if key in cache else (key[0], _first_view(cache, key[0])) for key in keys]


def _first_view(cache: ArrayCache, clip_id: str) -> int:
    return next(view for view in range(cache.num_views) if (clip_id, view) in cache)


def sample_statistics(cache: ArrayCache, count: int = SAMPLE) -> Sampled:
    """Of raw and of layer-normalised latents. Raises `CacheError` for a store of views, or when not one of
    the chosen records can be read."""
    if cache.manifest.kind != "latents":
        raise CacheError(f"{cache.folder} holds pixels, not latents; --picture shows them")
    keys = spread_keys(cache, count)
    sums = LatentSums(*cache.encoding.shape)
    damaged: list[str] = []
    with progress("Reading records", len(keys), "records") as advance:
        for start in range(0, len(keys), AT_ONCE):
            arrays = _readable(cache, keys[start : start + AT_ONCE], damaged)
            if arrays:
                sums.add(torch.from_numpy(np.stack(arrays)))
            advance(len(keys[start : start + AT_ONCE]))
    if len(damaged) == len(keys):
        raise CacheError(f"not one of {len(keys)} records can be read; the first: {damaged[0]}")
    return Sampled(len(keys) - len(damaged), len(damaged), sums.top_channels(), sums.statistics())


def _readable(cache: ArrayCache, keys: Sequence[Key], damaged: list[str]) -> list[np.ndarray]:
    arrays = []
    for clip_id, view in keys:
        try:
            arrays.append(cache.read(clip_id, view=view))
        except CorruptRecord as error:
            damaged.append(str(error))
    return arrays


def draw(cache: ArrayCache, data: str | None = None, count: int = SHOWN) -> bytes:
    """A PNG: principal components of layer-normalised tokens of a few clips as colours, each below its film
    where `data` names the clip table that the cache was made of. Raises `CacheError` when it is another."""
    from salt_vla.reports.sheets import ShownTokens, pca_sheet

    keys = [(clip_id, 0) for clip_id, _ in spread_keys(cache, count) if (clip_id, 0) in cache]
    geometry = geometry_of(cache)
    if cache.manifest.kind == "views":
        shown = [ShownTokens(clip_id, None, cache.read(clip_id)) for clip_id, _ in keys]
        return pca_sheet(shown, geometry)
    films = _films(cache, geometry, data, keys) if data is not None else [None] * len(keys)
    tokens = [normalise(torch.from_numpy(cache.read(clip_id))).numpy() for clip_id, _ in keys]
    shown = [ShownTokens(key[0], own, film) for key, own, film in zip(keys, tokens, films, strict=True)]
    return pca_sheet(shown, geometry)


def geometry_of(cache: ArrayCache) -> ClipGeometry:
    """Of the clips that the records are of. Raises `CacheError` where nobody knows."""
    if cache.manifest.kind == "views":
        frames, size = cache.encoding.shape[:2]
        return ClipGeometry(frames, size, 1, size)
    said = cache.manifest.provenance["geometry"]
    if said is None:
        raise CacheError(
            f"the cache {cache.folder} was imported, and nobody has said how its tokens lie in a clip; "
            "import it with --recipe to draw it"
        )
    return ClipGeometry(**said)


def _films(
    cache: ArrayCache, geometry: ClipGeometry, data: str, keys: Sequence[Key]
) -> list[np.ndarray | None]:
    provenance = cache.manifest.provenance
    said = {**provenance["view"], "num_views": cache.num_views}
    view = from_json(ViewConfig, json.dumps(said), f"{cache.folder}/manifest.json, provenance.view")
    table = _table_of(cache, open_table(data, view, geometry))
    if provenance["view_hash"] != view_hash(view, geometry):
        raise CacheError(
            f"the views of {cache.folder} come out as other pixels here than when it was built (see "
            "docs/video.md); draw it without --data"
        )
    return [record.array for record in read_or_quarantine(ViewReader(table, view, geometry), keys)]


def _table_of(cache: ArrayCache, table: ClipTable) -> ClipTable:
    """The part of the table that the cache was made of: that of its split, or all of its clips."""
    provenance = cache.manifest.provenance
    clips = table.only(cache.clip_ids)
    if len(clips) < len(cache.clip_ids):
        raise CacheError(
            f"{len(cache.clip_ids) - len(clips)} clips of {cache.folder} are not in {table.name}; give the "
            f"clip table that it was built from (its hash is {provenance['clip_table']})"
        )
    return clips
