"""LeRobotDataset v3: Parquet tables beside video files that hold several episodes each.

Reads the layout directly (the package `lerobot` is not needed) and uses the templates in `meta/info.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.sampling import clip_span
from salt_vla.data.segments import Listing, Segment, SourceOptions
from salt_vla.data.signals import ClipSignals
from salt_vla.errors import DataError

_SPAN = re.compile(r"^(\d+):(\d+)$")


@dataclass(frozen=True)
class LeRobotMeta:
    """The facts of `meta/`: info.json as it is, and one row an episode."""

    root: Path
    info: dict[str, Any]
    episodes: list[dict[str, Any]]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        return [key for key, feature in self.info["features"].items() if feature["dtype"] == "video"]

    def split_of(self, episode: int) -> str:
        """From info.json's `splits` ("a:b" ranges of episodes)."""
        for name, span in self.info["splits"].items():
            ends = _SPAN.match(str(span))
            if ends is None:
                raise DataError(
                    f"{self.root}/meta/info.json: split {name!r} is {span!r}, not episodes as in '0:10'"
                )
            if int(ends[1]) <= episode < int(ends[2]):
                return str(name)
        raise DataError(
            f"{self.root}/meta/info.json: no split holds episode {episode}; `splits` must cover all"
        )

    def field(self, episode: dict[str, Any], name: str) -> Any:
        """One value of an episode's row; a missing one is an error that names it."""
        if episode.get(name) is None:
            number = episode["episode_index"]
            raise DataError(f"{self.root}/meta/episodes: episode {number} lacks the field {name!r}")
        return episode[name]

    def file(self, template: str, episode: dict[str, Any], prefix: str, **names: str) -> str:
        """The path that info.json's `template` gives for the chunk and file named under `prefix`."""
        places = {name: self.field(episode, f"{prefix}/{name}") for name in ("chunk_index", "file_index")}
        try:
            return str(self.info[template].format(**places, **names))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            known = ", ".join([*places, *names])
            raise DataError(
                f"{self.root}/meta/info.json: {template} is {self.info[template]!r}; "
                f"it must be a template of {known} ({error})"
            ) from error


def read_meta(root: Path) -> LeRobotMeta:
    """Read `meta/`. Raises `DataError` naming the file and field that is missing or of another version."""
    info = _read_info(root)
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(f"{root}/meta/episodes holds no Parquet file")
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            table = pq.read_table(file, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a Parquet file, or a damaged one: {error}") from error
        if "episode_index" not in table.column_names:
            raise DataError(f"{file} lacks the column 'episode_index'")
        wanted = [name for name in table.column_names if not name.startswith("stats/")]
        rows += table.select(wanted).to_pylist()
    return LeRobotMeta(root, info, sorted(rows, key=lambda row: row["episode_index"]))


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{root} is not a LeRobot data set: {path} is missing")
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(info, dict):
        raise DataError(f"{path} must hold a JSON object")
    for name in ("codebase_version", "fps", "features", "splits", "data_path", "video_path"):
        if name not in info:
            raise DataError(f"{path} lacks the field {name!r}")
    if info["codebase_version"] != "v3.0":
        raise DataError(
            f"{path}: version {info['codebase_version']!r} is not v3.0; convert it with lerobot's tool"
        )
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise DataError(f"{path}: fps is {info['fps']!r}, not a positive number")
    if not isinstance(info["splits"], dict):
        raise DataError(f"{path}: splits is {info['splits']!r}, not an object of name: range")
    features = info["features"]
    if not isinstance(features, dict) or not all(
        isinstance(feature, dict) and isinstance(feature.get("dtype"), str) for feature in features.values()
    ):
        raise DataError(f"{path}: features must be an object of objects, each with a dtype")
    return info


def segments(root: Path, options: SourceOptions) -> Listing:
    """An episode as one camera saw it is a segment: key data set / episode / camera."""
    meta = read_meta(root)
    if not meta.cameras:
        raise DataError(f"{root}/meta/info.json: no feature has dtype 'video', so there is nothing to see")
    for camera in options.cameras:
        if camera not in meta.cameras:
            raise DataError(f"{root} has no camera {camera!r}; it has: {', '.join(meta.cameras)}")
    dataset = options.dataset or root.resolve().name
    return Listing(
        dataset=dataset,
        source="lerobot",
        root=root,
        segments=tuple(
            _segment(meta, dataset, episode, camera)
            for episode in meta.episodes
            for camera in options.cameras or meta.cameras
        ),
    )


def _segment(meta: LeRobotMeta, dataset: str, episode: dict[str, Any], camera: str) -> Segment:
    number = int(episode["episode_index"])
    tasks = meta.field(episode, "tasks")
    from_timestamp = float(meta.field(episode, f"videos/{camera}/from_timestamp"))
    return Segment(
        key=f"{dataset}/{number:06d}/{camera}",
        file=meta.file("video_path", episode, f"videos/{camera}", video_key=camera),
        group=f"{dataset}/{number:06d}",
        split=meta.split_of(number),
        label=str(tasks[0]) if tasks else "",
        camera=camera,
        first_frame=round(from_timestamp * meta.fps),
        frames=int(meta.field(episode, "length")),
        fps=meta.fps,
        episode=number,
    )


def read_signals(
    table: ClipTable, num_frames: int, view: ViewConfig, names: tuple[str, ...] = ()
) -> ClipSignals:
    """The numeric features of each clip's frames (view 0), from the data Parquet files.

    `names`: features to read; by default every one-dimensional float feature the data set has. Raises
    `DataError` when a feature, or a frame of a clip, is not there, and for clips that span whole episodes.
    """
    if view.sampling == "uniform":
        raise DataError(
            "signals belong to clips of one length; data.view.sampling 'uniform' has none: use stride or fps"
        )
    meta = read_meta(table.root)
    known = _float_vectors(meta)
    for name in names:
        if name not in known:
            raise DataError(f"{table.root} has no vector of floats {name!r}; it has: {', '.join(known)}")
    clips = table.clips()
    rows = _data_rows(meta, names or known, {clip.episode for clip in clips})
    at = _rows_of(clips, rows, clip_span(view, num_frames, meta.fps, 0), table.root)
    return ClipSignals(
        clip_ids=tuple(clip.clip_id for clip in clips),
        episodes=np.array([clip.episode for clip in clips], dtype=np.int64),
        tasks=tuple(clip.label for clip in clips),
        fps=meta.fps,
        signals={name: _matrix(rows[name])[at] for name in names or known},
    )


def _float_vectors(meta: LeRobotMeta) -> tuple[str, ...]:
    features = {key: f for key, f in meta.info["features"].items() if key != "timestamp"}
    return tuple(
        key for key, f in features.items() if f["dtype"].startswith("float") and len(f.get("shape", ())) == 1
    )


def _data_rows(meta: LeRobotMeta, names: tuple[str, ...], episodes: set[int]) -> pa.Table:
    """The data files of `episodes`, as the template in info.json places them."""
    wanted = [episode for episode in meta.episodes if episode["episode_index"] in episodes]
    files = {meta.root / meta.file("data_path", episode, "data") for episode in wanted}
    columns = [*names, "episode_index", "frame_index"]
    try:
        tables = pads.dataset([str(file) for file in sorted(files)], format="parquet")
        missing = [name for name in columns if name not in tables.schema.names]
        if missing:
            raise DataError(f"the data tables of {meta.root} lack the column(s) {', '.join(missing)}")
        rows = tables.to_table(columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the data tables of {meta.root} cannot be read: {reason}") from error
    if not rows.num_rows:
        raise DataError(f"the data tables of {meta.root} hold no rows")
    return rows


def _rows_of(clips: list[Clip], rows: pa.Table, span: int, root: Path) -> np.ndarray:
    """(clips, span) row numbers of each clip's frames, from its first to its last."""
    episode_of, frame_of = rows["episode_index"].to_numpy(), rows["frame_index"].to_numpy()
    order = np.lexsort((frame_of, episode_of))
    numbers, first = np.unique(episode_of[order], return_index=True)
    first_row = dict(zip(numbers.tolist(), first.tolist(), strict=True))
    starts = np.array([[clip.episode, clip.start_in_episode] for clip in clips])
    frames = starts[:, 1:] + np.arange(span)
    places = np.array([first_row.get(clip.episode, 0) for clip in clips])[:, None] + frames
    at = order[np.clip(places, 0, len(order) - 1)]
    is_there = (episode_of[at] == starts[:, :1]) & (frame_of[at] == frames)
    if not is_there.all():
        row, column = np.argwhere(~is_there)[0]
        raise DataError(
            f"{root}: the data tables lack frame {frames[row, column]} of episode {starts[row, 0]}, which "
            f"clip {clips[row].clip_id!r} needs"
        )
    return at


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, dims) float32 from a column of scalars or of lists of one length."""
    flat = column.combine_chunks()
    if pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        return flat.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(flat), -1)
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(flat), 1)
