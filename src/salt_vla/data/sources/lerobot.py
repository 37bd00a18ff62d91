"""LeRobotDataset v3: Parquet tables beside video files that hold several episodes each.

Reads the layout directly (the package `lerobot` is not needed) and uses the templates in `meta/info.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.signals import ClipSignals
from salt_vla.data.view_lock import clip_span
from salt_vla.errors import DataError


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
            first, last = (int(end) for end in span.split(":"))
            if first <= episode < last:
                return str(name)
        raise DataError(f"{self.root}/meta/info.json: no split holds episode {episode}; `splits` must cover all")


def read_meta(root: Path) -> LeRobotMeta:
    """Read `meta/`. Raises `DataError` naming the file and field that is missing or of another version."""
    info_file = root / "meta" / "info.json"
    if not info_file.is_file():
        raise DataError(f"{root} is not a LeRobot data set: {info_file} is missing")
    try:
        info = json.loads(info_file.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{info_file} is not valid JSON: {error}") from error
    for name in ("codebase_version", "fps", "features", "splits", "data_path", "video_path"):
        if name not in info:
            raise DataError(f"{info_file} lacks the field {name!r}")
    if info["codebase_version"] != "v3.0":
        raise DataError(f"{info_file}: version {info['codebase_version']!r} is not v3.0; convert it with lerobot's tool")
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(f"{root}/meta/episodes holds no Parquet file")
    rows = pa.concat_tables([pq.read_table(file) for file in files], promote_options="default").to_pylist()
    return LeRobotMeta(root, info, sorted(rows, key=lambda row: row["episode_index"]))


def index(
    root: Path,
    num_frames: int,
    frame_stride: int,
    hop: int = 16,
    cameras: tuple[str, ...] = (),
) -> ClipTable:
    """Clips every `hop` frames of every episode and camera (all of them unless `cameras` names some).

    A clip's id is data set / episode / camera / start frame in the episode. Episodes shorter than one clip
    give none.
    """
    meta = read_meta(root)
    wanted = cameras or tuple(meta.cameras)
    for camera in wanted:
        if camera not in meta.cameras:
            raise DataError(f"{root} has no camera {camera!r}; it has: {', '.join(meta.cameras)}")
    span = clip_span(num_frames, frame_stride)
    clips = []
    for episode in meta.episodes:
        for camera in wanted:
            clips += _episode_clips(meta, episode, camera, span, hop)
    if not clips:
        raise DataError(f"{root}: no episode is as long as one clip ({span} frames)")
    return ClipTable.from_clips(clips, root)


def _episode_clips(meta: LeRobotMeta, episode: dict[str, Any], camera: str, span: int, hop: int) -> list[Clip]:
    number, length = int(episode["episode_index"]), int(episode["length"])
    file = meta.info["video_path"].format(
        video_key=camera,
        chunk_index=episode[f"videos/{camera}/chunk_index"],
        file_index=episode[f"videos/{camera}/file_index"],
    )
    first = round(float(episode[f"videos/{camera}/from_timestamp"]) * meta.fps)
    return [
        Clip(
            clip_id=f"{meta.root.resolve().name}/{number:06d}/{camera}/{start:06d}",
            source="lerobot",
            file=file,
            first_frame=first + start,
            episode=number,
            episode_first_frame=first,
            episode_frames=length,
            camera=camera,
            label=str(episode["tasks"][0]),
            fps=meta.fps,
            split=meta.split_of(number),
        )
        for start in range(0, length - span + 1, hop)
    ]


def read_signals(table: ClipTable, num_frames: int, frame_stride: int, names: tuple[str, ...] = ()) -> ClipSignals:
    """The numeric features of each clip's frames (view 0), from the data Parquet files.

    `names`: features to read; by default every one-dimensional float feature the data set has.
    """
    meta = read_meta(table.root)
    if not names:
        names = tuple(
            key
            for key, feature in meta.info["features"].items()
            if feature["dtype"].startswith("float") and key != "timestamp"
        )
    rows = pads.dataset(str(table.root / "data"), format="parquet").to_table(
        columns=[*names, "episode_index", "frame_index"]
    )
    order = np.lexsort((rows["frame_index"].to_numpy(), rows["episode_index"].to_numpy()))
    first_row = _first_rows(rows["episode_index"].to_numpy()[order])
    span = clip_span(num_frames, frame_stride)
    clips = table.clips()
    starts = [first_row[clip.episode] + clip.start_in_episode for clip in clips]
    at = order[np.array(starts)[:, None] + np.arange(span)]
    values = {name: _matrix(rows[name])[at] for name in names}
    return ClipSignals(
        clip_ids=tuple(clip.clip_id for clip in clips),
        episodes=np.array([clip.episode for clip in clips], dtype=np.int64),
        tasks=tuple(clip.label for clip in clips),
        fps=meta.fps,
        signals=values,
    )


def _first_rows(episodes: np.ndarray) -> dict[int, int]:
    numbers, first = np.unique(episodes, return_index=True)
    return dict(zip(numbers.tolist(), first.tolist(), strict=True))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, dims) float32 from a column of scalars or of lists of one length."""
    flat = column.combine_chunks()
    if pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        return flat.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(flat), -1)
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(flat), 1)
