"""`cache repair`: computes damaged records again, and writes what follows from sound shards anew.

Trusts a teacher that gives the recorded bytes, or else one whose latents of the cache's probe clip agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from salt_vla.cache.format import (
    INDEX,
    LEASES,
    MANIFEST,
    PROBE,
    QUARANTINE,
    Manifest,
    checksum,
    describe_differences,
    shard_name,
)
from salt_vla.cache.index import as_clip_ids
from salt_vla.cache.leases import Lease, Leases
from salt_vla.cache.mend import reindex, rewrite_shard, tidy
from salt_vla.cache.shards import Footer, Key, Record, read_footer
from salt_vla.cache.verify import CacheCheck, Finding, ShardCheck
from salt_vla.config import RuntimeConfig, TrainConfig, ViewConfig, from_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import StopFlag, stop_on_signals
from salt_vla.jobs.build_cache import latents_manifest, latents_of
from salt_vla.jobs.cache_checks import check_probe, probe_of
from salt_vla.jobs.data import open_table
from salt_vla.jobs.pipeline import records_of
from salt_vla.progress import progress
from salt_vla.rundir import void, write_atomically
from salt_vla.teachers import Teacher, load_teacher
from salt_vla.training.runtime import resolve_device

POLL_SECONDS = 0.2
NEEDS_SOURCE = "the teacher has to compute it again: give --teacher and --data"


@dataclass(frozen=True)
class Source:
    """What a cache's records were computed from: the teacher, the clips of its split, and their views."""

    teacher: Teacher
    table: ClipTable
    view: ViewConfig


FindSource = Callable[[Manifest], Source]


@dataclass
class RepairReport:
    """Records that are `byte_equal` to what was written; `changed`: that differ in last digits; `recovered`:
    out of quarantine; why others `failed` to be had; `files` that were written anew; what is `left`."""

    found: int = 0
    byte_equal: list[Key] = field(default_factory=list)
    changed: list[Key] = field(default_factory=list)
    recovered: list[Key] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    failed: dict[Key, str] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What was done, in a few sentences."""
        if not self.found and not self.files and not self.failed:
            return "nothing is damaged"
        said = [f"{self.found:,} found, {len(self.left):,} left"]
        counts = {
            "records are byte-equal to what was written": self.byte_equal,
            "records differ from what was written in rounding, as the probe tells": self.changed,
            "records are out of quarantine": self.recovered,
            "records could not be computed": self.failed,
        }
        said += [f"{len(keys):,} {what}" for what, keys in counts.items() if keys]
        if self.files:
            said.append("written anew: " + ", ".join(dict.fromkeys(self.files)))
        return "\n".join(said)

    def to_json(self) -> dict[str, Any]:
        return {
            "found": self.found,
            **{name: _rows(getattr(self, name)) for name in ("byte_equal", "changed", "recovered")},
            "failed": [
                row | {"reason": self.failed[row["clip_id"], row["view"]]} for row in _rows(self.failed)
            ],
            "files": self.files,
            "left": [asdict(finding) for finding in self.left],
        }


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


def repair_cache(
    folder: Path, find_source: FindSource | None = None, quarantined: bool = False
) -> RepairReport:
    """Look for damage in the cache at `folder` and mend it; killed at any moment, the same call goes on.

    Index, quarantine, manifest and footers follow from one another. Records need a source, whose every
    field must be the manifest's; the whole batch around one passes the teacher, so that its last digits come
    out as they did. `quarantined`: try what has no record once more. No sound record is written to. Raises
    `CacheError` when there is nothing to go by, or when the source is another one, and `Stopped` after a
    signal.
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


class _Repair:
    """One call of `repair_cache`."""

    def __init__(
        self, check: CacheCheck, manifest: Manifest, source: Source | None, quarantined: bool, stop: StopFlag
    ) -> None:
        self.check, self.manifest = check, manifest
        self.folder = check.folder
        self.source, self.quarantined, self.stop = source, quarantined, stop
        self.report = RepairReport(found=len(check.findings))
        # A cache that lacks nothing but its end was left by a build or a repair that was killed.
        is_to_finish = not check.is_complete and self._has_all_shards()
        self.needs_index = is_to_finish or any(finding.file != PROBE for finding in check.findings)
        if source is not None:
            _require(manifest, source, self.folder)

    def run(self) -> RepairReport:
        damaged = self._damaged()
        self._mend_probe()
        if damaged:
            self._mend_all(damaged)
        if self.needs_index:
            self._write_what_follows()
        tidy(self.folder)
        after = CacheCheck(self.folder)
        self.report.left = list(after.findings)
        for number in damaged:
            self.report.left += after.check_shard(number).findings
        return self.report

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
                with self._lease(leases, number) as lease:
                    self._mend(self.check.check_shard(number), lease)
                advance(1)

    @contextmanager
    def _lease(self, leases: Leases, number: int) -> Iterator[Lease]:
        while (lease := leases.take(f"{number:06d}")) is None:
            self._wait("")
        try:
            yield lease
        finally:
            lease.release()

    def _wait(self, holder: str) -> None:
        self.stop.check("while repairing")
        time.sleep(POLL_SECONDS)

    def _mend(self, shard: ShardCheck, lease: Lease) -> None:
        """Work on a shard, as it is now that nobody else does."""
        self.stop.check("while repairing")
        if shard.expected is None:
            return  # Neither its footer nor the index is there: `cache build` makes it anew.
        wanted = {slot for slot in shard.bad_slots if shard.expected.checksums[slot] is not None}
        if self.quarantined:
            wanted |= {slot for slot, known in enumerate(shard.expected.checksums) if known is None}
        fresh, footer = self._computed(shard.expected, wanted)
        path = self.folder / shard_name(shard.number)
        has_hole_to_clear = any(shard.expected.checksums[slot] is None for slot in shard.bad_slots)
        has_rest_to_write = not shard.has_footer or has_hole_to_clear
        if not fresh and not (has_rest_to_write and (path.exists() or not wanted)):
            return  # A lost shard without its records is no better than none.

        def fence() -> None:
            if not lease.is_held():
                raise CacheError(f"another process has taken over {path}; run the repair again")

        left_bad = frozenset(shard.bad_slots) - fresh.keys()
        rewrite_shard(path, footer, fresh, left_bad, self.manifest.record, fence)
        self.report.files.append(shard_name(shard.number))
        self.needs_index |= footer != shard.expected

    def _computed(self, expected: Footer, wanted: set[int]) -> tuple[dict[int, bytes], Footer]:
        """Records of the wanted slots as far as they can be had, and the footer that goes with them."""
        fresh: dict[int, bytes] = {}
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
            kind = "recovered" if known is None else "byte_equal" if found == known else "changed"
            getattr(self.report, kind).append(record.key)
            fresh[slot], checksums[slot], reasons[slot] = blob, found, ""
        return fresh, replace(expected, checksums=tuple(checksums), reasons=tuple(reasons))

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
            write_atomically(self.folder / PROBE, lambda path: void(path.write_bytes(content)))
            self.report.files.append(PROBE)
            self.needs_index = True  # The manifest knows its checksum, and its last digits may differ.

    def _write_what_follows(self) -> None:
        """Index, quarantine and manifest, unless a footer is still lost."""
        has_bad_probe = any(finding.file == PROBE for finding in self.check.findings)
        if has_bad_probe and self.source is None:
            return  # The manifest would take it for the right one.
        if self._has_all_shards():
            reindex(self.folder, self.manifest, self._clip_ids(), self._wait)
            self.report.files += [INDEX, QUARANTINE, MANIFEST]

    def _has_all_shards(self) -> bool:
        paths = (self.folder / shard_name(number) for number in range(self.manifest.num_shards))
        return all(_footer(path) is not None for path in paths)

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


def _footer(path: Path) -> Footer | None:
    try:
        return read_footer(path, None)
    except CacheError:
        return None


def _require_computed(manifest: Manifest) -> None:
    if manifest.kind != "latents" or not manifest.provenance.get("fingerprint"):
        raise CacheError(
            "the records of this cache are no latents that this program has computed; remove it, and decode "
            "or import them again"
        )


def _require(manifest: Manifest, source: Source, folder: Path) -> None:
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
