"""Latents that another program left as one file a clip: which file is of which clip.

Goes by names and metadata.json, and opens none of the files. Knows neither clip tables nor teachers nor our
own format.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from salt_vla.errors import CacheError

METADATA = "metadata.json"
SUFFIXES = (".pt", ".pth", ".npy")
IDS = ("clip_id", "video_id", "id", "key", "name", "video", "clip")
GAPS = 0.05  # share of rows that may be missing from what is still a row of numbers
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})", re.DOTALL)
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, invisible marks, halves of characters, separators

Names = Literal["check", "clip-ids", "rows"]


@dataclass(frozen=True)
class ForeignFolder:
    """A folder of latents, one file a clip. `files`: each file's name as its maker called the clip (what
    `metadata.json` maps it to, else its path without the ending) → the file. `listed`: the clips that
    `metadata.json` lists, in its order. `said`: its single values."""

    folder: Path
    files: Mapping[str, Path]
    listed: tuple[str, ...]
    said: Mapping[str, Any]

    @cached_property
    def rows(self) -> dict[str, int]:
        """The names that are a number behind one prefix → that number; empty unless most names are."""
        matches = {name: match for name in self.files if (match := _NUMBERED.fullmatch(name))}
        prefixes = Counter(match[1] for match in matches.values()).most_common(1)
        if not prefixes or 2 * prefixes[0][1] <= len(self.files):
            return {}
        return {name: int(match[2]) for name, match in matches.items() if match[1] == prefixes[0][0]}

    @cached_property
    def numbered(self) -> bool:
        """Whether most names are the numbers of rows, from 0 or 1 on. A gap here and there, where a clip
        could not be read, and a few other files beside them, make no ids of them."""
        return bool(self.rows) and max(self.rows.values()) <= (1 + GAPS) * len(self.rows)

    def in_order(self, order: Sequence[str]) -> list[str]:
        """The files' names, in `order` where they are in it, else by number or alphabet."""
        places = {name: place for place, name in enumerate(order)}
        return sorted(self.files, key=lambda name: (places.get(name, len(places)), len(name), name))


def look_into(folder: Path) -> ForeignFolder:
    """List a folder's latents. Raises `CacheError` when there are none, or two of one name."""
    if not folder.is_dir():
        raise CacheError(f"there is no folder {folder}; give the one that holds a file a clip")
    paths = _latent_files(folder)
    if not paths:
        raise CacheError(
            f"{folder} holds no latents ({', '.join(SUFFIXES)}); give the folder with a file a clip"
        )
    metadata = _read_metadata(folder / METADATA)
    names = _mapped(metadata, paths)
    files: dict[str, Path] = {}
    for path in paths:
        name = names[path] if path in names else path.rsplit(".", 1)[0]
        if name in files:
            raise CacheError(
                f"{folder} holds two files of clip {name!r}: {files[name].name} and {path}; remove one"
            )
        files[name] = folder / path
    return ForeignFolder(folder, files, _listed(metadata, files), _facts(metadata, {*files, *names, *paths}))


def pair(
    found: ForeignFolder, order: Sequence[str], names: Names, unreadable: Sequence[str] = ()
) -> dict[str, str]:
    """Clip → the name of the file that holds its latents.

    `order`: the clips in the order in which the maker went through them, under the maker's names for them;
    empty when nobody says. `unreadable`: clips that the maker could not read, so that they have no latents.
    With `check`, names that are row numbers or that have evidently shifted are refused with a `CacheError`;
    `clip-ids` takes names as they are; `rows` takes the n-th file for the n-th readable clip of `order`.
    """
    order = found.listed or order
    strangers = sorted(set(unreadable) - set(order))
    if strangers:
        raise CacheError(
            f"--unreadable names {strangers[0]!r}, which is none of the {len(order)} listed clips"
        )
    if names == "rows":
        return _by_row(found, order, unreadable)
    if names == "check":
        known = set(order)
        if found.numbered and not all(name in known for name in found.rows):
            raise CacheError(
                f"the files of {found.folder} are numbered, which does not say which clips they are of: ids "
                "shift by one after every clip that could not be read; state with --names rows that they "
                "follow the order of the list in metadata.json, or else of --data's clip table, or with "
                "--names clip-ids that the numbers are the clips' ids; or map each file to its clip in "
                "metadata.json"
            )
        if not unreadable:
            _refuse_shifted(found, order)
    if unreadable:
        return _moved_back(found, order, unreadable)
    return {name: name for name in found.files}


def _by_row(found: ForeignFolder, order: Sequence[str], unreadable: Sequence[str]) -> dict[str, str]:
    """The n-th file for the n-th readable clip. Numbers must go on without a gap, or leave out exactly the
    rows of the clips that could not be read: any other gap is a lost file, and all after it would shift."""
    left_out = set(unreadable)
    readable = {name: row for row, name in enumerate(order) if name not in left_out}
    files = sorted(found.rows, key=lambda name: (found.rows[name], name)) or found.in_order(())
    if len(readable) != len(files):
        raise _one_too_many_or_too_few(found, len(files), len(order), len(left_out))
    numbers = [found.rows[name] for name in files if name in found.rows]
    steps = [number - numbers[0] for number in numbers]
    rows = list(readable.values())
    if numbers and steps != list(range(len(steps))) and steps != [row - rows[0] for row in rows]:
        gap = next(number for number, step in enumerate(steps) if number != step)
        raise CacheError(
            f"the files of {found.folder} are numbered with a gap or a number twice before {files[gap]!r}, "
            "where no clip is said to be unreadable: a file was lost, or is one too many; restore it, or map "
            "each file to its clip in metadata.json"
        )
    return dict(zip(readable, files, strict=True))


def _moved_back(found: ForeignFolder, order: Sequence[str], unreadable: Sequence[str]) -> dict[str, str]:
    """Names that were counted on past unreadable clips: the n-th name is the n-th readable clip's, whether
    its file is still there or not. Names that leave the unreadable clips out are right as they are."""
    left_out = set(unreadable)
    readable = [name for name in order if name not in left_out]
    named = [name for name in order if name in found.files]
    if readable and readable[-1] in found.files and left_out.isdisjoint(named):
        return {name: name for name in named}
    if not named or named[-1] != order[len(readable) - 1]:
        raise _one_too_many_or_too_few(found, len(named), len(order), len(left_out))
    return {clip: name for clip, name in zip(readable, order, strict=False) if name in found.files}


def _one_too_many_or_too_few(found: ForeignFolder, files: int, listed: int, unreadable: int) -> CacheError:
    return CacheError(
        f"{found.folder} holds {files} files for {listed - unreadable} readable clips ({listed} listed, "
        f"{unreadable} unreadable): one too many or too few, and ids shift by one from there on; name every "
        "clip that could not be read with --unreadable"
    )


def _refuse_shifted(found: ForeignFolder, order: Sequence[str]) -> None:
    """The trace of a loop that left out unreadable clips but went on counting names: what is missing is the
    end of the list. Files of other names, and some that were lost since, do not cover it."""
    missing = [place for place, name in enumerate(order) if name not in found.files]
    if not missing or len(missing) == len(order):
        return
    at_end = [place for place in missing if place >= len(order) - len(missing) - len(missing) // 2]
    if 2 * len(at_end) > len(missing) or order[-1] not in found.files:
        raise CacheError(
            f"{found.folder}: of {len(order)} listed clips {len(missing)} have no file, {len(at_end)} of "
            "them at the end of the list, as if unreadable clips were skipped while the names were counted "
            "on; then each file after the first such clip holds a later clip's latents. Name the unreadable "
            "clips with --unreadable FILE to move them back, or state with --names clip-ids that the names "
            "are right"
        )


def clean(text: str) -> str:
    """Without what a terminal would obey or a page cannot hold."""
    return "".join("\ufffd" if unicodedata.category(sign) in _UNPRINTABLE else sign for sign in text)


def _latent_files(folder: Path) -> list[str]:
    """Paths below `folder`, with slashes, sorted; hidden files and folders are none of them."""
    found = []

    def refuse(error: OSError) -> None:
        raise CacheError(f"{error.filename} cannot be listed: {error.strerror}; its clips would be missing")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in files
            if name.endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _read_metadata(path: Path) -> Any:
    if not path.exists():
        return {}
    if not path.is_file():  # A pipe would be waited for without end.
        raise CacheError(f"{path} is no file; mend it, or remove it if names are clip ids")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CacheError(
            f"{path} cannot be read ({error}); mend it, or remove it if names are clip ids"
        ) from error


def _facts(metadata: Any, of_clips: set[str]) -> dict[str, Any]:
    """What the metadata say of the whole: single values that are not of one file or clip."""
    entries = metadata.items() if isinstance(metadata, dict) else ()
    plain = {key: value for key, value in entries if isinstance(value, str | int | float | bool)}
    return {
        clean(key): clean(value) if isinstance(value, str) else value
        for key, value in plain.items()
        if not of_clips.intersection((key, str(value)))
    }


def _tables(metadata: Any) -> list[Any]:
    """Every list and object that may say something of all clips: the whole, and what lies in it."""
    inner = metadata.values() if isinstance(metadata, dict) else ()
    return [part for part in (metadata, *inner) if isinstance(part, list | dict) and part]


def _mapped(metadata: Any, paths: Sequence[str]) -> dict[str, str]:
    """File → clip, where the metadata map one to the other in either direction, or row by row."""
    by_name = {name: path for path in paths for name in (path, path.rsplit(".", 1)[0], f"./{path}")}
    for table in _tables(metadata):
        pairs: list[tuple[Any, Any]] = []
        if isinstance(table, dict):
            pairs = list(table.items())
            pairs = pairs if _name_files(pairs, by_name, 0) else [(file, clip) for clip, file in pairs]
        elif all(isinstance(row, dict) for row in table):
            pairs = [pair for row in table if (pair := _row(row, by_name))]
        clips = {clip for _, clip in pairs if isinstance(clip, str | int)}
        if _name_files(pairs, by_name, 0) and len(clips) == len(pairs):
            return {by_name[str(file)]: str(clip) for file, clip in pairs if str(file) in by_name}
    return {}


def _name_files(pairs: Sequence[tuple[Any, Any]], by_name: Mapping[str, str], side: int) -> bool:
    """Whether most of one side of the pairs are files that lie here."""
    hits = sum(isinstance(both[side], str) and both[side] in by_name for both in pairs)
    return bool(pairs) and 2 * hits > len(pairs)


def _row(row: Mapping[str, Any], by_name: Mapping[str, str]) -> tuple[str, str] | None:
    """(file, clip) of one object of a list."""
    files = [value for value in row.values() if isinstance(value, str) and value in by_name]
    ids = [str(row[key]) for key in IDS if isinstance(row.get(key), str | int)]
    return (files[0], ids[0]) if files and ids else None


def _listed(metadata: Any, files: Mapping[str, Path]) -> tuple[str, ...]:
    """The list of plain ids that most of the files' names are in, else a list of at least as many words."""
    lists = [part for part in _tables(metadata) if isinstance(part, list)]
    plain = [part for part in lists if all(isinstance(item, str | int) for item in part)]
    for part in plain:
        names = tuple(dict.fromkeys(map(str, part)))
        if 2 * len(files.keys() & set(names)) > len(files):
            return names
    words = [part for part in plain if len(part) >= len(files) and all(isinstance(w, str) for w in part)]
    return tuple(dict.fromkeys(words[0])) if words else ()
