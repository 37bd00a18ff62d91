"""Kinetics: trimmed films `<id>_<start>_<end>.mp4` in any folders, and annotation lists in CSV.

Knows the layout as published (docs/sources.md); which films are bad is found by measuring them.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import SPLIT_NAMES, begins_with, is_folder, noting, read_csv, video_files
from salt_vla.errors import DataError

COLUMNS = ("youtube_id", "time_start", "time_end", "split")
# How a list begins: those of some editions' test films have no labels.
HEADERS = (",".join(("label", *COLUMNS)), ",".join(COLUMNS))
FOLDERS = (".", "annotations")


def recognises(path: Path) -> bool:
    return is_folder(path) and bool(_lists(path))


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every listed stretch is a segment: key kinetics / `<id>_<start>_<end>`. Stretches of one film stay
    together. Listed ones without a file are problems; films of no list are counted."""
    lists = _lists(root) if is_folder(root) else []
    if not lists:
        raise DataError(f"{root} holds no list of Kinetics (a .csv that begins with {HEADERS[0]})")
    dataset = options.dataset or "kinetics"
    problems: list[Problem] = []
    files = {file.stem: file for file in video_files(root, noting(problems, dataset, root))}
    place = min(files.values(), default=PurePosixPath("a")).parent  # where one that is missing would be
    found: list[Segment] = []
    for path in lists:
        for number, row in read_csv(path, COLUMNS):
            name = _film(row, f"{path}, line {number}")
            key, split = f"{dataset}/{name}", row["split"].strip().lower()
            if name not in files:
                why = f"missing: listed in {path.name} but not there"
                problems.append(Problem(key, str(place / f"{name}.mp4"), why))
                continue
            found.append(
                Segment(
                    key,
                    str(files[name]),
                    group=f"{dataset}/{row['youtube_id'].strip()}",
                    split="validation" if split == "validate" else SPLIT_NAMES.get(split, split),
                    label=row.get("label", "").strip(),
                )
            )
    if not found:
        raise DataError(f"{root} holds none of the films that its lists name, {problems[0].file} for one")
    listed = {segment.key.rpartition("/")[2] for segment in found}
    return Listing(dataset, "kinetics", root, tuple(found), tuple(problems), len(files.keys() - listed))


def _lists(root: Path) -> list[Path]:
    """In the folder and in its `annotations`, in a fixed order."""
    folders = [root / name for name in FOLDERS if is_folder(root / name)]
    return [
        path
        for folder in folders
        for path in sorted(folder.glob("*.csv"))
        if any(begins_with(path, header) for header in HEADERS)
    ]


def _film(row: dict[str, str], where: str) -> str:
    """What the stretch's file is called: seconds of the original as six digits."""
    numbers = []
    for name in ("time_start", "time_end"):
        try:
            seconds = float(row[name])
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < 1e6:
            raise DataError(f"{where}: {name} is {row[name]!r:.60}, not a number of seconds")
        numbers.append(f"{int(seconds):06d}")
    return "_".join((row["youtube_id"].strip(), *numbers))
