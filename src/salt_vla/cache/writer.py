"""Builds a cache shard by shard, alone or together with other processes, on this machine or a shared disk.

Each shard is made under a lease and appears whole; what is on disk is done, the rest is made again. Knows
nothing of what the arrays are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from salt_vla.cache.format import (
    INDEX,
    INDEX_PAGES,
    LEASES,
    MANIFEST,
    PROBE,
    QUARANTINE,
    SHARDS,
    DamagedManifest,
    Manifest,
    NoManifest,
    checksum,
    describe_differences,
    hexadecimal,
    shard_name,
)
from salt_vla.cache.index import Index, as_clip_ids, write_index
from salt_vla.cache.leases import Lease, Leases, remove_leases
from salt_vla.cache.shards import Footer, Key, Record, read_footer, write_shard
from salt_vla.errors import CacheError
from salt_vla.rundir import void, write_atomically, write_text, writing_to

LEASE_SECONDS = 60.0  # after which a writer that gives no sign of life is taken for dead
POLL_SECONDS = 0.5  # between two looks at shards that others are making
FINISH = "finish"
UNFINISHED = (".*.part", f"{SHARDS}/.*.part")  # what `write_atomically` leaves behind when it is killed


class Shard:
    """A fixed stretch of the keys, so that batch boundaries, and with them bytes, never depend on resumes or
    on who makes it."""

    def __init__(self, number: int, keys: tuple[Key, ...]) -> None:
        self.number = number
        self.keys = keys


class CacheWriter:
    """A context manager over a cache folder under construction.

    `clip_ids` are the clips that the cache shall hold, in order. `stripe` (i, N) makes this writer begin with
    shards i, i + N, …; it helps with the others' afterwards. Raises `CacheError` when the folder holds a
    cache made from something else.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        clip_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
        stripe: tuple[int, int] = (0, 1),
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.folder = folder
        self.clip_ids = as_clip_ids(clip_ids)
        self.manifest = replace(manifest, num_clips=len(self.clip_ids)).without_results()
        self.stripe = stripe
        self.lease_seconds = lease_seconds
        self.num_made = 0  # shards that this writer has published
        self._identity = self.manifest.identity
        self._done: set[int] = set()
        self._held: dict[int, Lease] = {}
        self._leases: Leases | None = None

    def __enter__(self) -> CacheWriter:
        self._refuse_strange_folder()
        before = self._manifest_before()
        self._look(range(self.manifest.num_shards))
        is_finished = before is not None and self._is_whole(before)
        if is_finished and not self._leftovers():
            return self  # Nothing to write, so neither leases nor permission are needed.
        with writing_to(self.folder):
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        if is_finished:
            self._sweep(self._leftovers())
            return self
        self._leases = Leases(self.folder / LEASES, self.lease_seconds)
        try:
            if before is None or before.complete:  # A finished one that has lost something is unfinished.
                self._begin(before)
            self._sweep_dead()
        except BaseException:
            self._leases.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leases is not None:
            self._leases.close()
            self._leases = None

    def _refuse_strange_folder(self) -> None:
        """A folder of other things must not be mistaken for the beginning of a cache."""
        with writing_to(self.folder):
            if not self.folder.exists() or (self.folder / MANIFEST).exists():
                return
            own = {SHARDS, INDEX, INDEX_PAGES, QUARANTINE, PROBE}
            strange = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")} - own
        if strange:
            raise CacheError(
                f"{self.folder} holds other files ({min(strange)}) and no cache; choose another folder"
            )

    def _manifest_before(self) -> Manifest | None:
        """The folder's manifest; None where there is none or a damaged one, since shards say whose they are.
        Raises `CacheError` for another cache's."""
        try:
            manifest = Manifest.read(self.folder)
        except (NoManifest, DamagedManifest):
            return None
        if differences := manifest.differences(self.manifest):
            raise CacheError(
                f"{self.folder} holds a cache made from something else "
                f"({describe_differences(differences)}); choose another folder or remove it"
            )
        return manifest

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether a cache is complete and in one piece, as far as sizes and the ends of files tell."""
        if not manifest.complete or len(self._done) < manifest.num_shards:
            return False
        try:
            if any(Index(self.folder, manifest).check_all()):
                return False
            quarantine = (self.folder / QUARANTINE).read_bytes()
            has_probe = not manifest.probe_checksum or (self.folder / PROBE).exists()
        except (CacheError, OSError):
            return False  # Written again from the shards, which are all that counts.
        return hexadecimal(checksum(quarantine)) == manifest.quarantine_checksum and has_probe

    def _begin(self, before: Manifest | None) -> None:
        measured = {} if before is None else before.measured
        replace(self.manifest, measured=measured).write(self.folder)

    def _leftovers(self) -> list[Path]:
        """What killed builders have left behind."""
        found = [path for pattern in UNFINISHED for path in self.folder.glob(pattern)]
        return found + [path for path in [self.folder / LEASES] if path.exists()]

    def _sweep(self, leftovers: list[Path]) -> None:
        with writing_to(self.folder):
            for path in leftovers:
                if path.is_dir():
                    remove_leases(path)
                else:
                    path.unlink(missing_ok=True)

    def _sweep_dead(self) -> None:
        """Remove half-written shards that nobody is writing."""
        assert self._leases is not None
        for path in (self.folder / SHARDS).glob(".*.part"):
            name = path.name[1:].partition(".")[0]
            if lease := self._leases.take(name):
                self._sweep([path])
                lease.release()

    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).exists() and Manifest.read(self.folder).complete

    @property
    def num_keys(self) -> int:
        return self.manifest.num_keys

    @property
    def num_keys_done(self) -> int:
        """Keys of the shards that are on disk, whoever made them."""
        last = self.manifest.num_shards - 1
        size = self.manifest.records_per_shard
        missing_of_last = (last + 1) * size - self.num_keys if last in self._done else 0
        return len(self._done) * size - missing_of_last

    def keys_of(self, number: int) -> tuple[Key, ...]:
        """The keys that a shard answers for, in the order of its slots."""
        size, views = self.manifest.records_per_shard, self.manifest.num_views
        first, stop = number * size, min((number + 1) * size, self.num_keys)
        clips = self.clip_ids.slice(first // views, -(-stop // views) - first // views).to_pylist()
        return tuple((clips[key // views - first // views], key % views) for key in range(first, stop))

    def missing_shards(self) -> list[Shard]:
        """Shards that are not on disk, in order, whoever may be making them."""
        self._look(number for number in range(self.manifest.num_shards) if number not in self._done)
        missing = (number for number in range(self.manifest.num_shards) if number not in self._done)
        return [Shard(number, self.keys_of(number)) for number in missing]

    def pending(self, while_waiting: Callable[[str], None] = lambda _: None) -> Iterator[Shard]:
        """Shards to be made by this process, each under a lease until `write_shard` has published it.

        Ends when every shard is on disk or in this process's hands. While others make what is left,
        `while_waiting` is called twice a second with who they are, and may raise.
        """
        for offer in self.offers():
            if isinstance(offer, Shard):
                yield offer
            else:
                while_waiting(offer)
                time.sleep(POLL_SECONDS)

    def offers(self) -> Iterator[Shard | str]:
        """As `pending`, but without waiting: while others make what is left it gives who they are, for the
        caller to ask again later."""
        index, count = self.stripe
        everything = range(self.manifest.num_shards)
        own_first = sorted(everything, key=lambda number: (number - index) % count != 0)
        todo = [number for number in own_first if number not in self._done and number not in self._held]
        while todo:
            others = []
            for number in todo:
                if not self._take(number):
                    others += [number] if number not in self._done else []
                    continue
                yield Shard(number, self.keys_of(number))
            todo = others
            if todo:
                assert self._leases is not None
                yield self._leases.holder(_lease_name(todo[0]))

    def _take(self, number: int) -> bool:
        """Get the lease of a shard that is still to be made."""
        assert self._leases is not None
        if self._look([number]):
            return False
        lease = self._leases.take(_lease_name(number))
        if lease is None:
            return False
        if self._look([number]):  # It was published between the two.
            lease.release()
            return False
        self._held[number] = lease
        return True

    def _look(self, numbers: Iterable[int]) -> bool:
        """Note which of these shards are on disk, whole, and this cache's; whether the last one is."""
        is_done = False
        for number in numbers:
            is_done = self._footer(number) is not None
            if is_done:
                self._done.add(number)
            else:
                self._done.discard(number)
        return is_done

    def _footer(self, number: int) -> Footer | None:
        """The footer of a shard that is on disk, whole. Raises `CacheError` when it is another cache's."""
        path = self.folder / shard_name(number)
        if not path.exists():
            return None
        try:
            footer = read_footer(path, self.manifest.record)
        except CacheError:
            return None  # Half of one, or damaged: it is made again.
        if (footer.shard, footer.identity) != (number, self._identity) or footer.keys != self.keys_of(number):
            raise CacheError(
                f"{path} belongs to another cache than the one asked for; choose another folder, or remove "
                f"{self.folder} if nobody needs it"
            )
        return footer

    def write_shard(self, shard: Shard, records: Iterable[Record]) -> bool:
        """Encode and publish one shard that `pending` gave: a record for each of its keys, in any order.

        False when another writer has taken it over in the meantime, since this one stood still for too long;
        what was made is then given up, and `pending` may give the shard again. Records without an array, and
        arrays that cannot be encoded, are quarantined. Raises `CacheError` where none can be.
        """
        lease = self._held.get(shard.number)

        def fence() -> None:
            if lease is not None and not lease.is_held():
                raise _TakenOver

        try:
            write_shard(
                self.folder / shard_name(shard.number),
                shard.number,
                self._identity,
                shard.keys,
                records,
                self.manifest.record,
                fence,
            )
        except _TakenOver:
            return False
        finally:
            self._held.pop(shard.number, None)
            if lease is not None:
                lease.release()
        self._done.add(shard.number)
        self.num_made += 1
        return True

    def write_probe(self, content: bytes) -> None:
        """Keep `content` beside the records (the teacher's latents of a fixed clip)."""
        write_atomically(self.folder / PROBE, lambda path: void(path.write_bytes(content)))

    def note(self, measured: dict[str, float]) -> None:
        """Keep figures in the manifest's `measured`."""
        replace(Manifest.read(self.folder), measured=measured).write(self.folder)

    def finish(self, while_waiting: Callable[[str], None] = lambda _: None) -> Manifest:
        """Write quarantine and index from the shards, then mark the manifest complete: in this order.

        Of several writers one does so; the others wait for it.
        """
        if self._leases is None:
            return Manifest.read(self.folder)
        while (lease := self._leases.take(FINISH)) is None:
            while_waiting(self._leases.holder(FINISH))
            time.sleep(POLL_SECONDS)
        try:
            if not self.is_complete():
                self._write_results()
            self._sweep(self._leftovers())
        finally:
            lease.release()
        return Manifest.read(self.folder)

    def _write_results(self) -> None:
        count, views = self.manifest.num_clips, self.manifest.num_views
        checksums = np.zeros(count * views, np.uint64)
        present = np.zeros(count * views, np.uint8)
        bad: list[dict[str, Any]] = []
        for number in range(self.manifest.num_shards):
            footer = self._footer(number)
            if footer is None:
                raise CacheError(f"{self.folder} lacks shard {number}; run its `cache build` again")
            first = number * self.manifest.records_per_shard
            for slot, (key, check) in enumerate(zip(footer.keys, footer.checksums, strict=True)):
                if check is None:
                    bad.append({"clip_id": key[0], "view": key[1], "reason": footer.reasons[slot]})
                else:
                    checksums[first + slot], present[first + slot] = check, 1
        quarantine = json.dumps(bad, indent=2) + "\n"
        write_text(self.folder / QUARANTINE, quarantine)
        shape = (count, views)
        probe = self.folder / PROBE
        begun = replace(
            self.manifest,
            probe_checksum=hexadecimal(checksum(probe.read_bytes())) if probe.exists() else "",
            measured=Manifest.read(self.folder).measured,
        )
        size, pages = write_index(
            self.folder, self.clip_ids, checksums.reshape(shape), present.reshape(shape), begun.to_text()
        )
        complete = replace(
            begun,
            num_records=int(present.sum()),
            num_quarantined=len(bad),
            index_bytes=size,
            index_checksum=pages,
            quarantine_checksum=hexadecimal(checksum(quarantine.encode())),
            complete=True,
        )
        complete.write(self.folder)


class _TakenOver(Exception):
    """Another writer has the lease."""


def _lease_name(number: int) -> str:
    return f"{number:06d}"
