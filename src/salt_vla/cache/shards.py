"""One shard file: records at fixed slots, and a footer that says whose they are and what they should be.

A shard is published and acknowledged by one rename; there is nothing else to keep in step with it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from salt_vla.cache.format import Encoding, Manifest, checksum
from salt_vla.errors import CacheError
from salt_vla.rundir import write_atomically

Key = tuple[str, int]  # (clip_id, view)

MAGIC = b"SALTSHD2"
TAIL = struct.Struct("<QQ8s")  # bytes of the footer's JSON, its XXH3-64, MAGIC: the last 24 bytes of a shard


class DamagedShard(CacheError):
    """A file that is not the whole shard that was written."""


@dataclass(frozen=True)
class Record:
    """What became of one key: an array, or the reason why there is none."""

    key: Key
    array: np.ndarray | None
    reason: str = ""


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself, slot by slot: whose record lies there, and its checksum; or, where it has
    none, the reason. `identity` is its cache's (`Manifest.identity`): in the file an object, `manifest`."""

    shard: int
    identity: str
    keys: tuple[Key, ...]
    checksums: tuple[int | None, ...]
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.checksums) == len(self.reasons):
            raise ValueError("a footer has a key, a checksum and a reason for each slot")

    def to_bytes(self) -> bytes:
        said = {
            "shard": self.shard,
            "manifest": json.loads(self.identity),
            "clip_ids": [clip_id for clip_id, _ in self.keys],
            "views": [view for _, view in self.keys],
            "checksums": self.checksums,
            "reasons": self.reasons,
        }
        text = json.dumps(said, sort_keys=True).encode()
        return text + TAIL.pack(len(text), checksum(text), MAGIC)

    @classmethod
    def from_json(cls, text: bytes) -> Footer:
        """Raises ValueError, KeyError, TypeError or RecursionError for what `to_bytes` never wrote."""
        said: dict[str, Any] = json.loads(text)
        identity = json.dumps(said["manifest"], sort_keys=True)
        Manifest.from_identity(identity)
        keys = tuple(zip(said["clip_ids"], said["views"], strict=True))
        footer = cls(said["shard"], identity, keys, tuple(said["checksums"]), tuple(said["reasons"]))
        known = (check for check in footer.checksums if check is not None)
        numbers = (footer.shard, *(view for _, view in keys), *known)
        if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
            raise ValueError("a number in its footer is none")
        if not all(isinstance(said, str) for said in (*(clip_id for clip_id, _ in keys), *footer.reasons)):
            raise ValueError("a text in its footer is none")
        return footer


class RecordsInShard:
    """Encodes records into their slots of an open shard file, in whatever order they come."""

    def __init__(self, file: Any, keys: Sequence[Key], encoding: Encoding) -> None:
        self.file, self.encoding = file, encoding
        self.keys = tuple(keys)
        self.slots = {key: slot for slot, key in enumerate(self.keys)}
        self.checksums: dict[int, int] = {}
        self.reasons: dict[int, str] = {}
        self.failed: list[str] = []

    def add(self, record: Record) -> None:
        """Write one record; what has no array, or one that cannot be encoded, leaves a hole and a reason."""
        slot = self.slots.get(record.key)
        if slot is None or slot in self.checksums or slot in self.reasons:
            raise ValueError(f"{record.key} is no key of this shard, or comes twice")
        self.reasons[slot] = record.reason or "there is no array"
        if record.array is None:
            return
        try:
            blob = self.encoding.encode(record.array)
        except CacheError as error:
            self.reasons[slot] = str(error)
            self.failed.append(f"clip {record.key[0]!r}, view {record.key[1]}: {error}")
            return
        self.put(slot, blob)

    def put(self, slot: int, blob: bytes | memoryview) -> None:
        """Bytes that are a record already."""
        self.file.seek(slot * self.encoding.record_bytes)
        self.file.write(blob)
        self.checksums[slot] = checksum(blob)
        self.reasons.pop(slot, None)

    def footer(self, number: int, identity: str) -> Footer:
        if len(self.checksums) + len(self.reasons) != len(self.keys):
            raise ValueError(f"the records of shard {number} are not those of its keys")
        slots = range(len(self.keys))
        checksums = tuple(self.checksums.get(slot) for slot in slots)
        reasons = tuple(self.reasons.get(slot, "") for slot in slots)
        return Footer(number, identity, self.keys, checksums, reasons)


def write_shard(
    path: Path,
    number: int,
    identity: str,
    keys: Sequence[Key],
    records: Iterable[Record],
    encoding: Encoding,
    before_publishing: Callable[[], None] = lambda: None,
) -> Footer:
    """Write a shard, whole or not at all; `records` holds each key once, in any order.

    `before_publishing` is called when all bytes are on disk and may still refuse. Raises `CacheError` when
    not one of several records can be encoded: one bad clip is an accident, all of them are a broken teacher.
    """
    footers: list[Footer] = []

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            shard = RecordsInShard(file, keys, encoding)
            for record in records:
                shard.add(record)
            if len(shard.failed) > 1 and not shard.checksums:
                raise CacheError(f"{path}: nothing of this shard can be encoded; {shard.failed[0]}")
            footers.append(shard.footer(number, identity))
            file.seek(len(shard.keys) * encoding.record_bytes)
            file.write(footers[0].to_bytes())
            file.flush()
            os.fsync(file.fileno())
        before_publishing()

    write_atomically(path, write)
    return footers[0]


def open_to_read(path: Path) -> int:
    """A file's descriptor. Raises `OSError` for what is none: a pipe would be waited for without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        what = "Is a directory" if stat.S_ISDIR(mode) else "it is a pipe or a device"
        raise OSError(errno.EINVAL, what, str(path))
    return descriptor


def is_shard(path: Path) -> bool:
    """Whether a file is one of ours beyond doubt, whoever's cache it belongs to."""
    try:
        read_footer(path)
    except CacheError:
        return False
    return True


def read_footer(path: Path, encoding: Encoding | None = None) -> Footer:
    """The footer of the shard at `path`, whose records are `encoding`'s, or else what its own manifest says.

    Raises `DamagedShard` when that is no whole shard, `CacheError` when it cannot be read at all.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL.size, 0))
            length, check, magic = TAIL.unpack(file.read(TAIL.size))
            if magic != MAGIC or length > size - TAIL.size:
                raise ValueError("it ends otherwise than shards do")
            file.seek(size - TAIL.size - length)
            text = file.read(length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedShard(f"{path} is missing") from error
    except (struct.error, ValueError) as error:
        raise DamagedShard(f"{path} is no whole shard ({error})") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if checksum(text) != check:
        raise DamagedShard(f"{path} is damaged: its footer's checksum does not match")
    try:
        footer = Footer.from_json(text)
        record = encoding or Manifest.from_identity(footer.identity).record
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedShard(f"{path} is no shard of this version ({error})") from error
    if size != len(footer.keys) * record.record_bytes + length + TAIL.size:
        raise DamagedShard(f"{path} is no whole shard (it has {size} bytes, and its footer says otherwise)")
    return footer
