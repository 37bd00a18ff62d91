"""A folder of videos in any container: train/validation/test folders are splits, the next ones classes.

Knows names only; what a file holds is measured later.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import SPLIT_NAMES, holds_video, is_folder, noting, video_files
from salt_vla.errors import DataError


def recognises(path: Path) -> bool:
    return holds_video(path)


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every video file is a segment: key data set / path. The path keeps its ending: without it a film would
    take another's id when a file of the same name in another container comes or goes."""
    if not is_folder(root):
        raise DataError(f"{root} is not a folder of videos: it is missing, or a file")
    dataset = options.dataset or root.resolve().name
    problems: list[Problem] = []
    found = tuple(_segment(dataset, file) for file in video_files(root, noting(problems, dataset, root)))
    if not found:
        why = f"; {problems[0].file}: {problems[0].reason}" if problems else ""
        raise DataError(f"{root} holds no video file{why}")
    return Listing(dataset, "folder", root, found, tuple(problems))


def _segment(dataset: str, file: PurePosixPath) -> Segment:
    folders = file.parent.parts
    split = SPLIT_NAMES.get(folders[0].lower(), "") if folders else ""
    classes = folders[1:] if split else folders
    key = f"{dataset}/{file}"
    return Segment(key, str(file), group=key, split=split, label=classes[0] if classes else "")
