"""What of a cache is on disk: which shards are there, whole and its own, and what they say of their records.

Looks and counts; writes nothing. Knows nothing of who makes shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.cache.format import Manifest, describe_differences, shard_name
from salt_vla.cache.index import ClipIdsLike, as_clip_ids, require_unique
from salt_vla.cache.shards import DamagedShard, Footer, Key, read_footer
from salt_vla.errors import CacheError

if TYPE_CHECKING:
    from jaxtyping import UInt8, UInt64


@dataclass(frozen=True)
class Contents:
    """What the footers say, taken together: 1 and a checksum where there is a record, else a reason."""

    checksums: UInt64[np.ndarray, "clips views"]
    present: UInt8[np.ndarray, "clips views"]
    quarantine: list[tuple[Key, str]]


class Ledger:
    """The shards of the cache that `manifest` asks for, in `folder`. `done` holds those that were on disk
    when last looked for, whoever made them.

    Raises `CacheError` for clip ids that are no texts or come twice.
    """

    def __init__(self, folder: Path, manifest: Manifest, clip_ids: ClipIdsLike) -> None:
        self.folder = folder
        self.clip_ids = as_clip_ids(clip_ids)
        require_unique(self.clip_ids)
        self.manifest = replace(manifest, num_clips=len(self.clip_ids)).without_results()
        self.identity = self.manifest.identity
        self.done: set[int] = set()
        self.num_quarantined = 0  # of their keys
        self._quarantined: dict[int, int] = {}
        self._noting = Lock()

    @property
    def num_keys_done(self) -> int:
        """Keys of the shards that are on disk."""
        last = self.manifest.num_shards - 1
        size = self.manifest.records_per_shard
        missing_of_last = (last + 1) * size - self.manifest.num_keys if last in self.done else 0
        return len(self.done) * size - missing_of_last

    def keys_of(self, number: int) -> tuple[Key, ...]:
        """The keys that a shard answers for, in the order of its slots."""
        size, views = self.manifest.records_per_shard, self.manifest.num_views
        first, stop = number * size, min((number + 1) * size, self.manifest.num_keys)
        clips = self.clip_ids.slice(first // views, -(-stop // views) - first // views).to_pylist()
        return tuple((clips[key // views - first // views], key % views) for key in range(first, stop))

    def look(self, number: int) -> bool:
        """Whether a shard is on disk, whole and this cache's; noted in `done`."""
        footer = self.footer(number)
        self.note(number, footer)
        return footer is not None

    def note(self, number: int, footer: Footer | None) -> None:
        """A shard is on disk with this footer, or (None) is not."""
        now = footer.checksums.count(None) if footer else 0
        with self._noting:  # Shards are looked for in one thread and written in another.
            (self.done.add if footer else self.done.discard)(number)
            self.num_quarantined += now - self._quarantined.pop(number, 0)
            if now:
                self._quarantined[number] = now

    def look_at_all(self) -> None:
        for number in range(self.manifest.num_shards):
            self.look(number)

    def footer(self, number: int) -> Footer | None:
        """The footer of a shard that is on disk, whole. Raises `CacheError` when it is another cache's, or
        cannot be read though it is there."""
        path = self.folder / shard_name(number)
        try:
            footer = read_footer(path)
        except DamagedShard:
            return None  # Missing, or half of one: it is to be made.
        if (footer.shard, footer.identity, footer.keys) == (number, self.identity, self.keys_of(number)):
            return footer
        if footer.identity == self.identity and footer.shard != number:
            raise CacheError(
                f"{path} is {shard_name(footer.shard)}, in another place; `salt-vla cache repair "
                f"{self.folder}` puts it right"
            )
        differences = Manifest.from_identity(footer.identity).differences(self.manifest)
        how = describe_differences(differences) or "the same, of other clips"
        raise CacheError(
            f"{path} belongs to another cache than the one asked for ({how}); move that file away, "
            "or choose another folder"
        )

    def contents(self) -> Contents:
        """Raises `CacheError` when a shard is missing."""
        shape = (self.manifest.num_clips, self.manifest.num_views)
        checksums = np.zeros(self.manifest.num_keys, np.uint64)
        present = np.zeros(self.manifest.num_keys, np.uint8)
        quarantine: list[tuple[Key, str]] = []
        for number in range(self.manifest.num_shards):
            footer = self.footer(number)
            if footer is None:
                raise CacheError(f"{self.folder} lacks shard {number}; run its `cache build` again")
            first = number * self.manifest.records_per_shard
            for slot, check in enumerate(footer.checksums):
                if check is None:
                    quarantine.append((footer.keys[slot], footer.reasons[slot]))
                else:
                    checksums[first + slot], present[first + slot] = check, 1
        return Contents(checksums.reshape(shape), present.reshape(shape), quarantine)
