"""Pixels of (clip, view): from the decoder, or from a store that decoded them once.

A store is an `ArrayCache` of uint8 records; both give the same bytes, and the manifest proves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from salt_vla.cache import ArrayCache, Manifest
from salt_vla.cache.format import describe_differences
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import Key, view_hash
from salt_vla.errors import CacheError, DataError
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import UInt8

RECORDS_PER_SHARD = 128


class ViewSource(Protocol):
    """`ViewReader` decodes, `StoredViews` looks up; callers cannot tell them apart."""

    def read_many(
        self, keys: Sequence[Key], out: UInt8[np.ndarray, "keys frames size size 3"] | None = None
    ) -> UInt8[np.ndarray, "keys frames size size 3"]:
        """`out`: memory to fill and hand back, C-contiguous."""
        ...

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray | DataError]]:
        """Each key with its pixels, or with why it has none, in order; a few in memory at a time."""
        ...


def store_manifest(table: ClipTable, view: ViewConfig, geometry: ClipGeometry, num_views: int) -> Manifest:
    """What a store of these views must say of itself."""
    size = geometry.image_size
    return Manifest(
        kind="views",
        encoding="uint8",
        shape=(geometry.num_frames, size, size, 3),
        num_views=num_views,
        num_clips=len(table),
        records_per_shard=RECORDS_PER_SHARD,
        token_order="",
        provenance={
            "clip_table": table.hash,
            "files": table.files_hash,
            "view_hash": view_hash(view, geometry),
        },
    )


class StoredViews:
    """Views from a finished store. Raises `CacheError` when it was made from other clips or views."""

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.cache = ArrayCache(path)
        differences = self.cache.manifest.differences(wanted)
        if differences:
            raise CacheError(
                f"the view store {path} was made from something else "
                f"({describe_differences(differences)}); remove it or choose another folder"
            )

    def read_many(self, keys: Sequence[Key], out: np.ndarray | None = None) -> np.ndarray:
        rows = None if out is None else out.reshape(len(keys), -1)
        data = self.cache.read_many(keys, rows).data
        return data.reshape(len(keys), *self.cache.encoding.shape) if out is None else out

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray | DataError]]:
        for key in keys:
            if key in self.cache:
                yield key, self.read_many([key])[0]
            else:
                said = "it could not be decoded; see the view store's quarantine"
                yield key, DataError(f"clip {key[0]!r}, view {key[1]}: {said}")
