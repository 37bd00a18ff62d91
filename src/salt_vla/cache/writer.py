"""Builds a cache shard by shard, alone or together with other processes, on this machine or a shared disk.

Each shard is made under a lease and appears whole; what is on disk is done, the rest is made again. Knows
nothing of what the arrays are.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

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
    is_in_pieces,
    is_of_others,
    shard_name,
)
from salt_vla.cache.index import ClipIdsLike, Index, write_index
from salt_vla.cache.leases import Lease, Leases, living, remove_leases
from salt_vla.cache.ledger import Contents, Ledger
from salt_vla.cache.shards import Key, Record, is_shard, write_shard
from salt_vla.errors import CacheError, ResourceError
from salt_vla.rundir import write_bytes, write_text, writing_to

LEASE_SECONDS = 60.0  # after which a writer that gives no sign of life is taken for dead
POLL_SECONDS = 0.5  # between two looks at what others are making
FINISH = "finish"  # the lease on all that is no shard
UNFINISHED = (".*.part", f"{SHARDS}/.*.part")  # what `write_atomically` leaves behind when it is killed


@dataclass(frozen=True)
class Shard:
    """A fixed stretch of the keys, so that batch boundaries, and with them bytes, never depend on resumes or
    on who makes it."""

    number: int
    keys: tuple[Key, ...]


class CacheWriter:
    """A context manager over a cache folder under construction.

    `clip_ids` are the clips that the cache shall hold, in order. `stripe` (i, N) makes this writer begin with
    shards i, i + N, …; it helps with the others' afterwards. Shards may be asked for in one thread and
    written in another. Raises `CacheError` when the folder holds a cache made from something else.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        clip_ids: ClipIdsLike,
        stripe: tuple[int, int] = (0, 1),
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        if not 0 <= stripe[0] < stripe[1]:
            raise ValueError(f"stripe {stripe} is none of 0 … {stripe[1] - 1}")
        self.folder = folder
        self.ledger = Ledger(folder, manifest, clip_ids)
        self.manifest = self.ledger.manifest
        self.stripe = stripe
        self.lease_seconds = lease_seconds
        self.num_made = 0  # shards that this writer has published
        self._held: dict[int, Lease] = {}
        self._leases: Leases | None = None
        self._is_finished = False

    def __enter__(self) -> CacheWriter:
        self._refuse_strange_folder()
        before = self._manifest_before()
        self.ledger.look_at_all()
        if before is not None and self._is_whole(before):
            tidy(self.folder)
            return self  # Nothing to write, so neither leases nor permission are needed.
        with writing_to(self.folder):
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self._leases = Leases(self.folder / LEASES, self.lease_seconds)
        try:
            with self._alone():
                self._begin()
            self._sweep_shards()
            self._leases.is_alone()  # So that who is silent until the end is known to be dead by then.
        except BaseException:
            self._leases.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leases is not None:
            self._leases.close()
            if self._is_finished and self._leases.is_alone():
                remove_leases(self.folder / LEASES)  # Of several the last who leaves does so.
            self._leases = None

    def _refuse_strange_folder(self) -> None:
        """A folder of other things must not be mistaken for the beginning of a cache."""
        with writing_to(self.folder):
            if not self.folder.exists() or _has_own_manifest(self.folder):
                return
            names = {path.name for path in self.folder.glob("[!.]*")}
            shards = [path for path in self.folder.glob(f"{SHARDS}/[!.]*") if path.is_file()]
            own = {SHARDS, INDEX, INDEX_PAGES, QUARANTINE, PROBE}
            strange = names - own - ({MANIFEST} if is_in_pieces(self.folder) else set())
            if not any(map(is_shard, shards)):  # Then nothing says that the files of these names are ours.
                strange = names - {SHARDS} | {f"{SHARDS}/{path.name}" for path in shards}
        if strange and not _has_own_manifest(self.folder):  # Another builder may have begun meanwhile.
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
        """Whether a cache is complete and in one piece; records aside, which take too long to read."""
        if not manifest.complete or len(self.ledger.done) < manifest.num_shards:
            return False
        try:
            has_index = not any(Index(self.folder, manifest).check_all())
            has_quarantine = _checksum_of(self.folder / QUARANTINE) == manifest.quarantine_checksum
            has_probe = _checksum_of(self.folder / PROBE) == manifest.probe_checksum
        except (CacheError, OSError):
            return False  # Written again from the shards, which are all that counts.
        return has_index and has_quarantine and has_probe

    def _begin(self) -> None:
        """Write the manifest of a cache that is to be made, or to be made whole again.

        Looks again, now that nobody else can do the same: another writer may have begun, or have finished.
        """
        before = self._manifest_before()
        if before is not None and before.complete:
            self.ledger.look_at_all()
            if self._is_whole(before):
                return
            if _checksum_of(self.folder / PROBE) != before.probe_checksum:
                (self.folder / PROBE).unlink(missing_ok=True)
        if before is None or before.complete:
            replace(self.manifest, measured=before.measured if before else {}).write(self.folder)

    @contextmanager
    def _alone(self, while_waiting: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Be the only one that writes what is no shard. Two at once would not write anything wrong, since it
        all follows from the shards, but the one might take back what the other has said last."""
        assert self._leases is not None
        while (lease := self._leases.take(FINISH)) is None:
            while_waiting(self._leases.holder(FINISH))
            time.sleep(POLL_SECONDS / 10)
        try:
            yield
        finally:
            lease.release()

    def _sweep(self, leftovers: list[Path]) -> None:
        with writing_to(self.folder):
            for path in leftovers:
                path.unlink(missing_ok=True)

    def _sweep_shards(self) -> None:
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
        return self.ledger.num_keys_done

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

    def offers(self, numbers: Iterable[int] | None = None) -> Iterator[Shard | str]:
        """As `pending`, of all shards or of these `numbers`, but without waiting: while others make what is
        left it gives who they are, for the caller to ask again later."""
        index, count = self.stripe
        wanted = range(self.manifest.num_shards) if numbers is None else numbers
        own_first = sorted(wanted, key=lambda number: (number - index) % count != 0)
        while todo := [n for n in own_first if n not in self.ledger.done and n not in self._held]:
            waiting_for = None
            for number in todo:
                if self._take(number):
                    yield Shard(number, self.ledger.keys_of(number))
                elif waiting_for is None and number not in self.ledger.done:
                    waiting_for = number
            if waiting_for is not None and self._leases is not None:
                yield self._leases.holder(_lease_name(waiting_for))

    def _take(self, number: int) -> bool:
        """Get the lease of a shard that is still to be made."""
        if self._leases is None:
            raise RuntimeError("shards are made within the writer's `with` block")
        if self.ledger.look(number):
            return False
        lease = self._leases.take(_lease_name(number))
        if lease is None:
            return False
        if self.ledger.look(number):  # It was published between the two.
            lease.release()
            return False
        self._held[number] = lease
        return True

    def write_shard(self, shard: Shard, records: Iterable[Record]) -> bool:
        """Encode and publish one shard that `pending` gave: a record for each of its keys, in any order.

        False when another writer has taken it over in the meantime, since this one stood still for too long;
        what was made is then given up, and `pending`, asked anew, waits for it or gives it again. Records
        without an array, and arrays that cannot be encoded, are quarantined. Raises `CacheError` where none
        can be.
        """
        lease = self._held[shard.number]

        def fence() -> None:
            if not lease.is_held():
                raise _TakenOver

        try:
            footer = write_shard(
                self.folder / shard_name(shard.number),
                shard.number,
                self.ledger.identity,
                shard.keys,
                records,
                self.manifest.record,
                fence,
            )
            self.ledger.note(shard.number, footer)
            self.num_made += 1
        except _TakenOver:
            return False
        except ResourceError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not lease.is_held():
                return False  # Taken over at the last moment, and what it had written is swept up.
            raise
        finally:
            del self._held[shard.number]
            lease.release()
        return True

    def write_probe(self, content: bytes, unless: Callable[[], bool] = lambda: False) -> None:
        """Keep the teacher's latents of a fixed clip beside the records of an unfinished cache, unless there
        are some: asked while no other writer can add its own."""
        if self._leases is None:
            return
        with self._alone():
            if not self.is_complete() and not unless():
                write_bytes(self.folder / PROBE, content)

    def note(self, measured: dict[str, float]) -> None:
        """Keep figures in the `measured` of an unfinished cache's manifest."""
        if self._leases is None:
            return
        with self._alone():
            before = Manifest.read(self.folder)
            if not before.complete:
                replace(before, measured=measured).write(self.folder)

    def finish(
        self,
        while_waiting: Callable[[str], None] = lambda _: None,
        approve: Callable[[Contents], None] = lambda _: None,
    ) -> Manifest:
        """Write quarantine and index from the shards, then mark the manifest complete: in this order.

        Of several writers one does so; the others wait for it. `approve` is asked once the quarantine is
        written, and may raise: the cache then stays unfinished.
        """
        if self._leases is not None:
            with self._alone(while_waiting):
                if not self.is_complete():
                    self._write_results(approve)
                self._sweep_shards()
                self._sweep(list(self.folder.glob(UNFINISHED[0])))
                self._is_finished = True
        return Manifest.read(self.folder)

    def _write_results(self, approve: Callable[[Contents], None]) -> None:
        contents = self.ledger.contents()
        bad = [{"clip_id": clip, "view": view, "reason": why} for (clip, view), why in contents.quarantine]
        write_text(self.folder / QUARANTINE, json.dumps(bad, indent=2) + "\n")
        approve(contents)
        begun = replace(
            self.manifest,
            probe_checksum=_checksum_of(self.folder / PROBE),
            measured=Manifest.read(self.folder).measured,
        )
        size, pages = write_index(
            self.folder, self.ledger.clip_ids, contents.checksums, contents.present, begun.to_text()
        )
        complete = replace(
            begun,
            num_records=int(contents.present.sum()),
            num_quarantined=len(bad),
            index_bytes=size,
            index_checksum=pages,
            quarantine_checksum=_checksum_of(self.folder / QUARANTINE),
            complete=True,
        )
        complete.write(self.folder)


def tidy(folder: Path) -> None:
    """Clear a cache of what killed builds and repairs have left, unless somebody is at work in it."""
    leftovers = [path for pattern in UNFINISHED for path in folder.glob(pattern)]
    has_leases = (folder / LEASES).exists()
    if (leftovers or has_leases) and os.access(folder, os.W_OK) and not living(folder / LEASES):
        with writing_to(folder):
            for path in leftovers:
                path.unlink(missing_ok=True)
        remove_leases(folder / LEASES)


class _TakenOver(Exception):
    """Another writer has the lease."""


def _has_own_manifest(folder: Path) -> bool:
    """Whether there is a manifest, sound or damaged, and not some other program's file of that name."""
    try:
        Manifest.read(folder)
    except NoManifest:
        return False
    except DamagedManifest:
        return not is_of_others(folder) and not is_in_pieces(folder)
    except CacheError:
        return True  # Of another version, or it cannot be read.
    return True


def _checksum_of(path: Path) -> str:
    """Of a small file, as the manifest keeps it; "" where there is none."""
    return hexadecimal(checksum(path.read_bytes())) if path.exists() else ""


def _lease_name(number: int) -> str:
    return f"{number:06d}"
