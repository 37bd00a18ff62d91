"""The cache's format: how an array becomes a record's bytes, and what the manifest says.

Described byte by byte in docs/formats.md. Knows arrays and provenance, not teachers or videos.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from salt_vla.errors import CacheError
from salt_vla.rundir import write_text

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.arrow"
JOURNAL = "journal.jsonl"
QUARANTINE = "quarantine.json"
EncodingName = Literal["float16", "int8", "uint8"]


def shard_name(number: int) -> str:
    return f"shards/{number:06d}.bin"


def checksum(record: bytes | memoryview) -> int:
    return int(xxhash.xxh3_64_intdigest(record))


@dataclass(frozen=True)
class Encoding:
    """How one array of `shape` lies in a record.

    `float16`: little-endian halves. `int8`: float32 scale a row (last axis), then int8 values; value =
    scale × int8. `uint8`: the bytes themselves.
    """

    name: EncodingName
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def record_bytes(self) -> int:
        values = math.prod(self.shape)
        return {"float16": 2 * values, "int8": values + 4 * self.rows, "uint8": values}[self.name]

    def encode(self, array: np.ndarray) -> bytes:
        """Bytes of one record. Raises `CacheError` for a wrong shape, NaN, infinity or overflow."""
        if tuple(array.shape) != self.shape:
            raise CacheError(f"a record has shape {self.shape}, not {tuple(array.shape)}")
        if self.name == "uint8":
            return np.ascontiguousarray(array, dtype=np.uint8).tobytes()
        if self.name == "float16":
            with np.errstate(over="ignore"):
                halves = array.astype("<f2")
            if not np.isfinite(halves).all():
                raise CacheError("latents hold NaN, infinity or values beyond float16 (65,504)")
            return halves.tobytes()
        values = array.astype(np.float32).reshape(self.rows, -1)
        if not np.isfinite(values).all():
            raise CacheError("latents hold NaN or infinity")
        scale = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12)) / np.float32(127)
        quantised = np.rint(values / scale[:, None]).astype(np.int8)
        return scale.astype("<f4").tobytes() + quantised.tobytes()

    def decode(self, record: bytes | memoryview) -> np.ndarray:
        """float32 for latents, uint8 for pixels; `shape` as declared."""
        if self.name == "uint8":
            return np.frombuffer(record, dtype=np.uint8).reshape(self.shape)
        if self.name == "float16":
            return np.frombuffer(record, dtype="<f2").astype(np.float32).reshape(self.shape)
        scale = np.frombuffer(record, dtype="<f4", count=self.rows)
        values = np.frombuffer(record, dtype=np.int8, offset=4 * self.rows).reshape(self.rows, -1)
        return (values.astype(np.float32) * scale[:, None]).reshape(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What a cache is and what it was made from. No timestamps: equal builds are equal bytes.

    `provenance` holds what decides the values: for latents the teacher's name, fingerprint and layer, the
    view hash, the clip-table hash, split and geometry; for views all but the teacher.
    """

    kind: Literal["latents", "views"]
    encoding: EncodingName
    shape: tuple[int, ...]
    num_views: int
    records_per_shard: int
    provenance: dict[str, Any] = field(default_factory=dict)
    token_order: str = "time,row,column"
    schema_version: int = SCHEMA_VERSION
    num_records: int = 0
    num_quarantined: int = 0
    complete: bool = False

    @property
    def record(self) -> Encoding:
        return Encoding(self.encoding, self.shape)

    def write(self, folder: Path) -> None:
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(f"there is no cache at {folder} ({MANIFEST} is missing); make it with `salt-vla cache build`")
        try:
            raw = json.loads(path.read_text())
            version = raw["schema_version"]
            if version > SCHEMA_VERSION:
                raise CacheError(f"{path} has schema version {version}, newer than this program's {SCHEMA_VERSION}")
            return cls(**{**raw, "shape": tuple(raw["shape"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}); build the cache again") from error

    def differences(self, other: Manifest) -> dict[str, tuple[Any, Any]]:
        """Fields in which two manifests disagree, counts and completeness aside: {field: (self, other)}."""
        mine, theirs = (_flat(replace(m, num_records=0, num_quarantined=0, complete=False)) for m in (self, other))
        return {
            key: (mine.get(key), theirs.get(key))
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        }


def _flat(manifest: Manifest) -> dict[str, Any]:
    fields = asdict(manifest)
    provenance = fields.pop("provenance")
    fields["shape"] = list(fields["shape"])
    return fields | {f"provenance.{key}": value for key, value in provenance.items()}


def describe_differences(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {mine!r} here, {theirs!r} wanted" for name, (mine, theirs) in differences.items())
