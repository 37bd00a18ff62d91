"""What a cache is and which of its shards lie where, told by whatever of it is whole.

Reads only. Knows neither records nor who repairs them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from salt_vla.cache.format import INDEX, INDEX_PAGES, SHARDS, Manifest, checksum, hexadecimal, shard_name
from salt_vla.cache.index import MANIFEST_KEY, PAGE
from salt_vla.cache.shards import Footer, open_to_read, read_footer
from salt_vla.errors import CacheError


def settled(folder: Path, read: Manifest | None) -> tuple[Manifest | None, Manifest | None]:
    """What the cache is, and a manifest that is another cache's though it lies there.

    The manifest is believed if it could be `read`, or else the index's copy of it; unless not one of the
    whole shards is of that cache. Then what most of them say is right, without what came of the build: shards
    are what a cache is made of, and the files beside them are easily another's. None where nothing tells.
    """
    claimed = read or _from_index(folder)
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob(f"{SHARDS}/*.bin")):
        if (footer := footer_at(path)) is None:
            continue
        if claimed is not None and footer.identity == claimed.identity:
            return claimed, None
        counts[footer.identity] += 1
    if not counts:
        return claimed, None
    return Manifest.from_identity(counts.most_common(1)[0][0]), claimed


def footer_at(path: Path) -> Footer | None:
    """What the shard at `path` says of itself; None where there is no whole one."""
    with suppress(CacheError):
        return read_footer(path)
    return None


def strays(folder: Path, manifest: Manifest, paths: Iterable[Path] | None = None) -> dict[Path, int]:
    """Whole shards of this cache that lie under another name than theirs, and which each is; of `paths`."""
    found = {}
    for path in sorted(folder.glob(f"{SHARDS}/*.bin")) if paths is None else paths:
        footer = footer_at(path)
        if footer is None or footer.identity != manifest.identity or footer.shard >= manifest.num_shards:
            continue
        if path != folder / shard_name(footer.shard):
            found[path] = footer.shard
    return found


def _from_index(folder: Path) -> Manifest | None:
    try:
        digests = read_regular(folder / INDEX_PAGES)
        if any(bad_pages(folder / INDEX, digests)):
            return None
        with pa.memory_map(str(folder / INDEX)) as file:
            text = pa.ipc.open_file(file).schema.metadata[MANIFEST_KEY].decode()
        manifest = Manifest.parse(text, folder / INDEX)
        size = (folder / INDEX).stat().st_size
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, CacheError):
        return None
    pages = hexadecimal(checksum(digests))
    return replace(manifest, complete=True, index_bytes=size, index_checksum=pages)


def bad_pages(path: Path, digests: bytes) -> Iterator[tuple[int, str]]:
    """(offset, reason) of each page of the index that is not what was written."""
    wanted = np.frombuffer(digests[: len(digests) // 8 * 8], "<u8").tolist()
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            for number, check in enumerate(wanted):
                if checksum(file.read(PAGE)) != check:
                    yield number * PAGE, "the page's checksum does not match, so the index is damaged"
            if file.read(1) or not wanted:
                yield len(wanted) * PAGE, "the index goes on where it should end"
    except OSError as error:
        yield 0, f"the file cannot be read ({error.strerror})"


def read_regular(path: Path) -> bytes:
    """A small file's content. Raises OSError where there is none, also for a pipe."""
    with os.fdopen(open_to_read(path), "rb") as file:
        return bytes(file.read())
