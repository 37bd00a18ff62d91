"""Actions and states beside a LeRobot data set's films: rows of its data tables, joined to clips by time.

Knows the data tables; opens no film.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import xxhash

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable, sample_of
from salt_vla.data.sampling import clip_span
from salt_vla.data.signals import ClipSignals, Recordings
from salt_vla.data.sources.files import is_inside
from salt_vla.data.sources.lerobot_meta import LeRobotMeta, read_meta
from salt_vla.errors import DataError

DATA = "data"
PLACE = ("episode_index", "frame_index", "timestamp")
TOLERANCE = 0.1  # of a frame's time, between a row's timestamp and its frame's


def read_signals(
    table: ClipTable, num_frames: int, view: ViewConfig, names: tuple[str, ...] = ()
) -> ClipSignals:
    """The numeric features of each clip's frames (view 0), from the data Parquet files.

    `names`: features to read; by default every one-dimensional float feature the data set has. Raises
    `DataError` when a feature, or a frame of a clip, is not there or was taken at another time than its frame
    was filmed, and for clips that span whole episodes.
    """
    if view.sampling == "uniform":
        raise DataError(
            "signals belong to clips of one length; data.view.sampling 'uniform' has none: use stride or fps"
        )
    meta = read_meta(table.root)
    known = _vectors(meta, ("float",))
    for name in names:
        if name not in known:
            raise DataError(f"{table.root} has no vector of floats {name!r}; it has: {', '.join(known)}")
    clips = table.clips()
    rows = _data_rows(meta, names or known, {clip.episode for clip in clips})
    at = _rows_of(clips, rows, clip_span(view, num_frames, meta.fps, 0), meta)
    return ClipSignals(
        clip_ids=tuple(clip.clip_id for clip in clips),
        episodes=np.array([clip.episode for clip in clips], dtype=np.int64),
        tasks=tuple(clip.label for clip in clips),
        fps=meta.fps,
        signals={name: _matrix(rows, name, meta)[at] for name in names or known},
    )


def recorded_hash(table: ClipTable) -> str:
    """Of the name, size and ends of every data Parquet file; its end holds each column's extremes."""
    digest = xxhash.xxh3_128()
    for root in table.roots.values():
        for file in sorted((root / DATA).rglob("*.parquet")):
            digest.update(file.relative_to(root).as_posix().encode() + sample_of(file))
    return digest.hexdigest()


def read_recordings(table: ClipTable) -> Recordings:
    """Every vector of floats or truth values of the clips' episodes, whole, in the order of their frames.

    Raises `DataError` when a row is missing, or was taken at another time than its frame was filmed.
    """
    meta = read_meta(table.root)
    names = _vectors(meta, ("float", "bool"))
    clips = {clip.episode: clip for clip in table.clips()}
    rows = _data_rows(meta, names, set(clips))
    ordered = sorted(clips)
    lengths = [clips[episode].episode_frames for episode in ordered]
    episodes, frames = np.repeat(ordered, lengths), np.concatenate([np.arange(n) for n in lengths])
    at = _rows_at(episodes, frames, rows, meta)
    if (at < 0).any():
        first = int(np.argmax(at < 0))
        raise DataError(
            f"{meta.root}: the data tables lack frame {frames[first]} of episode {episodes[first]}"
        )
    ends = np.cumsum(lengths)[:-1]
    return Recordings(
        meta.fps,
        {name: _column_names(meta.info["features"][name]) for name in names},
        {
            name: dict(zip(ordered, np.split(_matrix(rows, name, meta)[at], ends), strict=True))
            for name in names
        },
    )


def _column_names(feature: dict[str, Any]) -> tuple[str, ...]:
    """What a feature calls its numbers: a list, or lists by kind (`{"motors": […]}`); empty where neither."""
    said = feature.get("names")
    lists = list(said.values()) if isinstance(said, dict) else [said]
    return tuple(str(name) for names in lists if isinstance(names, list) for name in names)


def _vectors(meta: LeRobotMeta, kinds: tuple[str, ...]) -> tuple[str, ...]:
    features = {key: f for key, f in meta.info["features"].items() if key != "timestamp"}
    return tuple(
        key
        for key, f in features.items()
        if f["dtype"].startswith(kinds)
        and "shape" in f
        and isinstance(f["shape"], list)
        and len(f["shape"]) == 1
    )


def _data_rows(meta: LeRobotMeta, names: tuple[str, ...], episodes: set[int]) -> pa.Table:
    """The rows of `episodes`, from the files that the template in info.json names."""
    wanted = [episode for episode in meta.episodes if episode["episode_index"] in episodes]
    files = sorted({meta.data_file(episode) for episode in wanted})
    if outside := [file for file in files if not is_inside(file)]:
        raise DataError(f"{meta.root}/meta/info.json: data_path {outside[0]!r} leaves the data set's folder")
    columns = [*names, *PLACE]
    try:
        tables = pads.dataset([str(meta.root / file) for file in files], format="parquet")
        missing = [name for name in columns if name not in tables.schema.names]
        if missing:
            raise DataError(f"the data tables of {meta.root} lack the column(s) {', '.join(missing)}")
        wanted_rows = pads.field("episode_index").isin(pa.array(sorted(episodes), pa.int64()))
        rows = tables.to_table(columns=columns, filter=wanted_rows)
        for number, name in enumerate(PLACE, len(names)):
            kind = pa.float64() if name == "timestamp" else pa.int64()
            rows = rows.set_column(number, name, rows[name].cast(kind))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the data tables of {meta.root} cannot be read: {reason}") from error
    if not rows.num_rows:
        raise DataError(f"the data tables of {meta.root} hold no rows of the clips' episodes")
    for name in columns:
        if rows[name].null_count:
            raise DataError(f"the data tables of {meta.root}: column {name} has empty cells")
    return rows


def _rows_of(clips: list[Clip], rows: pa.Table, span: int, meta: LeRobotMeta) -> np.ndarray:
    """(clips, span) row numbers of each clip's frames, from its first to its last."""
    starts = np.array([[clip.episode, clip.start_in_episode, clip.episode_frames] for clip in clips])
    frames = np.minimum(starts[:, 1:2] + np.arange(span), starts[:, 2:] - 1)  # A short one's last is held.
    at = _rows_at(np.broadcast_to(starts[:, :1], frames.shape), frames, rows, meta)
    missing = np.argwhere(at < 0)
    if len(missing):
        row, column = missing[0]
        raise DataError(
            f"{meta.root}: the data tables lack frame {frames[row, column]} of episode {starts[row, 0]}, "
            f"which clip {clips[row].clip_id!r} needs"
        )
    return at


def _rows_at(episodes: np.ndarray, frames: np.ndarray, rows: pa.Table, meta: LeRobotMeta) -> np.ndarray:
    """Row numbers of frames (counted from their episode's first), −1 where there is none.

    A row belongs to the frame shown at its timestamp; that must be the one its frame_index names.
    """
    episode_of, frame_of, time_of = (rows[name].to_numpy() for name in PLACE)
    drift = np.abs(time_of * meta.fps - frame_of)
    if not (drift <= TOLERANCE).all():
        worst = int(np.nanargmax(np.where(np.isfinite(drift), drift, np.inf)))
        raise DataError(
            f"{meta.root}: episode {episode_of[worst]} drifts: its frame {frame_of[worst]} is filmed at "
            f"{frame_of[worst] / meta.fps:.4f} s, but its row was taken at {time_of[worst]:.4f} s"
        )
    order = np.lexsort((frame_of, episode_of))
    numbers, first = np.unique(episode_of[order], return_index=True)
    places = first[np.clip(np.searchsorted(numbers, episodes), 0, len(numbers) - 1)] + frames
    at = order[np.clip(places, 0, len(order) - 1)]
    return np.where((episode_of[at] == episodes) & (frame_of[at] == frames), at, -1)


def _matrix(rows: pa.Table, name: str, meta: LeRobotMeta) -> np.ndarray:
    """(rows, dims) float32 from a column of scalars or of lists of one length."""
    flat = rows[name].combine_chunks()
    if pa.types.is_fixed_size_list(flat.type) or pa.types.is_list(flat.type):
        lengths = sorted(set(flat.value_lengths().to_pylist()))
        flat = flat.flatten()
        if len(lengths) != 1 or flat.null_count:
            raise DataError(
                f"the data tables of {meta.root}: {name} is ragged: its rows have "
                f"{' or '.join(map(str, lengths))} numbers, or empty ones"
            )
    try:
        values = flat.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(f"the data tables of {meta.root}: {name} is no column of numbers: {error}") from error
    return values.reshape(rows.num_rows, -1)
