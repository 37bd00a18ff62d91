"""UCF101: class folders of films, and the published lists of one of its three splits.

Knows the layout as published (docs/sources.md); which films are bad is found by measuring them.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import is_folder, noting, read_text, video_files
from salt_vla.errors import DataError

LISTS = "ucfTrainTestlist"
# The lists are train and test; nothing is held out beside the test list, and it is what figures are given on.
SPLITS = {"trainlist": "train", "testlist": "validation"}
DEFAULT_SPLIT = 1
GROUP = re.compile(r"_(g\d+)_c\d+$")


def recognises(path: Path) -> bool:
    return is_folder(path) and _lists_folder(path) is not None


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every film of the first split's lists is a segment: key ucf101 / its name. Films of one group (`g07`:
    cut from one recording) stay together. Listed films without a file are problems; others are counted."""
    if not is_folder(root):
        raise DataError(f"{root} is not a folder; give the one that holds the class folders and {LISTS}")
    lists = _lists_folder(root)
    if lists is None:
        raise DataError(f"{root} holds no trainlist{DEFAULT_SPLIT:02d}.txt, nor does {LISTS} in it")
    dataset = options.dataset or "ucf101"
    problems: list[Problem] = []
    # The films lie in class folders, those in the root or below one more folder (UCF-101): names are unique.
    files = {file.stem: file for file in video_files(root, noting(problems, dataset, root))}
    place = min(files.values(), default=PurePosixPath("a/b")).parent.parent  # where missing ones would be
    found = []
    for name, split in SPLITS.items():
        path = lists / f"{name}{DEFAULT_SPLIT:02d}.txt"
        for entry in _entries(path):
            key = f"{dataset}/{entry.stem}"
            if entry.stem not in files:
                problems.append(
                    Problem(key, str(place / entry), f"missing: listed in {path.name} but not there")
                )
                continue
            label = entry.parent.name
            recording = GROUP.search(entry.stem)
            group = f"{dataset}/{label}/{recording[1] if recording else entry.stem}"
            found.append(Segment(key, str(files[entry.stem]), group=group, split=split, label=label))
    if not found:
        why = f"; {problems[0].file}: {problems[0].reason}" if problems else ""
        raise DataError(f"{lists} lists no film that is there{why}")
    listed = {segment.key.rpartition("/")[2] for segment in found}
    return Listing(dataset, "ucf101", root, tuple(found), tuple(problems), len(files.keys() - listed))


def _lists_folder(root: Path) -> Path | None:
    name = f"trainlist{DEFAULT_SPLIT:02d}.txt"
    return next((folder for folder in (root, root / LISTS) if (folder / name).is_file()), None)


def _entries(path: Path) -> list[PurePosixPath]:
    """Class/film of every line; training lists add the class' number."""
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        entry = PurePosixPath(line.split()[0])
        if len(entry.parts) != 2:
            raise DataError(f"{path}, line {number}, is not class/film.avi: {line.strip()!r:.80}")
        entries.append(entry)
    return entries
