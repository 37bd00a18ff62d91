"""Something-Something V2: numbered webm files, and lists of them with labels for each split.

Knows the layouts that the data set was published in (docs/sources.md); which of its files are bad is found
by measuring them, never by a list.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import is_file, is_folder, read_json
from salt_vla.errors import DataError

SPLITS = ("train", "validation", "test")
PREFIX = "something-something-v2-"  # of the lists' names as first published; later they had none
ENDINGS = (".webm", ".mp4")  # as published; as often re-encoded


def recognises(path: Path) -> bool:
    return is_folder(path) and any(_lists(path))


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every listed video is a segment: key ssv2 / id. Listed ones without a file, missing lists, and how many
    files no list names are problems."""
    if not is_folder(root):
        raise DataError(f"{root} is not a folder; give the one that holds the webm files and the lists")
    lists = _lists(root)
    if not lists:
        raise DataError(
            f"{root} holds no list of Something-Something V2 ({PREFIX}train.json or train.json, also in a "
            "folder of it)"
        )
    dataset = options.dataset or "ssv2"
    problems: list[Problem] = []
    files = _videos(root, dataset, problems)
    place = Path(min(files.values(), default="")).parent  # where one that is missing would be looked for
    found: list[Segment] = []
    for split in SPLITS:
        if split not in lists:
            name = f"{PREFIX}{split}.json"
            problems.append(Problem(f"{dataset}/{name}", name, f"list missing: no clips of split {split!r}"))
            continue
        for number, entry in enumerate(read_json(lists[split], list)):
            video = _id(entry, number, lists[split])
            key = f"{dataset}/{video}"
            if video in files:
                found.append(Segment(key, files[video], group=key, split=split, label=_label(entry)))
            else:
                where = lists[split].name
                problems.append(
                    Problem(key, str(place / f"{video}.webm"), f"missing: listed in {where} but not there")
                )
    unlisted = len(files.keys() - {segment.key.rpartition("/")[2] for segment in found})
    return Listing(dataset, "ssv2", root, tuple(found), tuple(problems), unlisted)


def _folders(root: Path) -> list[Path]:
    """The root and the folders in it, in a fixed order."""
    with os.scandir(root) as entries:  # Its answers need no look at each of the many files.
        below = [
            entry.path
            for entry in entries
            if entry.name[0] != "."
            and (entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_folder(entry.path)))
        ]
    return [root, *map(Path, sorted(below))]


def _lists(root: Path) -> dict[str, Path]:
    """Split → its list. Bare names count only beside a labels.json: any project has a train.json."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        prefixes = [PREFIX] + ([""] if is_file(folder / "labels.json") else [])
        for prefix in prefixes:
            for split in SPLITS:
                path = folder / f"{prefix}{split}.json"
                if is_file(path):
                    found.setdefault(split, path)
    return found


def _videos(root: Path, dataset: str, problems: list[Problem]) -> dict[str, str]:
    """Id → file, relative to the root; webm before other containers of the same id. Folders that cannot be
    listed are added to the problems."""
    found: dict[str, dict[str, str]] = {ending: {} for ending in ENDINGS}
    for folder in _folders(root):
        place = "" if folder == root else f"{folder.name}/"
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries]
        except OSError as error:
            reason = f"the folder cannot be listed: {error.strerror}"
            problems.append(Problem(f"{dataset}/{folder.name}", folder.name, reason))
            continue
        for name in names:
            number, dot, ending = name.partition(".")
            if dot + ending in found and number.isdecimal():
                found[dot + ending].setdefault(number, place + name)
    return {number: file for ending in reversed(ENDINGS) for number, file in found[ending].items()}


def _id(entry: Any, number: int, path: Path) -> str:
    """Of a list's entry; a number, as a string in the published lists."""
    said = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(said, str | int) or isinstance(said, bool) or not str(said).isdecimal():
        raise DataError(f"{path}: entry {number} has no id that is a number")
    return str(said)


def _label(entry: dict[str, Any]) -> str:
    """The class: the template without its brackets; empty for test entries, which have an id only."""
    said = entry.get("template") or entry.get("label") or ""
    return str(said).replace("[", "").replace("]", "")
