"""`cache verify`: every byte of a cache, or a sample of its records, against what was written."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from salt_vla.cache.verify import CacheCheck, Finding
from salt_vla.errors import ConfigError
from salt_vla.progress import progress


@dataclass(frozen=True)
class VerifyReport:
    """`records` that were compared, of `num_records` that the cache claims (0: unknown); what was found
    `bad`; `has_manifest`: it is sound, so that it can be told how many of the shards should be there."""

    records: int
    num_records: int
    bad: tuple[Finding, ...]
    has_manifest: bool
    is_complete: bool
    shards_there: int
    num_shards: int
    seconds: float
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"records": self.records, "bad": [asdict(finding) for finding in self.bad]}

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and what came of it."""
        share = f" of {self.num_records:,}" if self.records < self.num_records else ""
        gigabytes = self.num_bytes / 1e9
        rate = f"{gigabytes:.2f} GB, {gigabytes / max(self.seconds, 1e-9):.2f} GB/s"
        return f"{self.records:,}{share} records, {len(self.bad):,} damaged ({rate})"

    @property
    def unfinished(self) -> str:
        """A sentence where the cache is not all there yet, which is no damage; else empty."""
        if self.is_complete or not self.has_manifest:
            return ""
        there = f"{self.shards_there} of {self.num_shards} shards are there"
        return f"the cache is unfinished: {there}, and were looked at"


def verify_cache(folder: Path, sample: float | None = None, seed: int = 0) -> VerifyReport:
    """Check the cache at `folder`: manifest, index, footers, quarantine and probe always; all records, or a
    share of them (`sample` below 1), or so many, drawn with `seed`.

    One record is in memory at a time. Raises `CacheError` where there is no cache or one of another version;
    whatever is damaged in it is in the report.
    """
    if seed < 0:
        raise ConfigError(f"a seed is 0 or more, not {seed}")
    if sample is not None and not (math.isfinite(sample) and sample > 0 and (sample < 1 or sample % 1 == 0)):
        raise ConfigError(f"a sample is a share, as 0.05, or a number of records, not {sample:g}")
    started = time.monotonic()
    cache = CacheCheck(folder)
    bad = list(cache.findings)
    records = num_bytes = 0
    with progress("Verifying", cache.num_to_check(sample), "records") as advance:
        for shard in cache.shards(sample, seed):
            bad += shard.findings
            records += shard.num_records
            num_bytes += shard.num_bytes
            rate = num_bytes / max(time.monotonic() - started, 1e-9) / 1e9
            advance(shard.num_records, note=f"{rate:.2f} GB/s")
    manifest = cache.manifest
    return VerifyReport(
        records,
        manifest.num_records if manifest else 0,
        tuple(bad),
        cache.has_manifest,
        cache.is_complete,
        len(cache.numbers),
        manifest.num_shards if manifest else 0,
        time.monotonic() - started,
        num_bytes,
    )
