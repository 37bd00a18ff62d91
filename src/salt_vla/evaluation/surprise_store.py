"""Surprise of films kept on disk: a small file a film and model, whole or absent, so that work goes on
where it stopped. Knows films as things with a key and pictures, models by their fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from salt_vla.errors import DataError
from salt_vla.evaluation.surprise import Curve, FilmSurprise, Setting, SurpriseModel, Windows, film_surprises
from salt_vla.files import read_json, write_text


@dataclass(frozen=True)
class FilmSource:
    """What is looked at: `identity` says which pixels these are; `pictures` begins them anew at each call."""

    name: str
    identity: str
    pictures: Callable[[], Iterable[np.ndarray]]


class SurpriseStore:
    """`store.surprises(models, films, windows)` computes what is not there yet. A film's file is
    `<hash of model and windows>/<hash of film>.json`; docs/formats.md."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def surprises(
        self,
        models: Mapping[str, SurpriseModel],
        films: Iterable[FilmSource],
        windows: Windows,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, FilmSurprise]]:
        """Model → film → surprise. Each film is decoded once for all models that lack it and share its
        geometry. Raises `DataError` naming the film that cannot be read or is too short."""
        found: dict[str, dict[str, FilmSurprise]] = {name: {} for name in models}
        folders = {name: self._folder(model, windows) for name, model in models.items()}
        for film in films:
            lacking: dict[Any, dict[str, SurpriseModel]] = {}
            for name, model in models.items():
                kept = _read(folders[name] / _file(film))
                if kept is None:
                    own = windows.of(model)
                    lacking.setdefault((model.geometry, own.frame_steps, own.context_frames), {})[name] = (
                        model
                    )
                else:
                    found[name][film.name] = kept
            for together in lacking.values():
                now = film_surprises(together, film.pictures(), windows, f"film {film.name}")
                for name, surprise in now.items():
                    write_text(folders[name] / _file(film), json.dumps(_as_json(film.name, surprise)))
                    found[name][film.name] = surprise
            advance()
        return found

    def _folder(self, model: SurpriseModel, windows: Windows) -> Path:
        own = asdict(windows.of(model))
        own.pop("batch")  # Which changes the last digits at most.
        return self.folder / xxhash.xxh3_64_hexdigest(f"1 {model.fingerprint} {sorted(own.items())}".encode())


def _file(film: FilmSource) -> str:
    return f"{xxhash.xxh3_64_hexdigest(film.identity.encode())}.json"


def _as_json(name: str, surprise: FilmSurprise) -> dict[str, Any]:
    curves = [
        asdict(curve.setting) | {key: getattr(curve, key).tolist() for key in ("starts", "first", "values")}
        for curve in surprise.curves
    ]
    return {"film": name, "curves": curves}


def _read(file: Path) -> FilmSurprise | None:
    if not file.is_file():
        return None
    said = read_json(file, dict)
    try:
        return FilmSurprise(tuple(_curve(**each) for each in said["curves"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); remove it and run the same command again") from error


def _curve(
    context_frames: int, frame_step: int, starts: list[int], first: list[int], values: list[float]
) -> Curve:
    return Curve(
        Setting(context_frames, frame_step),
        np.array(starts, np.int64),
        np.array(first, np.int64),
        np.array(values, np.float64),
    )
