"""`eval --suite intphys2`: how often an impossible film surprises a predictor more than its possible twin."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from salt_vla.data.film_pairs import Film, FilmSet, read_film_sets
from salt_vla.errors import UserError
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.surprise import FilmSurprise, SurpriseModel, Windows
from salt_vla.evaluation.surprise_models import (
    COPY_LAST,
    PIXEL_DIFFERENCE,
    CopyLastFrame,
    PixelDifference,
)
from salt_vla.evaluation.surprise_scores import PairScore, score_pairs
from salt_vla.evaluation.surprise_store import FilmSource, SurpriseStore
from salt_vla.jobs.surprise_models import load_predictor
from salt_vla.progress import progress
from salt_vla.reports.surprise import SurprisePage, write_surprise_page
from salt_vla.rundir import root, write_text

RANDOM = "random"
BASELINES = (RANDOM, COPY_LAST, PIXEL_DIFFERENCE)
FOLDER = "surprise"


def score(encoders: Mapping[str, str], data: str, settings: EvalSettings, tag: str = "") -> list[Scored]:
    """Relative accuracy of every predictor over the pairs of films in the folder `data`, beside random
    weights, copy-last-frame and pixel differences: one a part of the pairs (all, a condition, …).

    `encoders`: runs, checkpoints or V-JEPA 2 folders by the name that tables give them. A set without labels
    gets a file of surprises for each of them instead. Writes a page beside. `tag`: what the names of both end
    with. Raises `UserError`.
    """
    sets = read_film_sets(Path(data))
    models = open_models(encoders, settings)
    windows = Windows(settings.context_frames, settings.frame_step)
    found = {each.name: look_at(each, models, windows) for each in sets}
    place = root() / FOLDER / Path(data).resolve().name
    scored: list[Scored] = []
    scores: list[PairScore] = []
    for each in sets:
        if each.has_labels:
            now, figures = score_pairs(each.name, each.pairs, found[each.name])
            scored += now
            scores += figures
        else:
            write_submissions(place, each, found[each.name], tag)
    if scores:
        page = SurprisePage(
            Path(data).resolve().name,
            {name: model.target for name, model in models.items()},
            windows,
            scores,
            [(each, found[each.name]) for each in sets if each.has_labels],
        )
        print(f"Page: {write_surprise_page(page, place / f'index{tag}.html')}", file=sys.stderr)
    return scored


def open_models(encoders: Mapping[str, str], settings: EvalSettings) -> dict[str, SurpriseModel]:
    """The predictors, and what stands beside them: the first one's networks untrained, and two baselines of
    pixels at its geometry."""
    if not encoders:
        raise UserError("surprise needs at least one predictor: a run, a checkpoint or a V-JEPA 2")
    for name in encoders:
        if name in BASELINES:
            raise UserError(f"{name!r} is the name of a baseline; evaluate a run under another name")
    loaded = {
        name: load_predictor(path, settings.teacher, settings.device) for name, path in encoders.items()
    }
    first = next(iter(loaded.values()))
    return {
        **loaded,
        RANDOM: first.untrained(settings.seed),
        COPY_LAST: CopyLastFrame(first.geometry, first.frame_step),
        PIXEL_DIFFERENCE: PixelDifference(first.geometry, first.frame_step),
    }


def look_at(
    films: FilmSet, models: Mapping[str, SurpriseModel], windows: Windows
) -> dict[str, dict[str, FilmSurprise]]:
    """Model → film → surprise, from disk where it is there already."""
    with progress(f"Surprise of {films.name}", len(films.films), "films") as advance:
        return store().surprises(models, map(_alone, films.films), windows, partial(advance, 1))


def store() -> SurpriseStore:
    return SurpriseStore(root() / FOLDER / "films")


def _alone(film: Film) -> list[FilmSource]:
    return [FilmSource(film.name, film.identity(), film.pictures)]


def write_submissions(
    place: Path, films: FilmSet, found: Mapping[str, Mapping[str, FilmSurprise]], tag: str = ""
) -> None:
    """One CSV a model: name and surprise (mean over windows) of every film, for a set whose labels are kept
    by others."""
    for name, surprises in found.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "surprise"))
        writer.writerows((film.name, f"{surprises[film.name].mean:.8g}") for film in films.films)
        file = place / f"{films.name}-{name.replace('/', '-')}{tag}.csv"
        write_text(file, text.getvalue())
        print(f"{films.name} has no labels; surprises of {name}: {file}", file=sys.stderr)
