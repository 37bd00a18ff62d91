"""The clip table: which stretch of which file is which clip, in Parquet, with ids that never shift.

Knows nothing of any source's layout and opens no video.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from salt_vla.errors import DataError
from salt_vla.rundir import write_atomically

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # a function of the source's own key, never a row number
        ("dataset", pa.string()),  # the name that the table knows a root by
        ("source", pa.string()),
        ("file", pa.string()),  # relative to its data set's root
        ("first_frame", pa.int64()),  # the canonical first frame, counted in the file
        ("episode", pa.int64()),
        ("episode_first_frame", pa.int64()),  # where the clip's episode (or video) lies in the file
        ("episode_frames", pa.int64()),
        ("camera", pa.string()),
        ("label", pa.string()),
        ("fps", pa.float64()),
        ("variable_rate", pa.bool_()),  # pictures last until the next one, not one frame's time
        ("split", pa.string()),
    ]
)


METADATA = b"salt_vla.places"  # of the Parquet file: the data sets' roots and weights, as JSON
WEIGHTS = (1e-6, 1e6)  # smallest and largest of a mixture
SAMPLED_BYTES = 1 << 16  # of either end of a file
UNREADABLE = b"unreadable"  # stands for the sample of a file that cannot be read


@dataclass(frozen=True)
class Clip:
    """One row of the table."""

    clip_id: str
    dataset: str
    source: str
    file: str
    first_frame: int
    episode: int
    episode_first_frame: int
    episode_frames: int
    camera: str
    label: str
    fps: float
    variable_rate: bool
    split: str

    @property
    def start_in_episode(self) -> int:
        return self.first_frame - self.episode_first_frame


class ClipTable:
    """Clips of one data set below one root folder, or of several with weights: each clip keeps its data set.

    `weights` are shares of the clips drawn in training. Immutable; selections are new tables.
    """

    def __init__(
        self, rows: pa.Table, roots: Mapping[str, Path], weights: Mapping[str, float] | None = None
    ) -> None:
        self.rows = rows
        self.roots = dict(roots)
        self.weights = dict(weights or {})

    @classmethod
    def from_clips(cls, clips: Sequence[Clip], root: Path) -> ClipTable:
        columns = {name: [getattr(clip, name) for clip in clips] for name in SCHEMA.names}
        rows = pa.table(columns, schema=SCHEMA)
        table = cls(rows, {name: root.resolve() for name in pc.unique(rows["dataset"]).to_pylist()})
        table._refuse_repeated_ids(f"the clip table of {root}")
        return table

    @classmethod
    def mix(cls, parts: Sequence[tuple[ClipTable, float]]) -> ClipTable:
        """Several tables as one. Raises `DataError` for a data set or clip id that is in two of them."""
        roots: dict[str, Path] = {}
        weights: dict[str, float] = {}
        for table, weight in parts:
            if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
                raise DataError(
                    f"a mixture's weight must be a positive number, not {weight} (from {WEIGHTS[0]:g} to "
                    f"{WEIGHTS[1]:g})"
                )
            if table.weights:
                raise DataError(f"{table.name} is a mixture already; mix the tables it was made of")
            if shared := roots.keys() & table.roots.keys():
                raise DataError(
                    f"two tables of the mixture hold the data set {min(shared)!r}; index one under another "
                    "--dataset name"
                )
            roots |= table.roots
            weights |= dict.fromkeys(table.roots, weight / len(table.roots))
        mixed = cls(pa.concat_tables([table.rows for table, _ in parts]), roots, weights)
        mixed._refuse_repeated_ids("the mixture")
        return mixed

    @classmethod
    def read(cls, path: Path) -> ClipTable:
        """The table in a Parquet file. Raises `DataError` naming the file and what is wrong with it."""
        if not path.is_file():
            raise DataError(f"there is no clip table at {path}; make one with `salt-vla data index`")
        try:
            # No partitioning: a folder called `split=train` above the file is no column.
            rows = pq.read_table(path, partitioning=None, page_checksum_verification=True)
            missing = [name for name in SCHEMA.names if name not in rows.column_names]
            said = (rows.schema.metadata or {}).get(METADATA, b"").decode()
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise DataError(f"{path} is not a Parquet file, or a damaged one: {error}") from error
        if missing:
            raise DataError(
                f"{path} is not a clip table of this version: it lacks the column(s) {', '.join(missing)}; "
                "make it with `salt-vla data index`"
            )
        rows = _as_schema(rows, path)
        roots, weights = _places(said, pc.unique(rows["dataset"]).to_pylist(), path)
        table = cls(rows, roots, weights)
        table._refuse_repeated_ids(str(path))
        return table

    @property
    def name(self) -> str:
        """The data sets' roots, for messages."""
        return " + ".join(str(root) for root in self.roots.values())

    @property
    def root(self) -> Path:
        """Of a table of one data set. Raises `DataError` for a mixture."""
        if len(self.roots) != 1:
            raise DataError(f"{self.name} is a mixture; give a clip table of one data set here")
        return next(iter(self.roots.values()))

    def _refuse_repeated_ids(self, where: str) -> None:
        counts = pc.value_counts(self.rows["clip_id"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise DataError(f"{where} holds clip_id {repeated[0]['values'].as_py()!r} more than once")

    def write(self, path: Path, notes: Mapping[bytes, bytes] | None = None) -> None:
        """Into a Parquet file, whole or not at all; `notes` are kept in its metadata, and not read here."""
        said = {"roots": {name: str(root) for name, root in self.roots.items()}, "weights": self.weights}
        rows = self.rows.replace_schema_metadata({METADATA: json.dumps(said).encode(), **(notes or {})})
        write_atomically(path, lambda temporary: _write(rows, temporary))

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @cached_property
    def clip_ids(self) -> list[str]:
        return list(self.rows["clip_id"].to_pylist())

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {clip_id: row for row, clip_id in enumerate(self.clip_ids)}

    def clip(self, clip_id: str) -> Clip:
        if clip_id not in self._row_of:
            raise DataError(f"clip {clip_id!r} is not in the clip table of {self.name}")
        return Clip(**self.rows.slice(self._row_of[clip_id], 1).to_pylist()[0])

    def clips(self) -> list[Clip]:
        return [Clip(**row) for row in self.rows.to_pylist()]

    def select(self, split: str | None = None, camera: str | None = None) -> ClipTable:
        """The clips of a split or camera; a name that selects none is an error naming those there are."""
        rows = self.rows
        for column, wanted in (("split", split), ("camera", camera)):
            if wanted is None:
                continue
            known = sorted(set(rows[column].to_pylist()))
            if wanted not in known:
                raise DataError(
                    f"no clip of {self.name} has {column} {wanted!r}; there are: {', '.join(known)}"
                )
            rows = rows.filter(pc.equal(rows[column], wanted))
        return self.filtered(rows)

    def filtered(self, rows: pa.Table) -> ClipTable:
        """These rows of the table, with the roots and weights of the data sets that are left."""
        left = set(pc.unique(rows["dataset"]).to_pylist()) or set(self.roots)
        return ClipTable(
            rows,
            {name: root for name, root in self.roots.items() if name in left},
            {name: weight for name, weight in self.weights.items() if name in left},
        )

    def only(self, clip_ids: Sequence[str]) -> ClipTable:
        """The clips of these ids, in the table's order."""
        chosen = set(clip_ids)
        return self.filtered(self.rows.filter(pa.array([clip in chosen for clip in self.clip_ids])))

    @cached_property
    def hash(self) -> str:
        """Of every column of every row, and nothing else: moving the data set does not change it."""
        digest = xxhash.xxh3_128()
        for name in SCHEMA.names:
            column = self.rows[name]
            digest.update(f"{name}:{column.type}:{len(column)};".encode())
            for part in _in_one_layout(column):
                digest.update(part)
        return digest.hexdigest()

    @property
    def files_hash(self) -> str:
        """Of the size and the first and last 64 KiB of every file the clips lie in: two data sets whose rows
        are equal, or one whose films were made anew, are told apart. Unreadable files count as such. Taken
        once."""
        return self._files[0]

    @cached_property
    def _files(self) -> tuple[str, np.ndarray]:
        """`files_hash`, and of every row the XXH3-64 of its own file's sample."""
        digest = xxhash.xxh3_128()
        rows = list(zip(self.rows["dataset"].to_pylist(), self.rows["file"].to_pylist(), strict=True))
        each: dict[tuple[str, str], int] = {}
        for dataset, file in sorted(set(rows)):
            sample = sample_of(self.roots[dataset] / file)
            digest.update(file.encode() + sample)
            each[dataset, file] = xxhash.xxh3_64_intdigest(sample)
        return digest.hexdigest(), np.array([each[row] for row in rows], np.uint64)

    @property
    def file_samples(self) -> np.ndarray:
        """Of every row a number that is the same for files of the same size and ends, under whatever name; 0
        for a file that cannot be read."""
        samples = self._files[1]
        return np.where(samples == xxhash.xxh3_64_intdigest(UNREADABLE), np.uint64(0), samples)

    def changed_file(self, clip_ids: Sequence[str]) -> Path | None:
        """The first file of these clips, looked at anew, that is another one than `files_hash` was taken of.
        One that cannot be read now is none: nobody has seen others' pixels in it."""
        seen: dict[Path, int] = {}
        for clip_id in clip_ids:
            clip = self.clip(clip_id)
            seen.setdefault(self.roots[clip.dataset] / clip.file, int(self._files[1][self._row_of[clip_id]]))
        for path, before in seen.items():
            sample = sample_of(path)
            if sample != UNREADABLE and xxhash.xxh3_64_intdigest(sample) != before:
                return path
        return None

    def video(self, clip: Clip) -> Path:
        """The clip's file; a path that leaves the root is refused (links set within the root may)."""
        root = os.path.normpath(self.roots[clip.dataset].absolute())
        path = Path(os.path.normpath(Path(root) / clip.file))
        if not path.is_relative_to(root):
            raise DataError(f"clip {clip.clip_id!r}: file {clip.file!r} leaves the data set's root {root}")
        return path


def _in_one_layout(column: pa.ChunkedArray) -> Iterator[memoryview]:
    """A column's values as bytes that do not depend on how Arrow has cut it: lengths and UTF-8 of texts,
    little-endian numbers, a byte a truth value."""
    is_text = pa.types.is_string(column.type)
    if is_text:
        yield from (np.asarray(pc.binary_length(chunk)).astype("<i8").data for chunk in column.chunks)
    for chunk in column.chunks:
        if is_text:
            # A slice of an array has the whole's text behind it.
            _, offsets, text = chunk.buffers()
            if text is not None:
                ends = np.frombuffer(offsets, np.int32)[chunk.offset :]
                yield memoryview(text)[int(ends[0]) : int(ends[len(chunk)])]
        elif pa.types.is_boolean(column.type):
            yield np.asarray(chunk.cast(pa.uint8())).data
        else:
            yield np.asarray(chunk).astype(f"<{'f' if pa.types.is_floating(column.type) else 'i'}8").data


def sample_of(path: Path) -> bytes:
    """A file's size with its first and last 64 KiB; `UNREADABLE` where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(SAMPLED_BYTES)
            file.seek(max(size - SAMPLED_BYTES, 0))
            return str(size).encode() + head + file.read(SAMPLED_BYTES)
    except OSError:
        return UNREADABLE


def _places(said: str, datasets: Sequence[str], path: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Roots and weights as the file's metadata state them, for every data set that its rows name."""
    try:
        places = json.loads(said)
        roots = {name: Path(places["roots"][name]) for name in datasets}
        weights = {str(name): float(weight) for name, weight in places["weights"].items()}
        if not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError("a weight that is none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} does not say where its videos lie; make it with `salt-vla data index`"
        ) from error
    return roots, weights


def _write(rows: pa.Table, path: Path) -> None:
    pq.write_table(rows, path, write_page_checksum=True)


def _as_schema(rows: pa.Table, path: Path) -> pa.Table:
    """The known columns in their types, without gaps."""
    columns = []
    for field in SCHEMA:
        try:
            column = rows[field.name].cast(field.type)
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {field.name} is not {field.type}: {error}") from error
        if column.null_count:
            raise DataError(f"{path}: column {field.name} has {column.null_count} empty value(s)")
        columns.append(column)
    return pa.table(columns, schema=SCHEMA)
