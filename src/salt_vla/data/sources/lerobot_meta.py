"""The facts in a LeRobot data set's `meta/`, versions 2 and 3, and the places its templates give.

The package `lerobot` is not needed. Knows nothing of clips, and opens neither films nor data tables.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.data.sources.files import read_json, read_json_lines
from salt_vla.errors import DataError

INFO = "meta/info.json"
FIELDS = ("codebase_version", "fps", "features", "splits", "data_path", "video_path")
# Two files of tables for each episode, or several episodes in a file.
ONE_FILE_AN_EPISODE = ("v2.0", "v2.1")
SHARED_FILES = ("v3.0",)
_SPAN = re.compile(r"^(\d{1,9}):(\d{1,9})$")
MAX_NUMBER = 1e9  # of frames, seconds, files: beyond any recording, and it fits every column
MAX_FPS = 10_000
_NUMBER_FORMAT = re.compile(r"(0?\d?\dd?|d)?")  # `{name:06d}`; a wider one could fill the memory


@dataclass(frozen=True)
class LeRobotMeta:
    """info.json as it is, and one row an episode, in the order of their numbers."""

    root: Path
    info: dict[str, Any]
    episodes: list[dict[str, Any]]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        return self.features("video")

    def features(self, dtype: str) -> list[str]:
        return [key for key, feature in self.info["features"].items() if feature["dtype"] == dtype]

    def split_of(self, episode: int) -> str:
        """From info.json's `splits` ("a:b" ranges of episodes)."""
        found = []
        for name, span in self.info["splits"].items():
            ends = _SPAN.match(str(span))
            if ends is None:
                raise DataError(
                    f"{self.root}/{INFO}: split {name!r} is {span!r:.60}, not episodes as in '0:10'"
                )
            if int(ends[1]) <= episode < int(ends[2]):
                found.append(str(name))
        if not found:
            raise DataError(f"{self.root}/{INFO}: no split holds episode {episode}; `splits` must cover all")
        if len(found) > 1:
            raise DataError(
                f"{self.root}/{INFO}: episode {episode} is in the splits {' and '.join(found)}; `splits` "
                "must not overlap"
            )
        return found[0]

    def field(self, episode: dict[str, Any], name: str) -> Any:
        """One value of an episode's row; a missing one is an error that names it."""
        if name not in episode or episode[name] is None:
            number = episode["episode_index"]
            raise DataError(f"{self.root}/meta/episodes: episode {number} lacks the field {name!r}")
        return episode[name]

    def number(self, episode: dict[str, Any], name: str) -> float:
        """One number of an episode's row, not negative and below a thousand million."""
        value = self.field(episode, name)
        if not _is_number(value) or not 0 <= value < MAX_NUMBER:
            number = episode["episode_index"]
            raise DataError(
                f"{self.root}/meta/episodes: episode {number}: {name} is {value!r:.60}, not a number"
            )
        return float(value)

    def film(self, episode: dict[str, Any], camera: str) -> tuple[str, int]:
        """The film of an episode from one camera: its file, and the file's frame that it begins with."""
        if self.info["codebase_version"] in ONE_FILE_AN_EPISODE:
            return self._place("video_path", {**self._chunk(episode), "video_key": camera}), 0
        prefix = f"videos/{camera}"
        file = self._place("video_path", {**self._shared(episode, prefix), "video_key": camera})
        return file, round(self.number(episode, f"{prefix}/from_timestamp") * self.fps)

    def missing_frames(self, episode: dict[str, Any], camera: str) -> int:
        """Frames of an episode that its stretch of the film is too short for; what would be read in their
        place is the next episode. Only version 3 says where a stretch ends, and a frame is rounding."""
        begin, end = (f"videos/{camera}/{name}_timestamp" for name in ("from", "to"))
        if self.info["codebase_version"] in ONE_FILE_AN_EPISODE or end not in episode:
            return 0
        filmed = (self.number(episode, end) - self.number(episode, begin)) * self.fps
        missing = round(self.number(episode, "length") - filmed)
        return missing if missing > 1 else 0

    def data_file(self, episode: dict[str, Any]) -> str:
        """The Parquet file that holds an episode's rows."""
        one = self.info["codebase_version"] in ONE_FILE_AN_EPISODE
        return self._place("data_path", self._chunk(episode) if one else self._shared(episode, "data"))

    def _chunk(self, episode: dict[str, Any]) -> dict[str, int]:
        number = int(episode["episode_index"])
        size = self.info.get("chunks_size")
        if not isinstance(size, int) or size < 1:
            raise DataError(f"{self.root}/{INFO}: chunks_size is {size!r}, not a positive number")
        return {"episode_chunk": number // size, "episode_index": number}

    def _shared(self, episode: dict[str, Any], prefix: str) -> dict[str, int]:
        names = ("chunk_index", "file_index")
        return {name: int(self.number(episode, f"{prefix}/{name}")) for name in names}

    def _place(self, template: str, places: Mapping[str, int | str]) -> str:
        """What info.json's `template` gives: names of `places` alone, numbers at most two digits' wide."""
        said = self.info[template]
        try:
            for _, name, width, conversion in string.Formatter().parse(said):
                if name is None:
                    continue
                if name not in places or conversion or not _NUMBER_FORMAT.fullmatch(width or ""):
                    raise ValueError(f"{{{name}}} is none")
            return str(said.format(**places))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.root}/{INFO}: {template} is {said!r}; it must be a template of "
                f"{', '.join(places)} ({error})"
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_meta(root: Path) -> LeRobotMeta:
    """Read `meta/`. Raises `DataError` naming the file and field that is missing or of another version."""
    info = _read_info(root)
    one_file = info["codebase_version"] in ONE_FILE_AN_EPISODE
    rows = _episodes_jsonl(root) if one_file else _episodes_parquet(root)
    for row in rows:
        if type(row["episode_index"]) is not int or not 0 <= row["episode_index"] < MAX_NUMBER:
            raise DataError(f"{root}/meta/episodes: {row['episode_index']!r} is no episode's number")
    return LeRobotMeta(root, info, sorted(rows, key=lambda row: row["episode_index"]))


def _episodes_jsonl(root: Path) -> list[dict[str, Any]]:
    path = root / "meta" / "episodes.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing")
    rows = read_json_lines(path)
    for number, row in rows:
        if "episode_index" not in row:
            raise DataError(f"{path}, line {number}, lacks the field 'episode_index'")
    return [row for _, row in rows]


def _episodes_parquet(root: Path) -> list[dict[str, Any]]:
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
    return rows


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{root} is not a LeRobot data set: {path} is missing")
    info: dict[str, Any] = read_json(path, dict)
    for name in FIELDS:
        if name not in info:
            raise DataError(f"{path} lacks the field {name!r}")
    known = (*ONE_FILE_AN_EPISODE, *SHARED_FILES)
    if info["codebase_version"] not in known:
        raise DataError(
            f"{path}: version {info['codebase_version']!r} is not {' or '.join(known)}; convert it with "
            "lerobot's tool"
        )
    if not _is_number(info["fps"]) or not 0 < info["fps"] <= MAX_FPS:
        raise DataError(f"{path}: fps is {info['fps']!r:.40}, not a positive number up to {MAX_FPS}")
    if not isinstance(info["splits"], dict):
        raise DataError(f"{path}: splits is {info['splits']!r}, not an object of name: range")
    features = info["features"]
    if not isinstance(features, dict) or not all(
        isinstance(feature, dict) and "dtype" in feature and isinstance(feature["dtype"], str)
        for feature in features.values()
    ):
        raise DataError(f"{path}: features must be an object of objects, each with a dtype")
    return info
