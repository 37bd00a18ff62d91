"""Writes episodes as a LeRobotDataset v3.0 directory, which appears at its place whole or not at all.

Owns the layout on disk: tables, video files that several episodes share, statistics. Must not know where
the episodes come from.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.data.lerobot_statistics import FeatureStatistics, merge_statistics, summarise
from salt_vla.data.video_writer import EpisodeVideoFile
from salt_vla.errors import ConfigError, DataError, ResourceError

CODEBASE_VERSION = "v3.0"
CHUNKS_SIZE = 1000
DATA_FILES_SIZE_IN_MB = 100
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
ROWS_PER_GROUP = 8192
MEGABYTE = 1024 * 1024
CURABLE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

ARROW_TYPES = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}


@dataclass(frozen=True)
class Feature:
    """A column of the data table, one value a frame: `shape` (1,) is stored as a scalar."""

    dtype: str
    shape: tuple[int, ...] = (1,)
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ARROW_TYPES or len(self.shape) != 1:
            raise ConfigError(
                f"A feature is a vector of {', '.join(ARROW_TYPES)}, not {self.dtype} of shape {self.shape}."
            )

    def arrow_type(self) -> pa.DataType:
        item = ARROW_TYPES[self.dtype]
        return item if self.shape == (1,) else pa.list_(item, self.shape[0])

    def to_json(self) -> dict[str, Any]:
        names = None if self.names is None else list(self.names)
        return {"dtype": self.dtype, "shape": list(self.shape), "names": names}


INDEX_FEATURES = {
    "timestamp": Feature("float32"),
    "frame_index": Feature("int64"),
    "episode_index": Feature("int64"),
    "index": Feature("int64"),
    "task_index": Feature("int64"),
}


@dataclass(frozen=True)
class DatasetLayout:
    """What every episode of a data set has in common. `image_shape` is (height, width)."""

    fps: int
    features: Mapping[str, Feature]
    cameras: tuple[str, ...]
    image_shape: tuple[int, int]
    robot_type: str
    video_files_size_in_mb: int = 200
    video_crf: int = 26
    extra_info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ConfigError(f"fps is {self.fps}; it must be at least 1.")
        if self.video_files_size_in_mb < 1:
            raise ConfigError(f"video_files_size_in_mb is {self.video_files_size_in_mb}; the least is 1.")
        if any(side < 2 or side % 2 for side in self.image_shape):
            raise ConfigError(f"Images of {self.image_shape} cannot be filmed as yuv420p; use even sides.")
        if reserved := set(self.features) & (set(INDEX_FEATURES) | set(self.cameras)):
            raise ConfigError(f"The layout itself writes {sorted(reserved)}; give your features other names.")


@dataclass(frozen=True)
class Episode:
    """One episode: `columns` hold (frames, *feature shape), `films` uint8 (frames, height, width, 3)."""

    task: str
    columns: Mapping[str, np.ndarray]
    films: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def writing_dataset(target: Path, layout: DatasetLayout) -> Iterator[DatasetWriter]:
    """Yield a writer; on a clean exit the data set is at `target`, on any other there is nothing there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists and is not empty; choose another folder or remove it.")
    partial = target.parent / f".{target.name}.partial"
    try:
        # A leftover can only be that of a run that was killed: it was never a data set.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _removed_on_failure(partial):
            writer = DatasetWriter(partial, layout)
            try:
                yield writer
                writer.finish()
            finally:
                writer.close()
            partial.rename(target)
    except OSError as error:
        if error.errno not in CURABLE_ERRORS:
            raise
        raise ResourceError(
            f"Cannot write the data set {target}: {error.strerror}; free some space or choose another folder."
        ) from error


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class DatasetWriter:
    """Takes episodes in order. Made by `writing_dataset`, which moves its folder into place."""

    def __init__(self, folder: Path, layout: DatasetLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._features = {**layout.features, **INDEX_FEATURES}
        self._data = _DataTable(folder, self._features)
        self._films = {key: _RollingFilm(folder, key, layout) for key in layout.cameras}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._metadata_names: set[str] | None = None
        self._statistics: dict[str, list[FeatureStatistics]] = {}
        self._split_starts: dict[str, int] = {}
        self._frames = 0

    def start_split(self, name: str) -> None:
        """The episodes added from here on belong to this split."""
        self._split_starts[name] = len(self._episodes)

    def add_episode(self, episode: Episode) -> None:
        length = self._checked_length(episode)
        number = len(self._episodes)
        columns = {key: np.asarray(episode.columns[key]) for key in self._layout.features}
        task_index = self._tasks.setdefault(episode.task, len(self._tasks))
        frame_index = np.arange(length)
        columns["timestamp"] = (frame_index / self._layout.fps).astype(np.float32)
        columns["frame_index"] = frame_index
        columns["episode_index"] = np.full(length, number)
        columns["index"] = self._frames + frame_index
        columns["task_index"] = np.full(length, task_index)

        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.task], "length": length}
        row |= self._data.append(columns, length)
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        for key, film in self._films.items():
            row |= film.append(episode.films[key])
        for key, values in {**columns, **{key: episode.films[key] for key in self._films}}.items():
            statistics = summarise(values)
            self._statistics.setdefault(key, []).append(statistics)
            row |= {f"stats/{key}/{name}": value for name, value in statistics.to_json().items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.append(row | dict(episode.metadata))
        self._metadata_names = set(episode.metadata)
        self._frames += length

    def finish(self) -> None:
        """Write the tables that describe the whole."""
        if not self._episodes:
            raise DataError("A data set without episodes cannot be written.")
        self.close()
        meta = self._folder / "meta"
        episodes_path = self._folder / EPISODES_PATH
        episodes_path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes_path, compression="zstd")
        pq.write_table(_tasks_table(self._tasks), meta / "tasks.parquet")
        statistics = {key: merge_statistics(parts).to_json() for key, parts in self._statistics.items()}
        _write_json(meta / "stats.json", statistics)
        _write_json(meta / "info.json", self._info())

    def close(self) -> None:
        """Close the open files; closing twice does nothing."""
        self._data.close()
        for film in self._films.values():
            film.close()

    def _checked_length(self, episode: Episode) -> int:
        number = len(self._episodes)
        names = set(episode.metadata)
        if differing := names ^ (names if self._metadata_names is None else self._metadata_names):
            raise DataError(
                f"Episode {number} and episode 0 do not both have the metadata {sorted(differing)}."
            )
        lengths = {}
        for key, feature in self._layout.features.items():
            if key not in episode.columns:
                raise DataError(f"Episode {number} lacks the column {key}.")
            values = np.asarray(episode.columns[key])
            wanted = (len(values), *(() if feature.shape == (1,) else feature.shape))
            if values.shape != wanted:
                raise DataError(f"Column {key} of episode {number} has shape {values.shape}, not {wanted}.")
            if not np.isfinite(values).all():
                raise DataError(f"Column {key} of episode {number} holds values that are not finite.")
            lengths[key] = len(values)
        for key in self._layout.cameras:
            if key not in episode.films:
                raise DataError(f"Episode {number} lacks the film of {key}.")
            film = episode.films[key]
            if film.dtype != np.uint8 or film.shape[1:] != (*self._layout.image_shape, 3):
                raise DataError(f"The film {key} of episode {number} is {film.dtype} of shape {film.shape}.")
            lengths[key] = len(film)
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"Episode {number} has columns and films of different or no length: {lengths}.")
        return next(iter(lengths.values()))

    def _info(self) -> dict[str, Any]:
        layout = self._layout
        split_starts = self._split_starts or {"train": 0}
        ends = [*split_starts.values(), len(self._episodes)][1:]
        splits = {
            name: f"{start}:{end}" for (name, start), end in zip(split_starts.items(), ends, strict=True)
        }
        features = {key: feature.to_json() for key, feature in layout.features.items()}
        features |= {key: _camera_json(layout) for key in layout.cameras}
        features |= {key: feature.to_json() for key, feature in INDEX_FEATURES.items()}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": layout.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": DATA_FILES_SIZE_IN_MB,
            "video_files_size_in_mb": layout.video_files_size_in_mb,
            "fps": layout.fps,
            "splits": splits,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if layout.cameras else None,
            "features": features,
            **layout.extra_info,
        }


class _DataTable:
    """The frames' table, in files of at most about `DATA_FILES_SIZE_IN_MB`."""

    def __init__(self, folder: Path, features: Mapping[str, Feature]) -> None:
        self._folder = folder
        self._schema = pa.schema([(key, feature.arrow_type()) for key, feature in features.items()])
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._file_number = 0
        self._open: pq.ParquetWriter | None = None
        self._path = folder

    def append(self, columns: Mapping[str, np.ndarray], length: int) -> dict[str, Any]:
        if self._open is None:
            self._path = self._folder / _numbered(DATA_PATH, self._file_number)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        place = _place("data", self._file_number)
        arrays = [_arrow_array(columns[name.name], name.type) for name in self._schema]
        self._pending.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._pending_rows += length
        if self._pending_rows >= ROWS_PER_GROUP:
            self._flush()
            if self._path.stat().st_size >= DATA_FILES_SIZE_IN_MB * MEGABYTE:
                self.close()
        return place

    def _flush(self) -> None:
        if self._pending and self._open is not None:
            self._open.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending, self._pending_rows = [], 0

    def close(self) -> None:
        if self._open is not None:
            self._flush()
            self._open.close()
            self._open = None
            self._file_number += 1


class _RollingFilm:
    """One camera's video files; a new one begins when the next episode would probably not fit."""

    def __init__(self, folder: Path, key: str, layout: DatasetLayout) -> None:
        self._folder = folder
        self._key = key
        self._layout = layout
        self._file_number = 0
        self._open: EpisodeVideoFile | None = None
        self._largest_episode = 0

    def append(self, film: np.ndarray) -> dict[str, Any]:
        if self._open is None:
            path = self._folder / _numbered(VIDEO_PATH, self._file_number, video_key=self._key)
            path.parent.mkdir(parents=True, exist_ok=True)
            layout = self._layout
            self._open = EpisodeVideoFile(path, layout.fps, layout.image_shape, layout.video_crf)
        prefix = f"videos/{self._key}"
        before = self._open.encoded_bytes
        first, last = self._open.append(film)
        place = _place(prefix, self._file_number)
        place |= {f"{prefix}/from_timestamp": first, f"{prefix}/to_timestamp": last}
        self._largest_episode = max(self._largest_episode, self._open.encoded_bytes - before)
        if self._open.encoded_bytes + self._largest_episode > self._layout.video_files_size_in_mb * MEGABYTE:
            self.close()
        return place

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
            self._file_number += 1


def _place(prefix: str, file_number: int) -> dict[str, Any]:
    chunk, file = divmod(file_number, CHUNKS_SIZE)
    return {f"{prefix}/chunk_index": chunk, f"{prefix}/file_index": file}


def _numbered(template: str, file_number: int, **names: str) -> str:
    chunk, file = divmod(file_number, CHUNKS_SIZE)
    return template.format(chunk_index=chunk, file_index=file, **names)


def _arrow_array(values: np.ndarray, arrow_type: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(arrow_type):
        flat = pa.array(values.ravel(), type=arrow_type.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, arrow_type.list_size)
    return pa.array(values, type=arrow_type)


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """The table that pandas reads as a frame whose index is the task; pandas itself is not needed."""
    column = {"metadata": None, "field_name": "task_index", "name": "task_index"}
    index = {"metadata": None, "field_name": "task", "name": "task"}
    description = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {**column, "pandas_type": "int64", "numpy_type": "int64"},
            {**index, "pandas_type": "unicode", "numpy_type": "object"},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    numbers = pa.array(tasks.values(), pa.int64())
    table = pa.table({"task_index": numbers, "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(description)})


def _camera_json(layout: DatasetLayout) -> dict[str, Any]:
    height, width = layout.image_shape
    video = {"video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
    video |= {"video.is_depth_map": False, "video.fps": layout.fps, "video.channels": 3, "has_audio": False}
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": video,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
