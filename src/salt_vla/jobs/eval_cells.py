"""Cells: what one suite found of one encoder, kept in a JSON file, so that it is never measured twice.

A cell is named by all that decides its figures. Knows sums and settings, not how they are measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from salt_vla.errors import RunError
from salt_vla.evaluation.results import Scored, renamed, tabulate, to_objects
from salt_vla.evaluation.settings import HOW_COMPUTED
from salt_vla.evaluation.statistics import EpisodeSums
from salt_vla.files import read_json, remove_left_parts, write_text

FOLDER = "evaluations"
VERSION = 2  # Of the cells themselves, and of all that is common to the suites.
CHECKSUM = "checksum"  # Of everything else in the file.
CURE = "remove it and run the same command again"
LIBRARIES = ("salt-vla", "torch", "numpy", "scikit-learn")
_SUMS = ("episodes", "clips", "wrong", "first", "second", "varying")


@dataclass(frozen=True)
class Cell:
    """`scored`: of one encoder, whatever it is called elsewhere. `notes`: what the suite left out.
    `compute`: what the encoder and the measuring cost."""

    scored: list[Scored]
    notes: list[str] = field(default_factory=list)
    compute: dict[str, float] = field(default_factory=dict)

    def called(self, name: str) -> list[Scored]:
        return [replace(one, encoder=renamed(one.encoder, name)) for one in self.scored]


@dataclass(frozen=True)
class Cells:
    """The cells below `folder`."""

    folder: Path

    def place(self, key: Mapping[str, Any]) -> Path:
        said = json.dumps(dict(key) | {"version": VERSION}, sort_keys=True)
        return self.folder / str(key["suite"]) / f"{xxhash.xxh3_128_hexdigest(said.encode())}.json"

    def read(self, key: Mapping[str, Any]) -> Cell | None:
        """None where it is still to be measured; `RunError` for a damaged file, whatever was damaged."""
        file = self.place(key)
        if not file.is_file():
            return None
        said = read_json(file, dict, CURE)
        if said.pop(CHECKSUM, None) != _checksum(said):
            raise RunError(f"{file} is damaged (its checksum is another); {CURE}")
        try:
            scored = [_scored_from(each) for each in said["scored"]]
            return Cell(scored, [str(note) for note in said["notes"]], dict(said["compute"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged ({error!r}); {CURE}") from error

    def write(self, key: Mapping[str, Any], cell: Cell, seed: int) -> None:
        """Whole or not at all. `rows` are for who reads the file; tables are made of the sums."""
        rows = [row for result in tabulate(cell.scored, seed) for row in to_objects(result.rows)]
        said = {
            "key": dict(key),
            "versions": {name: version(name) for name in LIBRARIES},
            "rows": rows,
            "notes": cell.notes,
            "compute": cell.compute,
            "scored": [_scored_to(one) for one in cell.scored],
        }
        said = json.loads(json.dumps(said))  # As it will be read back.
        write_text(self.place(key), json.dumps({CHECKSUM: _checksum(said)} | said, indent=1))
        remove_left_parts(self.place(key).parent)


def cell_key(
    suite: str, suite_version: int, fingerprint: str, settings: Any, data: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides a cell's figures. `data`: of clips on both sides, and of how they are seen."""
    said = {"suite": suite, "suite_version": suite_version, "encoder": fingerprint}
    asked = {name: value for name, value in asdict(settings).items() if name not in HOW_COMPUTED}
    return said | {"settings": asked, "data": dict(data)}


def hash_of(parts: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(list(parts)).encode())


def _checksum(said: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def _scored_to(one: Scored) -> dict[str, Any]:
    plain = {name: value for name, value in vars(one).items() if name != "sums"}
    sums = {name: getattr(one.sums, name).tolist() for name in _SUMS}
    return plain | {"sums": sums | {"metric": one.sums.metric}}


def _scored_from(said: Mapping[str, Any]) -> Scored:
    sums = said["sums"]
    kinds = {"episodes": np.int64, "varying": bool}
    arrays = {name: np.array(sums[name], kinds.get(name, np.float64)) for name in _SUMS}
    count = len(arrays["episodes"])
    if not count or any(len(arrays[name]) != count for name in _SUMS[1:5]) or arrays["wrong"].ndim != 2:
        raise ValueError("sums of different lengths")
    plain = {name: value for name, value in said.items() if name != "sums"}
    return Scored(**plain, sums=EpisodeSums(sums["metric"], **arrays))
