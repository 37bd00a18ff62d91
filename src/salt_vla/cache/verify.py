"""Compares every byte of a cache with what was written, whatever of it is damaged, and names what differs.

Reads only; `cache/mend.py` writes. Knows nothing of what the arrays are, nor of progress bars.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from salt_vla.cache.format import (
    INDEX,
    INDEX_PAGES,
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
from salt_vla.cache.index import Index
from salt_vla.cache.recover import bad_pages, read_regular, settled
from salt_vla.cache.shards import Footer, Key, open_to_read, read_footer
from salt_vla.errors import CacheError

NO_CLIP = ("", -1)
_SHARD = re.compile(r"\d{6,}\.bin")


@dataclass(frozen=True)
class Finding:
    """Something that is not what was written, and where; `clip_id` "" and `view` −1 where it is no record."""

    clip_id: str
    view: int
    file: str
    offset: int
    reason: str


@dataclass(frozen=True)
class ShardCheck:
    """What became of one shard. `expected`: what it should hold, by its own footer or else by the index, and
    where they differ by the one that its bytes agree with; None where nobody knows. `has_footer`: it says so
    itself. `bad_slots`: whose bytes are not that. `stranger`: what a whole shard says that belongs to another
    cache or place. `num_records` were compared, `num_bytes` read.
    """

    number: int
    expected: Footer | None
    bad_slots: tuple[int, ...]
    has_footer: bool
    num_records: int
    num_bytes: int
    findings: tuple[Finding, ...]
    stranger: Footer | None = None


class CacheCheck:
    """A cache's small files, checked when this is made; its shards follow one by one.

    `findings`: what is wrong outside the shards. `manifest`: None if it is damaged and cannot be recovered;
    `has_manifest`: it was read and is this cache's; `is_complete`: as it claims. `index`: as far as it is
    sound; it never answers from a damaged page. Raises `CacheError` only where there is no cache, or one of
    another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self.manifest, self.has_manifest = self._read_manifest(), not self.findings
        self.is_complete = self.manifest is not None and self.manifest.complete
        self.index = self._read_index() if self.is_complete else None
        self.reasons = self._read_quarantine() if self.is_complete else {}
        if self.is_complete:
            self._check_probe()

    @cached_property
    def numbers(self) -> range | list[int]:
        """The shards to look at: all of a complete cache, and of another one those that are there."""
        if self.is_complete and self.manifest is not None:
            return range(self.manifest.num_shards)
        folder = self.folder / SHARDS
        there = sorted(int(path.stem) for path in folder.glob("*.bin") if _SHARD.fullmatch(path.name))
        return [number for number in there if self.manifest is None or number < self.manifest.num_shards]

    def _find(self, file: str, offset: int, reason: str) -> None:
        self.findings.append(Finding(*NO_CLIP, file, offset, reason))

    def _read_manifest(self) -> Manifest | None:
        path, read = self.folder / MANIFEST, None
        try:
            if path.exists() and not path.is_file():
                raise DamagedManifest(f"{path} is no regular file")
            read = Manifest.read(self.folder)
        except NoManifest:
            if not (self.folder / INDEX).exists() and not any(self.folder.glob(f"{SHARDS}/*.bin")):
                raise
            self._find(MANIFEST, 0, "the file is missing")
        except DamagedManifest as error:
            self._find(MANIFEST, 0, str(error).removeprefix(f"{path} "))
        manifest, others = settled(self.folder, read)
        if manifest is not None and others is not None:
            self._find_others(manifest, others, MANIFEST if read else INDEX)
        return manifest

    def _find_others(self, manifest: Manifest, others: Manifest, file: str) -> None:
        """Name what lies beside the shards and is of another cache."""
        how = describe_differences(others.differences(manifest))
        self._find(file, 0, f"it is another cache's, of which there is not one shard here ({how})")
        if others.provenance.get("fingerprint") == manifest.provenance.get("fingerprint"):
            return  # One teacher's probe is the same in all of its caches.
        with suppress(OSError):
            if hexadecimal(checksum(read_regular(self.folder / PROBE))) == others.probe_checksum:
                self._find(PROBE, 0, f"it is of another cache, as {file} is")

    def _read_index(self) -> Index | None:
        assert self.manifest is not None
        try:
            digests = read_regular(self.folder / INDEX_PAGES)
        except OSError as error:
            self._find(INDEX_PAGES, 0, f"the file cannot be read ({error.strerror})")
            return None
        if hexadecimal(checksum(digests)) != self.manifest.index_checksum:
            self._find(INDEX_PAGES, 0, "its checksum is not the manifest's, so the index cannot be checked")
            return None
        for offset, reason in bad_pages(self.folder / INDEX, digests):
            self._find(INDEX, offset, reason)
        try:
            return Index(self.folder, self.manifest) if (self.folder / INDEX).is_file() else None
        except CacheError:
            return None  # Where its ends are damaged; what lies between is asked for page by page.

    def _read_quarantine(self) -> dict[Key, str]:
        assert self.manifest is not None
        content = self._content(QUARANTINE, self.manifest.quarantine_checksum)
        if content is None:
            return {}
        return {(entry["clip_id"], entry["view"]): entry["reason"] for entry in json.loads(content)}

    def _check_probe(self) -> None:
        assert self.manifest is not None
        if self.manifest.probe_checksum:
            self._content(PROBE, self.manifest.probe_checksum)

    def _content(self, file: str, wanted: str) -> bytes | None:
        """A small file's bytes; None, and a finding, where they are not those that the manifest knows. A
        manifest that was recovered knows no quarantine."""
        try:
            content = read_regular(self.folder / file)
        except OSError as error:
            self._find(file, 0, f"the file cannot be read ({error.strerror})")
            return None
        if wanted and hexadecimal(checksum(content)) != wanted:
            self._find(file, 0, "its checksum is not the manifest's, so it is damaged")
            return None
        return content if wanted else None

    def num_to_check(self, sample: float | None = None) -> int:
        """How many slots `shards` will look at, as far as that is known beforehand."""
        if self.manifest is None:
            return 0
        keys = min(len(self.numbers) * self.manifest.records_per_shard, self.manifest.num_keys)
        return keys if sample is None else min(_count(sample, self.manifest.num_keys), keys)

    def shards(self, sample: float | None = None, seed: int = 0) -> Iterator[ShardCheck]:
        """Check the shards in order: each footer, and all records; or, of the whole cache's, a share (below
        1) or a number of them, drawn with `seed`."""
        chosen = None
        if sample is not None and self.manifest is not None:
            rng = np.random.default_rng(seed)
            keys = self.manifest.num_keys
            chosen = np.sort(rng.choice(keys, _count(sample, keys), replace=False, shuffle=False))
        for number in self.numbers:
            yield self.check_shard(number, chosen)

    def check_shard(self, number: int, chosen: np.ndarray | None = None) -> ShardCheck:
        """Compare one shard with its footer, and both with the index; `chosen`: sorted keys to look at."""
        return _OneShard(self, number).check(chosen)

    def from_index(self, number: int) -> Footer | None:
        """What a shard should say, by the index; None where that does not know."""
        if self.index is None or self.manifest is None:
            return None
        size, views = self.manifest.records_per_shard, self.manifest.num_views
        first, stop = number * size, min((number + 1) * size, self.manifest.num_keys)
        places = [divmod(key, views) for key in range(first, stop)]
        try:
            keys = tuple((self.index.clip_id(row), view) for row, view in places)
            sums = tuple(self.index.checksum_of(row, view) for row, view in places)
        except CacheError:
            return None
        reasons = tuple(self.reasons.get(key, "") for key in keys)
        return Footer(number, self.manifest.identity, keys, sums, reasons)


class _OneShard:
    """The check of one shard file."""

    def __init__(self, cache: CacheCheck, number: int) -> None:
        self.cache, self.number = cache, number
        self.file = shard_name(number)
        self.path = cache.folder / self.file
        self.findings: list[Finding] = []
        self.identity = cache.manifest.identity if cache.manifest else ""
        self.record_bytes = cache.manifest.record.record_bytes if cache.manifest else 0
        self.indexed = cache.from_index(number)
        self.stranger: Footer | None = None
        self.own = self._footer()
        self.expected = self.own or self.indexed

    def _footer(self) -> Footer | None:
        """Its own footer, if that is sound and this cache's; else a finding."""
        offset = len(self.indexed.keys) * self.record_bytes if self.indexed else 0
        try:
            footer = read_footer(self.path)
        except CacheError as error:
            self._find(offset, f"{str(error).removeprefix(f'{self.path} ')}{self._of_clips()}")
            return None
        is_ours = (footer.shard, footer.identity) == (self.number, self.identity)
        if not is_ours or (self.indexed is not None and footer.keys != self.indexed.keys):
            self.stranger = footer
            self._find(offset, f"{self._whose(footer)}{self._of_clips()}")
            return None
        return footer

    def _whose(self, footer: Footer) -> str:
        if footer.identity == self.identity and footer.shard != self.number:
            return f"this is {shard_name(footer.shard)}, in another place; `cache repair` puts it right"
        how = "the same, of other clips"
        if self.cache.manifest is not None and footer.identity != self.identity:
            theirs = Manifest.from_identity(footer.identity)
            how = describe_differences(theirs.differences(self.cache.manifest))
        return f"this is a whole shard of another cache ({how}); move it away, then repair"

    def _of_clips(self) -> str:
        if self.indexed is None:
            return ""
        first, last = self.indexed.keys[0], self.indexed.keys[-1]
        return f"; it is to hold clips {first[0]!r} to {last[0]!r} ({len(self.indexed.keys)} records)"

    def _find(self, offset: int, reason: str) -> None:
        self.findings.append(Finding(*NO_CLIP, self.file, offset, reason))

    def check(self, chosen: np.ndarray | None) -> ShardCheck:
        if self.expected is None:
            return ShardCheck(self.number, None, (), False, 0, 0, tuple(self.findings), self.stranger)
        slots: range | list[int] = range(len(self.expected.keys))
        if chosen is not None and self.cache.manifest is not None:
            first = self.number * self.cache.manifest.records_per_shard
            ours = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(slots))]
            slots = sorted({*(ours - first).tolist(), *self._contradicted()})
        bad, records, read = self._check_slots(slots)
        return ShardCheck(
            self.number,
            self.expected,
            tuple(bad),
            self.own == self.expected,
            records,
            read,
            tuple(self.findings),
            self.stranger,
        )

    def _contradicted(self) -> Iterator[int]:
        """Slots of which the index says otherwise, so that only the record can tell which is right."""
        if self.indexed is not None and self.own is not None:
            pairs = zip(self.indexed.checksums, self.own.checksums, strict=True)
            yield from (slot for slot, (theirs, ours) in enumerate(pairs) if theirs != ours)

    def _check_slots(self, slots: range | list[int]) -> tuple[list[int], int, int]:
        """Bad ones, the number of records compared, and of bytes read."""
        assert self.expected is not None
        bad: list[int] = []
        records = read = 0
        buffer = np.empty(self.record_bytes, np.uint8)
        descriptor, unreadable = -1, ""
        try:
            descriptor = open_to_read(self.path)
            if sys.platform == "linux":  # What memory holds of the file is not what the disk holds.
                with suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            unreadable = "the shard is missing"
        except OSError as error:
            unreadable = error.strerror or str(error)
        try:
            for slot in slots:
                is_record = self.expected.checksums[slot] is not None
                reason = unreadable if is_record else ""
                if descriptor >= 0:
                    reason = self._look(descriptor, buffer, slot)
                    read += len(buffer)
                records += is_record
                if reason:
                    bad.append(slot)
                    key = self.expected.keys[slot]
                    self.findings.append(Finding(*key, self.file, slot * len(buffer), reason))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return bad, records, read

    def _look(self, descriptor: int, buffer: np.ndarray, slot: int) -> str:
        """Why a slot is not what it should be, or ""; that footer or index says otherwise is a finding."""
        assert self.expected is not None
        try:
            filled = os.preadv(descriptor, [buffer.data], slot * len(buffer))
        except OSError as error:
            return error.strerror or str(error)
        if filled != len(buffer):
            return "the shard is truncated"
        self._decide(buffer, slot)
        wanted = self.expected.checksums[slot]
        if wanted is None and buffer.any():
            return "there are bytes in the slot of a quarantined record, which is to be empty"
        if wanted is not None and checksum(buffer.data) != wanted:
            return "the checksum does not match, so the record is damaged"
        if self.indexed is not None and self.indexed.checksums[slot] != wanted:
            reason = f"it does not say of this record what {self.file} says, which is sound"
            self.findings.append(Finding(*self.expected.keys[slot], INDEX, 0, reason))
        return ""

    def _decide(self, buffer: np.ndarray, slot: int) -> None:
        """Where footer and index contradict each other believe the one that the bytes agree with; where they
        agree with neither, the one that knows of a record."""
        if self.expected is None or self.own is None or self.indexed is None:
            return
        said, other = self.own.checksums[slot], self.indexed.checksums[slot]
        if said == other or _fits(buffer, said) or not (said is None or _fits(buffer, other)):
            return
        checksums, reasons = list(self.expected.checksums), list(self.expected.reasons)
        checksums[slot], reasons[slot] = other, self.indexed.reasons[slot]
        self.expected = replace(self.expected, checksums=tuple(checksums), reasons=tuple(reasons))
        reason = f"its footer does not say of this record what {INDEX} says, which is sound"
        offset = len(checksums) * self.record_bytes
        self.findings.append(Finding(*self.expected.keys[slot], self.file, offset, reason))


def _fits(buffer: np.ndarray, wanted: int | None) -> bool:
    """Whether these are the bytes of a record with this checksum, or, for None, of an empty slot."""
    return not buffer.any() if wanted is None else checksum(buffer.data) == wanted


def _count(sample: float, keys: int) -> int:
    return min(math.ceil(sample * keys) if sample < 1 else int(sample), keys)
