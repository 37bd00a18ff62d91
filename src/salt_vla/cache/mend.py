"""Puts right what `cache/verify.py` finds: single records of a shard, or all that follows from shards.

Writes whole files only. Knows neither where records come from nor whether they are to be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from salt_vla.cache.format import LEASES, Encoding, Manifest, checksum, shard_name
from salt_vla.cache.leases import Leases
from salt_vla.cache.recover import footer_at, strays
from salt_vla.cache.shards import Footer
from salt_vla.cache.writer import FINISH, CacheWriter
from salt_vla.errors import CacheError
from salt_vla.rundir import write_atomically, writing_to

Wait = Callable[[str], None]
ASIDE = "aside-"


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
            old = files.enter_context(path.open("rb")) if path.is_file() else None
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

    Meanwhile the cache is an unfinished one, which nobody opens; that it holds `num_records` tells it from
    one whose build never ended. `manifest`: what the cache is, and the `num_records` and `measured` that it
    keeps. Raises `CacheError` when a shard is missing.
    """
    with Leases(folder / LEASES) as leases:
        while (lease := leases.take(FINISH)) is None:
            while_waiting(leases.holder(FINISH))
        begun = manifest.without_results()
        replace(begun, num_records=manifest.num_records, measured=manifest.measured).write(folder)
        lease.release()
    with CacheWriter(folder, manifest, clip_ids) as writer:
        return writer.finish(while_waiting)


def put_in_place(
    folder: Path, manifest: Manifest, holding: Callable[[set[int]], AbstractContextManager[None]]
) -> list[str]:
    """Rename whole shards that lie in other places than their own, as after an exchange; which they are.

    Only into places that are empty, or that hold another one to be moved, so that nothing is written over: of
    two that stand in each other's way one is set aside under a name of its own, where the same call finds
    it if it was killed in between. `holding` keeps others away from some shards.
    """
    found, moved = strays(folder, manifest), list[str]()
    while step := next((path for path in found if _is_open(folder, found, path)), None):
        number = found.pop(step)
        place = folder / shard_name(number)
        beside = {int(step.stem)} if step.stem.isdecimal() else set()
        with holding({number} | beside), writing_to(folder):
            now = strays(folder, manifest, [step, place])
            if now != {step: number} | _only(found, place) or (place not in now and os.path.lexists(place)):
                continue  # Somebody else was at work here.
            if place in found:
                aside = place.with_name(f"{ASIDE}{place.name}")
                place.rename(aside)
                found[aside] = found.pop(place)
            step.rename(place)
        moved.append(shard_name(number))
    return moved


def _is_open(folder: Path, found: Mapping[Path, int], path: Path) -> bool:
    """Whether the shard at `path` can be put in its place."""
    place = folder / shard_name(found[path])
    return not os.path.lexists(place.with_name(f"{ASIDE}{place.name}") if place in found else place)


def _only(found: Mapping[Path, int], path: Path) -> dict[Path, int]:
    return {path: found[path]} if path in found else {}


def drop_copies(folder: Path, manifest: Manifest, is_sound: Callable[[int], bool]) -> None:
    """Remove shards that were set aside and made anew in the meantime."""
    for path, number in strays(folder, manifest).items():
        is_copy = path.name.startswith(ASIDE) and footer_at(path) == footer_at(folder / shard_name(number))
        if is_copy and is_sound(number):
            with writing_to(folder):
                path.unlink(missing_ok=True)
