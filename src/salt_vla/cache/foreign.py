"""Latents that another program left as one file a clip: which file is of which clip, and what is in it.

Opens files without running anything in them. Knows neither clip tables nor teachers nor our own format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from salt_vla.errors import CacheError

if TYPE_CHECKING:
    from jaxtyping import Float

METADATA = "metadata.json"
SUFFIXES = (".pt", ".pth", ".npy")
TENSORS = ("latents", "features", "embeddings", "tokens", "last_hidden_state", "hidden_states")
IDS = ("clip_id", "video_id", "id", "key", "name", "video", "clip")
MOST_VALUES = 2**27  # of one clip: 60 times the largest latents in use
MOST_BYTES = 2**31
_NUMBERED = re.compile(r"(\D*)(\d+)")
_WANTS = re.compile(r"GLOBAL (\S+)")

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
    def numbered(self) -> bool:
        """Whether the names are nothing but the numbers of rows: 0 … n − 1 or 1 … n behind one prefix."""
        matches = [_NUMBERED.fullmatch(name) for name in self.files]
        found = [match.groups() for match in matches if match]
        if len(found) < len(matches) or len({prefix for prefix, _ in found}) != 1:
            return False
        numbers = sorted(int(number) for _, number in found)
        return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))

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
    if unreadable or names == "rows":
        return _by_place(found, order, names, unreadable)
    if names == "check":
        known = set(order)
        if found.numbered and not all(name in known for name in found.files):
            raise CacheError(
                f"the files of {found.folder} are numbered, which does not say which clips they are of: ids "
                "shift by one after every clip that could not be read; state with --names rows that they "
                "follow the order of the list in metadata.json, or else of --data's clip table; or map each "
                "file to its clip in metadata.json"
            )
        _refuse_shifted(found, order)
    return {name: name for name in found.files}


def _by_place(
    found: ForeignFolder, order: Sequence[str], names: Names, unreadable: Sequence[str]
) -> dict[str, str]:
    strangers = sorted(set(unreadable) - set(order))
    if strangers:
        raise CacheError(
            f"--unreadable names {strangers[0]!r}, which is none of the {len(order)} listed clips"
        )
    left_out = set(unreadable)
    readable = [name for name in order if name not in left_out]
    if len(readable) != len(found.files):
        raise CacheError(
            f"{found.folder} holds {len(found.files)} files for {len(readable)} readable clips "
            f"({len(order)} listed, {len(left_out)} unreadable): one too many or too few, and ids shift by "
            "one from there on; name every clip that could not be read with --unreadable"
        )
    if names != "rows" and (strange := sorted(set(found.files) - set(order))):
        raise CacheError(f"{found.folder} has a file of {strange[0]!r}, which is none of the listed clips")
    return dict(zip(readable, found.in_order(() if names == "rows" else order), strict=True))


def _refuse_shifted(found: ForeignFolder, order: Sequence[str]) -> None:
    """The trace of a loop that left out unreadable clips but went on counting names: what is missing is the
    end of the list, and nothing else."""
    count = len(found.files)
    if count < len(order) and set(order[:count]) == set(found.files):
        missing = len(order) - count
        raise CacheError(
            f"{found.folder}: of {len(order)} listed clips exactly the last {missing} have no file, as if "
            "unreadable clips were skipped while the names were counted on; then each file after the first "
            f"such clip holds a later clip's latents. Name the {missing} unreadable clips with --unreadable "
            "FILE to move them back, or state with --names clip-ids that the names are right"
        )


def read_latents(
    path: Path, name: str, shape: tuple[int, ...] | None = None
) -> Float[np.ndarray, "tokens dim"]:
    """One clip's latents in float32 (float16 as it is). Raises `CacheError` with the reason: unreadable, a
    pickle that would run code, no single array in it, not of `shape`, or said to be of another clip."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CacheError(f"{path.name} is too large for one clip ({path.stat().st_size:,} bytes)")
        value, said = _read_npy(path) if path.suffix == ".npy" else _read_torch(path)
    except OSError as error:
        raise CacheError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if said not in (None, name):
        raise CacheError(f"{path.name} says that it is of clip {said!r}, not {name!r}")
    found = tuple(value.shape)
    while len(found) > 2 and found[0] == 1:
        found = found[1:]
    if shape is not None and found != shape:
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not {shape}")
    if len(found) != 2 or value.size > MOST_VALUES:
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not (tokens, width) of one clip")
    return value.reshape(found)


def _read_npy(path: Path) -> tuple[np.ndarray, str | None]:
    try:
        value = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise CacheError(f"{path.name} is damaged, or no array of numbers ({str(error)[:80]})") from error
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = getattr(value, "dtype", "several arrays")
        raise CacheError(f"{path.name} holds {kind}, not float16 or float32 (bfloat16 only in .pt)")
    return value if value.dtype == np.float16 else value.astype(np.float32), None


def _read_torch(path: Path) -> tuple[np.ndarray, str | None]:
    import torch  # Here, because the rest of the package does without.

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch names no set of errors for files that it cannot or will not read.
        raise CacheError(f"{path.name} {_why_not(str(error))}") from error
    said = None
    if isinstance(value, Mapping):
        ids = [str(value[key]) for key in IDS if isinstance(value.get(key), str | int)]
        said = ids[0] if ids else None
        value = _only_tensor(path, value)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.is_floating_point():
        raise CacheError(f"{path.name} holds no plain tensor of float32, float16 or bfloat16")
    if value.numel() > MOST_VALUES:  # Before it is copied: a stride of 0 makes much of little.
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not (tokens, width) of one clip")
    value = value.detach()
    return (value if value.dtype == torch.float16 else value.float()).numpy(), said


def _only_tensor(path: Path, value: Mapping[Any, Any]) -> Any:
    known = [key for key in TENSORS if key in value]
    others = [key for key, part in value.items() if hasattr(part, "layout") and part.ndim >= 2]
    if not known and len(others) != 1:
        keys = ", ".join(str(key) for key in value)[:80]
        raise CacheError(f"{path.name} holds no latents under a known name ({keys})")
    return value[(known or others)[0]]


def _why_not(said: str) -> str:
    if wants := _WANTS.search(said):
        return f"would run code when it is opened (it asks for {wants[1][:80]})"
    return "is damaged, or no file of torch with tensors alone"


def _latent_files(folder: Path) -> list[str]:
    """Paths below `folder`, with slashes, sorted; hidden files and folders are none of them."""
    found = []
    for place, folders, files in os.walk(folder):
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
    return {key: value for key, value in plain.items() if not of_clips.intersection((key, str(value)))}


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
        names = tuple(map(str, part))
        if 2 * len(files.keys() & set(names)) > len(files):
            return names
    words = [part for part in plain if len(part) >= len(files) and all(isinstance(w, str) for w in part)]
    return tuple(words[0]) if words else ()
