"""Surprise of films kept on disk: small files of a model and a film or some, whole or absent, so that work
goes on where it stopped. Knows films as things with a key and pictures, models by their fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from salt_vla.errors import DataError
from salt_vla.evaluation.surprise import Curve, FilmSurprise, Setting, SurpriseModel, Windows, film_surprises
from salt_vla.files import read_json, remove_left_parts, write_text

CURE = "remove it and run the same command again"


@dataclass(frozen=True)
class FilmSource:
    """What is looked at: `identity` says which pixels these are; `pictures` begins them anew at each call."""

    name: str
    identity: str
    pictures: Callable[[], Iterable[np.ndarray]]


class SurpriseStore:
    """`store.surprises(models, films, windows)` computes what is not there yet. A file holds a film, or some
    that belong together: `<hash of model and windows>/<hash of films>.json`; docs/formats.md."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def surprises(
        self,
        models: Mapping[str, SurpriseModel],
        films: Iterable[Sequence[FilmSource]],
        windows: Windows,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, FilmSurprise]]:
        """Model → film → surprise. `films`: those of each file, which is written when all of them are done.
        Each is decoded once for all models that lack it and share its geometry. Raises `DataError` naming
        the film that cannot be read or is too short."""
        found: dict[str, dict[str, FilmSurprise]] = {name: {} for name in models}
        folders = {name: self._folder(model, windows) for name, model in models.items()}
        for together in films:
            file = _file(together)
            lacking: dict[str, SurpriseModel] = {}
            for name, model in models.items():
                kept = _read(folders[name] / file, len(together))
                if kept is None:
                    lacking[name] = model
                else:
                    found[name] |= {film.name: each for film, each in zip(together, kept, strict=True)}
            for film in together if lacking else ():
                for name, surprise in _look(lacking, film, windows).items():
                    found[name][film.name] = surprise
            for name in lacking:
                said = [_as_json(film.name, found[name][film.name]) for film in together]
                write_text(folders[name] / file, json.dumps({"films": said}))
            advance()
        for folder in folders.values():
            remove_left_parts(folder)
        return found

    def _folder(self, model: SurpriseModel, windows: Windows) -> Path:
        own = asdict(windows.of(model))
        own.pop("batch")  # Which changes the last digits at most.
        return self.folder / xxhash.xxh3_64_hexdigest(f"2 {model.fingerprint} {sorted(own.items())}".encode())


def _look(models: Mapping[str, SurpriseModel], film: FilmSource, windows: Windows) -> dict[str, FilmSurprise]:
    """With one pass over the film for all models of one geometry and pace."""
    alike: dict[Any, dict[str, SurpriseModel]] = {}
    for name, model in models.items():
        own = windows.of(model)
        alike.setdefault((model.geometry, own.frame_steps, own.context_frames), {})[name] = model
    found: dict[str, FilmSurprise] = {}
    for each in alike.values():
        found |= film_surprises(each, film.pictures(), windows, f"film {film.name}")
    return found


def _file(films: Sequence[FilmSource]) -> str:
    said = "\n".join(film.identity for film in films)
    return f"{xxhash.xxh3_64_hexdigest(said.encode())}.json"


def _as_json(name: str, surprise: FilmSurprise) -> dict[str, Any]:
    curves = [
        asdict(curve.setting) | {key: getattr(curve, key).tolist() for key in ("starts", "first", "values")}
        for curve in surprise.curves
    ]
    return {"film": name, "curves": curves}


def _read(file: Path, count: int) -> list[FilmSurprise] | None:
    """Of so many films; None where there is no file."""
    if not file.is_file():
        return None
    said = read_json(file, dict, CURE)
    try:
        found = [FilmSurprise(tuple(_curve(**each) for each in film["curves"])) for film in said["films"]]
        if len(found) != count or not all(film.curves for film in found):
            raise ValueError(f"{len(found)} films, not {count}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); {CURE}") from error
    return found


def _curve(
    context_frames: int, frame_step: int, starts: list[int], first: list[int], values: list[float]
) -> Curve:
    arrays = np.array(starts, np.int64), np.array(first, np.int64), np.array(values, np.float64)
    if not len(starts) == len(first) == len(values) > 0 or not np.isfinite(arrays[2]).all():
        raise ValueError("a curve's lists are empty, of different lengths or hold what is no number")
    return Curve(Setting(context_frames, frame_step), *arrays)
