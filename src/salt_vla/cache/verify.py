"""Compares what lies in a cache's files with what was written: every byte of it has a checksum somewhere.

Reads and reports; mending is others' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from salt_vla.cache.format import CorruptRecord
from salt_vla.cache.reader import ArrayCache


def verify(cache: ArrayCache) -> Iterator[dict[str, Any] | None]:
    """Check every record on disk: None for a good one, else what is wrong and where."""
    for clip_id, view in cache.keys():
        try:
            cache.read_many([(clip_id, view)])
            yield None
        except CorruptRecord as error:
            where = {"clip_id": clip_id, "view": view, "file": error.file, "offset": error.offset}
            yield where | {"reason": str(error)}
