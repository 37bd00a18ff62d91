"""`cache repair`: computes damaged records again, and writes what follows from sound shards anew.

Trusts a teacher that gives the recorded bytes, or else one whose latents of the cache's probe clip agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from salt_vla.cache.format import (
    INDEX,
    LEASES,
    MANIFEST,
    PROBE,
    QUARANTINE,
    Manifest,
    checksum,
    shard_name,
)
from salt_vla.cache.index import as_clip_ids
from salt_vla.cache.leases import Lease, Leases
from salt_vla.cache.mend import drop_copies, put_in_place, reindex, rewrite_shard
from salt_vla.cache.recover import footer_at, strays
from salt_vla.cache.shards import Footer, Key, Record, read_footer
from salt_vla.cache.verify import NO_CLIP, CacheCheck, Finding, ShardCheck
from salt_vla.cache.writer import tidy
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError
from salt_vla.interrupts import StopFlag, stop_on_signals
from salt_vla.jobs.build_cache import latents_of
from salt_vla.jobs.cache_checks import check_probe, probe_of
from salt_vla.jobs.cache_source import FindSource, Source, require_same
from salt_vla.jobs.data_index import MAX_BAD_SHARE
from salt_vla.jobs.pipeline import records_of
from salt_vla.progress import progress
from salt_vla.rundir import write_bytes

POLL_SECONDS = 0.2
NEEDS_SOURCE = "the teacher has to compute it again: give --teacher and --data"
IN_THE_WAY = "a whole shard of another cache or place lies there, and is not written over; move it away"


@dataclass
class RepairReport:
    """Records that are `byte_equal` to what was written; `changed`: that differ in last digits; `recovered`:
    out of quarantine; why others `failed` to be had; shards that were `moved` to their places; `files` that
    were written anew; what is `left`; `is_complete`: nothing but what is left keeps the cache from use."""

    found: int = 0
    byte_equal: list[Key] = field(default_factory=list)
    changed: list[Key] = field(default_factory=list)
    recovered: list[Key] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    failed: dict[Key, str] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)
    is_complete: bool = True

    @property
    def summary(self) -> str:
        """What was done, in a few sentences."""
        is_unfinished = not self.is_complete and not self.left
        unfinished = ["the cache is unfinished; run its `cache build` again"] * is_unfinished
        if not self.found and not self.files and not self.failed and not self.left:
            return "; ".join(["nothing is damaged", *unfinished])
        said = [f"{self.found:,} found, {len(self.left):,} left"]
        counts = {
            "records are byte-equal to what was written": self.byte_equal,
            "records differ from what was written in rounding, as the probe tells": self.changed,
            "records are out of quarantine": self.recovered,
            "records could not be computed": self.failed,
        }
        said += [f"{len(keys):,} {what}" for what, keys in counts.items() if keys]
        if self.moved:
            said.append("put in their places: " + ", ".join(self.moved))
        if self.files:
            said.append("written anew: " + ", ".join(dict.fromkeys(self.files)))
        return "\n".join(said + unfinished)

    def to_json(self) -> dict[str, Any]:
        return {
            "found": self.found,
            **{name: _rows(getattr(self, name)) for name in ("byte_equal", "changed", "recovered")},
            "failed": [
                row | {"reason": self.failed[row["clip_id"], row["view"]]} for row in _rows(self.failed)
            ],
            "moved": self.moved,
            "files": self.files,
            "left": [asdict(finding) for finding in self.left],
        }


def repair_cache(
    folder: Path, find_source: FindSource | None = None, quarantined: bool = False
) -> RepairReport:
    """Look for damage in the cache at `folder` and mend it; killed at any moment, the same call goes on.

    Index, quarantine, manifest and footers follow from one another. Records need a source, whose every
    field must be the manifest's; the whole batch around one passes the teacher, so that its last digits come
    out as they did. `quarantined`: try what has no record once more. No sound record is written to, and no
    whole shard of another cache is written over. A cache whose build never ended is finished only with a
    source, and if few enough are in quarantine. Raises `CacheError` when there is nothing to go by, or when
    the source is another one, and `Stopped` after a signal.
    """
    check = CacheCheck(folder)
    if check.manifest is None:
        raise CacheError(
            f"neither manifest, index nor any shard of {folder} says what this cache is; remove it and build "
            "it again"
        )
    if quarantined and find_source is None:
        raise CacheError("to try quarantined clips again, give the cache's --teacher and --data")
    source = find_source(check.manifest) if find_source is not None else None
    with stop_on_signals() as stop:
        return _Repair(check, check.manifest, source, quarantined, stop).run()


class _TakenOver(Exception):
    """Another process has the lease."""


class _Repair:
    """One call of `repair_cache`."""

    def __init__(
        self, check: CacheCheck, manifest: Manifest, source: Source | None, quarantined: bool, stop: StopFlag
    ) -> None:
        self.check, self.manifest = check, manifest
        self.folder = check.folder
        self.source, self.quarantined, self.stop = source, quarantined, stop
        self.report = RepairReport(found=len(check.findings))
        # Nobody has said of such a cache yet that it is fit for use; a repair that was killed leaves another.
        self.is_new = check.has_manifest and not check.is_complete and not manifest.num_records
        is_to_finish = not check.is_complete and not self.is_new
        self.needs_index = is_to_finish or any(finding.file != PROBE for finding in check.findings)
        if source is not None:
            require_same(manifest, source, self.folder)

    def run(self) -> RepairReport:
        report = self.report
        if strays(self.folder, self.manifest):
            with Leases(self.folder / LEASES) as leases:
                report.moved = put_in_place(
                    self.folder, self.manifest, lambda numbers: self._leases_of(leases, numbers)
                )
            report.found += len(report.moved)
        damaged = self._damaged()
        self._mend_probe()
        if damaged:
            self._mend_all(damaged)
        refused = []
        if self.source is not None if self.is_new else self.needs_index:
            refused = self._write_what_follows()
        drop_copies(self.folder, self.manifest, lambda number: not self.check.check_shard(number).findings)
        tidy(self.folder)
        after = CacheCheck(self.folder)
        report.is_complete = after.is_complete
        report.left = [*after.findings, *refused]
        for number in damaged:
            report.left += after.check_shard(number).findings
        return report

    def _damaged(self) -> list[int]:
        """Shards to work on; also counts what was found."""
        numbers = []
        with progress("Looking for damage", self.check.num_to_check(), "records") as advance:
            for shard in self.check.shards():
                self.report.found += len(shard.findings)
                self.needs_index |= any(finding.file == INDEX for finding in shard.findings)
                has_quarantine = shard.expected is not None and None in shard.expected.checksums
                if shard.bad_slots or not shard.has_footer or (self.quarantined and has_quarantine):
                    numbers.append(shard.number)
                advance(shard.num_records)
                self.stop.check("while looking for damage")
        return numbers

    def _mend_all(self, damaged: list[int]) -> None:
        with Leases(self.folder / LEASES) as leases, progress("Repairing", len(damaged), "shards") as advance:
            for number in damaged:
                is_done = False
                while not is_done:
                    with self._lease(leases, number) as lease:
                        is_done = self._mend(self.check.check_shard(number), lease)
                advance(1)

    @contextmanager
    def _lease(self, leases: Leases, number: int) -> Iterator[Lease]:
        while (lease := leases.take(f"{number:06d}")) is None:
            self._wait("")
        try:
            yield lease
        finally:
            lease.release()

    @contextmanager
    def _leases_of(self, leases: Leases, numbers: set[int]) -> Iterator[None]:
        with ExitStack() as held:
            for number in sorted(numbers):  # So that two repairs never wait for each other.
                held.enter_context(self._lease(leases, number))
            yield

    def _wait(self, holder: str) -> None:
        self.stop.check("while repairing")
        time.sleep(POLL_SECONDS)

    def _mend(self, shard: ShardCheck, lease: Lease) -> bool:
        """Work on a shard, as it is now that nobody else does; False when another process has taken it over
        in the meantime, since this one stood still for too long."""
        self.stop.check("while repairing")
        if shard.expected is None:
            return True  # Neither its footer nor the index is there: `cache build` makes it anew.
        wanted = {slot for slot in shard.bad_slots if shard.expected.checksums[slot] is not None}
        if self.quarantined:
            wanted |= {slot for slot, known in enumerate(shard.expected.checksums) if known is None}
        if shard.stranger is not None and not self._is_copy(shard.stranger):
            self.report.failed |= {shard.expected.keys[slot]: IN_THE_WAY for slot in wanted}
            return True  # Perhaps the only one of its kind; only a person can tell.
        fresh, footer, kinds = self._computed(shard.expected, wanted)
        path = self.folder / shard_name(shard.number)
        has_hole_to_clear = any(shard.expected.checksums[slot] is None for slot in shard.bad_slots)
        has_rest_to_write = not shard.has_footer or has_hole_to_clear
        is_there = path.is_file() and shard.stranger is None
        if not fresh and not (has_rest_to_write and (is_there or not wanted)):
            return True  # A lost shard without its records is no better than none.

        def fence() -> None:
            if not lease.is_held():
                raise _TakenOver
            clips = [clip_id for clip_id, _ in kinds]
            if self.source is not None and (film := self.source.table.changed_file(clips)):
                raise CacheError(
                    f"video {film} is another one than when this repair began, and nothing was taken of it; "
                    "put it back and run the same command again"
                )

        left_bad = frozenset(shard.bad_slots) - fresh.keys()
        try:
            rewrite_shard(path, footer, fresh, left_bad, self.manifest.record, fence)
        except _TakenOver:
            return False
        for key, kind in kinds.items():
            getattr(self.report, kind).append(key)
        self.report.files.append(shard_name(shard.number))
        self.needs_index |= footer != shard.expected
        return True

    def _is_copy(self, stranger: Footer) -> bool:
        """Whether a shard in another's place is whole in its own place, too."""
        if stranger.identity != self.manifest.identity or stranger.shard >= self.manifest.num_shards:
            return False
        place = self.check.check_shard(stranger.shard)
        return place.expected == stranger and not place.findings

    def _computed(
        self, expected: Footer, wanted: set[int]
    ) -> tuple[dict[int, bytes], Footer, dict[Key, str]]:
        """Records of the wanted slots as far as they can be had, the footer that goes with them, and as which
        of the report's kinds they count."""
        fresh: dict[int, bytes] = {}
        kinds: dict[Key, str] = {}
        checksums, reasons = list(expected.checksums), list(expected.reasons)
        for slot, record in self._recomputed(expected, wanted):
            blob, reason = self._encoded(record)
            known = expected.checksums[slot]
            found = checksum(blob)
            if not reason and found != known and (reason := self._distrust):
                reason = f"it comes out otherwise than it was, and {reason}"
            if reason:
                self.report.failed[record.key] = reason
                continue
            is_equal = "byte_equal" if found == known else "changed"
            kinds[record.key] = "recovered" if known is None else is_equal
            fresh[slot], checksums[slot], reasons[slot] = blob, found, ""
        return fresh, replace(expected, checksums=tuple(checksums), reasons=tuple(reasons)), kinds

    def _recomputed(self, expected: Footer, wanted: set[int]) -> Iterator[tuple[int, Record]]:
        """The wanted slots' records, each from the whole batch that it was computed in at first."""
        if self.source is None:
            self.report.failed |= {expected.keys[slot]: NEEDS_SOURCE for slot in wanted}
            return
        teacher, size = self.source.teacher, int(self.manifest.provenance["batch_size"])
        views = ViewReader(self.source.table, self.source.view, teacher.geometry)
        for start in range(0, len(expected.keys), size):
            keys = expected.keys[start : start + size]
            slots = {key: start + place for place, key in enumerate(keys) if start + place in wanted}
            if slots:
                self.stop.check("while repairing")
                records = records_of(list(views.read_each(keys)), latents_of(teacher))
                yield from ((slots[record.key], record) for record in records if record.key in slots)

    def _encoded(self, record: Record) -> tuple[bytes, str]:
        """A record's bytes, or why it has none."""
        if record.array is None:
            return b"", record.reason
        try:
            return self.manifest.record.encode(record.array), ""
        except CacheError as error:
            return b"", str(error)

    @cached_property
    def _distrust(self) -> str:
        """Why records that differ in their bytes are not to be taken from this teacher; "" if they are."""
        assert self.source is not None
        if any(finding.file == PROBE for finding in self.check.findings):
            return "the cache's probe, which would tell whether that is rounding, is damaged"
        try:
            has_probe = check_probe(self.folder, probe_of(self.source.teacher))
        except CacheError as error:
            return str(error)
        return "" if has_probe else "the cache has no probe to tell whether that is rounding"

    def _mend_probe(self) -> None:
        if any(finding.file == PROBE for finding in self.check.findings) and self.source is not None:
            content = probe_of(self.source.teacher)
            write_bytes(self.folder / PROBE, content)
            self.report.files.append(PROBE)
            self.needs_index = True  # The manifest knows its checksum, and its last digits may differ.

    def _write_what_follows(self) -> list[Finding]:
        """Index, quarantine and manifest, unless a footer is still lost; why a new cache is not finished."""
        has_bad_probe = any(finding.file == PROBE for finding in self.check.findings)
        if has_bad_probe and self.source is None:
            return []  # The manifest would take it for the right one.
        bad, total = self._num_quarantined(), self.manifest.num_keys
        if bad is None:
            return []
        if self.is_new and bad > MAX_BAD_SHARE * total:
            why = (
                f"the cache stays unfinished: {bad:,} of {total:,} clip views are in quarantine, more than "
                f"{MAX_BAD_SHARE:.0%}; mend their films and run the repair again with --quarantined"
            )
            return [Finding(*NO_CLIP, MANIFEST, 0, why)]
        manifest = replace(self.manifest, num_records=total - bad)
        reindex(self.folder, manifest, self._clip_ids(), self._wait)
        self.report.files += [INDEX, QUARANTINE, MANIFEST]
        return []

    def _num_quarantined(self) -> int | None:
        """Of the whole cache, by its footers; None while a shard is lost, or another's."""
        total = 0
        for number in range(self.manifest.num_shards):
            footer = footer_at(self.folder / shard_name(number))
            if footer is None or (footer.shard, footer.identity) != (number, self.manifest.identity):
                return None
            total += footer.checksums.count(None)
        return total

    def _clip_ids(self) -> pa.LargeStringArray:
        """All clips of the cache in order, from the index or else from the footers."""
        with suppress(CacheError):
            if self.check.index is not None:
                return self.check.index.all_ids()
        clips: dict[str, None] = {}
        for number in range(self.manifest.num_shards):
            footer = read_footer(self.folder / shard_name(number), self.manifest.record)
            clips |= dict.fromkeys(clip_id for clip_id, _ in footer.keys)
        return as_clip_ids(list(clips))


def _rows(keys: Iterable[Key]) -> list[dict[str, Any]]:
    return [{"clip_id": clip_id, "view": view} for clip_id, view in keys]
