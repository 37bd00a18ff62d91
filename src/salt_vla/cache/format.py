"""The cache's format: how an array becomes a record's bytes, and what the manifest says.

Described byte by byte in docs/formats.md. Knows arrays and provenance, not teachers or videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xxhash

from salt_vla.errors import CacheError
from salt_vla.rundir import write_text

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.arrow"
INDEX_PAGES = "index.pages"
QUARANTINE = "quarantine.json"
PROBE = "probe.safetensors"
SHARDS = "shards"
LEASES = ".leases"
CURE = "`salt-vla cache repair` or its `cache build` writes it anew"
MOST_VALUES = 2**60  # of a cache: more than disks hold, and few enough to be counted in 64 bits
RESULT = {"result": True}  # A manifest's field that comes of a build, and is not asked for.
EncodingName = Literal["float16", "int8", "uint8"]


def shard_name(number: int) -> str:
    return f"{SHARDS}/{number:06d}.bin"


def checksum(content: bytes | bytearray | memoryview) -> int:
    return int(xxhash.xxh3_64_intdigest(content))


def hexadecimal(value: int) -> str:
    return f"{value:016x}"


class CorruptRecord(CacheError):
    """A record that is not what was written: which one, where it lies, and what is wrong with it."""

    def __init__(self, folder: Path, clip_id: str, view: int, file: str, offset: int, reason: str) -> None:
        self.folder, self.clip_id, self.view = folder, clip_id, view
        self.file, self.offset, self.reason = file, offset, reason
        super().__init__(
            f"cache {folder}, {file}, offset {offset} (clip {clip_id!r}, view {view}): {reason}; "
            "`salt-vla cache repair` computes it again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.folder, self.clip_id, self.view, self.file, self.offset, self.reason)
        return type(self), arguments


@dataclass(frozen=True)
class Encoding:
    """How one array of `shape` lies in a record.

    `float16`: little-endian halves. `int8`: a float32 scale a row (token), a float32 scale a channel (last
    axis), then int8 values; value = int8 × row × channel. Without the channels' scales, the few channels of
    huge variance that teachers have would leave the others no levels. `uint8`: the bytes themselves.
    """

    name: EncodingName
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def record_bytes(self) -> int:
        values = math.prod(self.shape)
        scales = self.rows + self.shape[-1]
        return {"float16": 2 * values, "int8": values + 4 * scales, "uint8": values}[self.name]

    def encode(self, array: np.ndarray) -> bytes:
        """Bytes of one record. Raises `CacheError` for a wrong shape or type, NaN, infinity or overflow."""
        if tuple(array.shape) != self.shape:
            raise CacheError(f"a record has shape {self.shape}, not {tuple(array.shape)}")
        if self.name == "uint8":
            if array.dtype != np.uint8:
                raise CacheError(f"pixels are uint8, not {array.dtype}")
            return np.ascontiguousarray(array).tobytes()
        with np.errstate(over="ignore"):
            values = array.astype("<f2" if self.name == "float16" else "<f4")
        if not np.isfinite(values).all():
            limit = "float16 (65,504)" if self.name == "float16" else "float32"
            raise CacheError(f"latents hold NaN, infinity or values beyond {limit}")
        if self.name == "float16":
            return values.tobytes()
        values = values.reshape(self.rows, -1)
        channels = np.maximum(np.abs(values).max(axis=0), np.float32(1e-12))
        values = values / channels
        rows = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12)) / np.float32(127)
        quantised = np.rint(values / rows[:, None]).astype(np.int8)
        return rows.astype("<f4").tobytes() + channels.astype("<f4").tobytes() + quantised.tobytes()

    def decode(self, record: bytes | memoryview) -> np.ndarray:
        """float32 for latents, uint8 for pixels; `shape` as declared."""
        if self.name == "uint8":
            return np.frombuffer(record, dtype=np.uint8).reshape(self.shape)
        if self.name == "float16":
            return np.frombuffer(record, dtype="<f2").astype(np.float32).reshape(self.shape)
        scales = np.frombuffer(record, dtype="<f4", count=self.rows + self.shape[-1])
        values = np.frombuffer(record, dtype=np.int8, offset=scales.nbytes).reshape(self.rows, -1)
        rows, channels = scales[: self.rows], scales[self.rows :]
        return (values.astype(np.float32) * rows[:, None] * channels).reshape(self.shape)


class NoManifest(CacheError):
    """There is no cache here."""


class DamagedManifest(CacheError):
    """A manifest that is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """What a cache is and what it was made from. No timestamps: equal builds are equal bytes.

    `provenance` holds what decides the values: for latents the teacher's name, fingerprint and layer, the
    view hash, the clip-table hash, split and geometry; for views all but the teacher. `measured`: figures
    that the builder took (of int8, what it costs). Results are 0 and empty until `complete`.
    """

    kind: Literal["latents", "views"]
    encoding: EncodingName
    shape: tuple[int, ...]
    num_views: int
    records_per_shard: int
    provenance: dict[str, Any] = field(default_factory=dict)
    num_clips: int = 0
    token_order: str = "time,row,column"
    schema_version: int = SCHEMA_VERSION
    num_records: int = field(default=0, metadata=RESULT)
    num_quarantined: int = field(default=0, metadata=RESULT)
    measured: dict[str, float] = field(default_factory=dict, metadata=RESULT)
    index_bytes: int = field(default=0, metadata=RESULT)
    index_checksum: str = field(default="", metadata=RESULT)
    quarantine_checksum: str = field(default="", metadata=RESULT)
    probe_checksum: str = field(default="", metadata=RESULT)
    complete: bool = field(default=False, metadata=RESULT)

    @property
    def record(self) -> Encoding:
        return Encoding(self.encoding, self.shape)

    @property
    def num_keys(self) -> int:
        """(clip, view) pairs that the cache answers for, quarantined ones included."""
        return self.num_clips * self.num_views

    @property
    def num_shards(self) -> int:
        return -(-self.num_keys // self.records_per_shard)

    @property
    def identity(self) -> str:
        """All that was asked for, as JSON. Shards carry it, so that they are never taken for another cache's
        and say themselves what they hold."""
        wanted = {name: value for name, value in asdict(self).items() if name not in RESULTS}
        return json.dumps(wanted, sort_keys=True)

    @classmethod
    def from_identity(cls, identity: str) -> Manifest:
        """As it was when the build began. Raises ValueError, KeyError or TypeError for another text."""
        wanted = json.loads(identity)
        if results := sorted(RESULTS & set(wanted)):
            raise ValueError(f"{results[0]} is not known when a build begins")
        manifest = cls(**{**wanted, "shape": tuple(wanted["shape"])})
        if wrong := _wrong_fields(manifest):
            raise ValueError(f"{', '.join(wrong)} cannot be right")
        return manifest

    def to_text(self) -> str:
        """The file's content, a checksum of everything else in it included."""
        said = asdict(self)
        return json.dumps({**said, "checksum": _checksum_of(said)}, indent=2, sort_keys=True) + "\n"

    def write(self, folder: Path) -> None:
        write_text(folder / MANIFEST, self.to_text())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the cache at `folder`. Raises `CacheError` when missing, damaged or of another
        version."""
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes().decode(), path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoManifest(
                f"there is no cache at {folder} ({MANIFEST} is missing); make it with `salt-vla cache build`"
            ) from error
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DamagedManifest(f"{path} is damaged ({error}); {CURE}") from error

    @classmethod
    def parse(cls, text: str, path: Path) -> Manifest:
        """What `to_text` wrote. Raises `CacheError`, as `read` does, in the name of the file `path`."""
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
            is_ours = raw.get("checksum") == _checksum_of({**raw, "schema_version": SCHEMA_VERSION})
            if version != SCHEMA_VERSION and type(version) is int and not is_ours:
                is_newer = version > SCHEMA_VERSION
                raise CacheError(
                    f"{path} has schema version {version}, {'newer' if is_newer else 'older'} than this "
                    f"program's {SCHEMA_VERSION}; {'update salt-vla, or ' * is_newer}remove that folder and "
                    "build the cache again"
                )
            del raw["checksum"]
            manifest = cls(**{**raw, "shape": tuple(raw["shape"])})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedManifest(f"{path} is damaged ({error}); {CURE}") from error
        if wrong := _wrong_fields(manifest):
            raise DamagedManifest(f"{path} is damaged ({', '.join(wrong)} cannot be right); {CURE}")
        if manifest.to_text() != text:
            raise DamagedManifest(f"{path} is damaged (its checksum does not match); {CURE}")
        return manifest

    def differences(self, other: Manifest) -> dict[str, tuple[Any, Any]]:
        """Fields in which two manifests disagree, results aside: {field: (self, other)}."""
        mine, theirs = _flat(self), _flat(other)
        return {
            key: (mine.get(key), theirs.get(key))
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        }

    def without_results(self) -> Manifest:
        """As it is when a build begins."""
        return replace(self, **{item.name: _default(item) for item in fields(self) if item.name in RESULTS})


def _checksum_of(said: dict[str, Any]) -> str:
    """Of a manifest's fields, whatever they say, but for the checksum itself."""
    rest = {name: value for name, value in said.items() if name != "checksum"}
    return hexadecimal(checksum(json.dumps(rest, sort_keys=True).encode()))


def manifests_below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with a `manifest.json`, by path, `folder` itself and as many levels below it, whatever lies
    between; links are not followed: all lie in the root."""
    if not folder.is_dir() or folder.is_symlink():
        return
    if (folder / MANIFEST).is_file():
        yield folder
    if depth:
        for path in sorted(folder.iterdir()):
            if path.name != SHARDS and not path.name.startswith("."):
                yield from manifests_below(path, depth - 1)


def is_of_others(folder: Path) -> bool:
    """Whether a `manifest.json` is there that was never a cache's: JSON with few of our fields, or none."""
    said = _manifest_json(folder)
    ours = {item.name for item in fields(Manifest)}
    has_ours = isinstance(said, dict) and 2 * len(ours & said.keys()) >= len(ours)
    return said is not None and not has_ours


def is_in_pieces(folder: Path) -> bool:
    """Whether a `manifest.json` is there that is no JSON, so that nobody can tell whose it was."""
    return (folder / MANIFEST).is_file() and _manifest_json(folder) is None


def _manifest_json(folder: Path) -> Any:
    """What a `manifest.json` says; None where it is none or no JSON."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


RESULTS = frozenset(item.name for item in fields(Manifest) if "result" in item.metadata)


def _default(item: Any) -> Any:
    return {} if item.name == "measured" else item.default


def _wrong_fields(manifest: Manifest) -> list[str]:
    """Names of the fields whose values no writer ever wrote."""

    def counts(values: tuple[Any, ...], least: int) -> bool:
        return all(type(value) is int and value >= least for value in values)

    sizes = (*manifest.shape, manifest.num_views, manifest.num_clips)
    sound = {
        "schema_version": manifest.schema_version == SCHEMA_VERSION,
        "kind": manifest.kind in ("latents", "views"),
        "encoding": manifest.encoding in get_args(EncodingName),
        "shape": bool(manifest.shape) and counts(manifest.shape, 1),
        "num_views": counts((manifest.num_views,), 1),
        "num_records": counts((manifest.num_records, manifest.num_quarantined, manifest.num_clips), 0),
        "num_clips": not counts(sizes, 0) or math.prod(sizes) <= MOST_VALUES,
        "records_per_shard": manifest.records_per_shard in range(1, 1 << 31),
        "index_bytes": counts((manifest.index_bytes,), 0),
        "token_order": isinstance(manifest.token_order, str),
        "provenance": isinstance(manifest.provenance, dict),
        "measured": isinstance(manifest.measured, dict),
        "complete": isinstance(manifest.complete, bool),
    }
    return [name for name, is_sound in sound.items() if not is_sound]


def _flat(manifest: Manifest) -> dict[str, Any]:
    """What was asked for, not what came of it; as JSON would give it back."""
    said: dict[str, Any] = json.loads(json.dumps(asdict(manifest)))
    wanted = {name: value for name, value in said.items() if name not in RESULTS}
    provenance = wanted.pop("provenance")
    return wanted | {f"provenance.{key}": value for key, value in provenance.items()}


def describe_differences(differences: dict[str, tuple[Any, Any]]) -> str:
    """In words: what is (first of each pair) and what was wanted (second)."""
    return "; ".join(
        f"{name}: {mine!r} here, {theirs!r} wanted" for name, (mine, theirs) in differences.items()
    )
