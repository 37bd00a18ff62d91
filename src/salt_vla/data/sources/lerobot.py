"""LeRobotDataset, versions 2 and 3: each episode as each camera filmed it, from a folder or a hub id.

Knows the layout through `lerobot_meta`; the films themselves are opened elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import is_file
from salt_vla.data.sources.lerobot_meta import INFO, LeRobotMeta, read_meta
from salt_vla.errors import DataError
from salt_vla.hub import is_hub_id, local_folder

TABLES = ("meta/*.json", "meta/*.jsonl", "meta/*.parquet", "data/*.parquet")


def recognises(path: Path) -> bool:
    return is_file(path / INFO)


def segments(root: Path, options: SourceOptions) -> Listing:
    """An episode as one camera saw it is a segment: key data set / episode / camera.

    Where there is no folder `root`, it is a hub id; only the films of the chosen cameras are fetched.
    """
    name = root.name if not root.is_dir() else root.resolve().name
    folder = root if root.is_dir() or not is_hub_id(str(root)) else _fetch(root, options)
    meta = read_meta(folder)
    _refuse_without_films(meta, options.cameras)
    dataset = options.dataset or name
    found: list[Segment] = []
    problems: list[Problem] = []
    for episode in meta.episodes:
        for camera in options.cameras or meta.cameras:
            segment = _segment(meta, dataset, episode, camera)
            if missing := meta.missing_frames(episode, camera):
                reason = f"film too short: it lacks {missing} of the {segment.frames} frames of the episode"
                problems.append(Problem(segment.key, segment.file, reason))
            else:
                found.append(segment)
    return Listing(dataset, "lerobot", folder, tuple(found), tuple(problems))


def _fetch(name: Path, options: SourceOptions) -> Path:
    films = tuple(f"videos/*{camera}/*.mp4" for camera in options.cameras) or ("videos/*.mp4",)
    return local_folder(str(name), "dataset", options.revision or None, TABLES + films)


def _refuse_without_films(meta: LeRobotMeta, wanted: tuple[str, ...]) -> None:
    images = meta.features("image")
    said = f"{', '.join(images)} are kept as single images, which are not read here; convert them to video"
    for camera in wanted:
        if camera in images:
            raise DataError(f"{meta.root}: {said} with lerobot's tool")
        if camera not in meta.cameras:
            raise DataError(f"{meta.root} has no camera {camera!r}; it has: {', '.join(meta.cameras)}")
    if not meta.cameras:
        why = f"; {said}" if images else ", so there is nothing to see"
        raise DataError(f"{meta.root}/{INFO}: no feature has dtype 'video'{why}")


def _segment(meta: LeRobotMeta, dataset: str, episode: dict[str, Any], camera: str) -> Segment:
    number = int(episode["episode_index"])
    file, first_frame = meta.film(episode, camera)
    return Segment(
        key=f"{dataset}/{number:06d}/{camera}",
        file=file,
        group=f"{dataset}/{number:06d}",
        split=meta.split_of(number),
        label=_task(meta.field(episode, "tasks")),
        camera=camera,
        first_frame=first_frame,
        frames=int(meta.number(episode, "length")),
        fps=meta.fps,
        episode=number,
    )


def _task(said: Any) -> str:
    """The first of an episode's tasks."""
    if isinstance(said, list):
        return str(said[0]) if said else ""
    return str(said)
