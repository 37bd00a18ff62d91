"""Puts right what `cache/verify.py` finds: single records of a shard, or all that follows from shards.

Writes whole files only. Knows neither where records come from nor whether they are to be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from salt_vla.cache.format import LEASES, Encoding, Manifest, checksum
from salt_vla.cache.leases import Leases, living, remove_leases
from salt_vla.cache.shards import Footer
from salt_vla.cache.writer import FINISH, UNFINISHED, CacheWriter
from salt_vla.errors import CacheError
from salt_vla.rundir import write_atomically, writing_to

Wait = Callable[[str], None]


def rewrite_shard(
    path: Path,
    footer: Footer,
    fresh: Mapping[int, bytes],
    known_bad: frozenset[int],
    encoding: Encoding,
    before_publishing: Callable[[], None],
) -> None:
    """Write the shard anew with `footer`: records of `fresh` by slot, all others as they are on disk.

    What is copied is compared with `footer` once more, except `known_bad` slots, which stay as damaged as
    they are, and can be told to be so. The old file stays until the new one is on disk. Raises `CacheError`
    when another record turns out to be damaged.
    """
    size = encoding.record_bytes

    def write(temporary: Path) -> None:
        with ExitStack() as files:
            new = files.enter_context(temporary.open("wb"))
            old = files.enter_context(path.open("rb")) if path.exists() else None
            for slot, wanted in enumerate(footer.checksums):
                if wanted is None:
                    continue  # A hole.
                blob = fresh.get(slot)
                if blob is None:
                    blob = os.pread(old.fileno(), size, slot * size) if old else b""
                    if checksum(blob) != wanted and slot not in known_bad:
                        raise CacheError(
                            f"{path}: slot {slot} has gone bad since it was looked at; run the repair again"
                        )
                new.seek(slot * size)
                new.write(blob)
            new.seek(len(footer.keys) * size)
            new.write(footer.to_bytes())
            new.flush()
            os.fsync(new.fileno())
        before_publishing()

    write_atomically(path, write)


def reindex(folder: Path, manifest: Manifest, clip_ids: pa.LargeStringArray, while_waiting: Wait) -> Manifest:
    """Write index, quarantine and manifest anew, from the footers alone; all of them have to be sound.

    Meanwhile the cache is an unfinished one, which nobody opens. `manifest`: what the cache is, and the
    `measured` that it keeps. Raises `CacheError` when a shard is missing.
    """
    with Leases(folder / LEASES) as leases:
        while (lease := leases.take(FINISH)) is None:
            while_waiting(leases.holder(FINISH))
        replace(manifest.without_results(), measured=manifest.measured).write(folder)
        lease.release()
    with CacheWriter(folder, manifest, clip_ids) as writer:
        return writer.finish(while_waiting)


def tidy(folder: Path) -> None:
    """Clear a cache of what killed builds and repairs have left, unless somebody is at work in it."""
    leftovers = [path for pattern in UNFINISHED for path in folder.glob(pattern)]
    has_leases = (folder / LEASES).exists()
    if (leftovers or has_leases) and os.access(folder, os.W_OK) and not living(folder / LEASES):
        with writing_to(folder):
            for path in leftovers:
                path.unlink(missing_ok=True)
        remove_leases(folder / LEASES)
