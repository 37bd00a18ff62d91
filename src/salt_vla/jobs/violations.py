"""`eval --suite violations`: surprise at films of the impossible that are made here, without any download.

Joins drawn rooms and films of a data set's held-out episodes with predictors, baselines and their scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from torch import Tensor

from salt_vla.config import ViewConfig
from salt_vla.data.film_pairs import IMPOSSIBLE, POSSIBLE, Film, FilmSet, Pair
from salt_vla.data.view_lock import ViewReader
from salt_vla.data.violations import ViolationPair
from salt_vla.data.violations_filmed import filmed_pairs
from salt_vla.data.violations_rendered import FEWEST_FRAMES, rendered_pairs
from salt_vla.errors import DataError, UserError
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.statistics import Estimate, paired_difference
from salt_vla.evaluation.surprise import FilmSurprise, SurpriseModel, Windows
from salt_vla.evaluation.surprise_models import RunPredictor
from salt_vla.evaluation.surprise_scores import PairScore, score_pairs
from salt_vla.evaluation.surprise_store import FilmSource
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table, split_table
from salt_vla.jobs.surprise import RANDOM, open_models, store
from salt_vla.progress import progress
from salt_vla.targets import FrozenTargets, TargetProvider, Task

if TYPE_CHECKING:
    from jaxtyping import UInt8

SUITE = "violations"
ROOMS, FILMS = "rooms", "films"
SCENES = 20  # of each kind
CONDITION = "condition"
TIE = 2e-6  # relative difference of two windows that is rounding

Pairs = Callable[[], Iterable[ViolationPair]]


@dataclass(frozen=True)
class MadeFilm(Film):
    """A film that is made anew whenever it is looked at. `frame`: the first of its pair that shows what
    cannot be."""

    frame: int = 0
    make: Pairs = field(default=tuple, compare=False)

    def identity(self) -> str:
        return self.name

    def pictures(self) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        wanted = self.name.rpartition("/")[0]
        pair = next(pair for pair in self.make() if pair.name == wanted)
        return iter(pair.film(self.label == POSSIBLE))


@dataclass(frozen=True)
class Violations:
    """One kind's films (`rooms` or `films`), and the surprise at each of them by model and film's name."""

    films: FilmSet
    found: Mapping[str, Mapping[str, FilmSurprise]]


def score(encoders: Mapping[str, str], data: str, settings: EvalSettings, tag: str = "") -> list[Scored]:
    """Relative accuracy of every predictor in each condition, beside random weights, copy-last-frame and
    pixel differences. `data`: whose held-out episodes are violated beside the drawn rooms. `tag`: for suites
    that leave files. Raises `UserError`."""
    if settings.frame_step:
        raise UserError(f"films of {SUITE} are made at the predictor's own pace; leave --frame-step off")
    models = open_models(encoders, settings)
    share_targets(models)
    kinds = look(models, data, settings, SCENES)
    return [one for each in kinds for one in score_kind(each)[0]]


def score_kind(violations: Violations) -> tuple[list[Scored], list[PairScore]]:
    """A figure a condition, model and way of summing windows up, for tables and for the report. All
    conditions together are none: they ask different things."""
    films = violations.films
    pairs, found = both_ways(violations)
    every, scores = score_pairs(films.name, pairs, found)
    scored = []
    for one in every:
        # The scores of film pairs are called after the set that they were first made for.
        column, _, condition = one.suite.rpartition("/")[2].partition("=")
        if column == CONDITION:
            scored.append(replace(one, suite=f"{SUITE}/{films.name}/{condition}"))
    prefix = f"{CONDITION}="
    kept = [replace(s, part=s.part.removeprefix(prefix)) for s in scores if s.part.startswith(prefix)]
    return scored, kept


def beyond_random(scored: Sequence[Scored], model: str) -> dict[tuple[str, str], Estimate]:
    """(kind, condition) → how much more often `model` tells films apart than its random init does, over the
    same scenes, by the mean over windows."""
    sums = {(one.encoder, one.suite): one.sums for one in scored if one.target.startswith("mean")}
    found = {}
    for encoder, suite in sums:
        if encoder == model:
            _, kind, condition = suite.split("/")
            found[kind, condition] = paired_difference(sums[model, suite], sums[RANDOM, suite])
    return found


def both_ways(violations: Violations) -> tuple[list[Pair], dict[str, dict[str, FilmSurprise]]]:
    """One pair a scene: its possible films taken together, and its impossible ones.

    Where films go both ways, what follows the violation is as often possible as not, and with its sum cancels
    all that it would surprise by itself; what is left is owed to what came before. IntPhys 1 compares its
    quadruples in this way (Riochet et al., arXiv:1803.07616, section 3.3).
    """
    scenes: dict[str, list[Pair]] = {}
    for pair in violations.films.pairs:
        scenes.setdefault(pair.scene + pair.parts[CONDITION], []).append(pair)
    joint: list[Pair] = []
    found: dict[str, dict[str, FilmSurprise]] = {name: {} for name in violations.found}
    for pairs in scenes.values():
        joint.append(pairs[0])
        for model, by_film in violations.found.items():
            possible = _mean_surprise([by_film[pair.possible.name] for pair in pairs])
            impossible = _mean_surprise([by_film[pair.impossible.name] for pair in pairs])
            found[model][pairs[0].possible.name] = possible
            found[model][pairs[0].impossible.name] = _with_ties(impossible, possible)
    return joint, found


def _mean_surprise(surprises: Sequence[FilmSurprise]) -> FilmSurprise:
    """Of films of one length, window by window."""
    columns = zip(*(each.curves for each in surprises), strict=True)
    return FilmSurprise(
        tuple(replace(same[0], values=np.mean([curve.values for curve in same], axis=0)) for same in columns)
    )


def _with_ties(surprise: FilmSurprise, other: FilmSurprise) -> FilmSurprise:
    """With the other's values where the two differ by no more than sums in another order do."""
    curves = [
        replace(mine, values=np.where(np.isclose(mine.values, its.values, TIE, 0), its.values, mine.values))
        for mine, its in zip(surprise.curves, other.curves, strict=True)
    ]
    return FilmSurprise(tuple(curves))


def look(
    models: Mapping[str, SurpriseModel], data: str, settings: EvalSettings, scenes: int
) -> list[Violations]:
    """Every model's surprise at `scenes` drawn rooms of each condition and at films of as many held-out
    episodes of `data`; where those cannot be had, says why on stderr and looks at rooms alone."""
    first = next(iter(models.values()))
    windows = Windows(settings.context_frames, frame_steps=(1,), early=False)
    makers = {ROOMS: rooms(settings.seed, scenes, first.geometry)}
    try:
        makers[FILMS] = episodes(data, scenes, first.geometry, first.frame_step)
    except DataError as error:
        print(f"violations: drawn rooms alone, no films of {data}: {error}", file=sys.stderr)
    found = []
    for kind, scenes_of in makers.items():
        with progress(f"Surprise of {kind}", len(scenes_of), "scenes") as advance:
            found.append(_look_at(kind, scenes_of, models, windows, partial(advance, 1)))
    return [each for each in found if each.films.pairs]


def film_frames(geometry: ClipGeometry) -> int:
    """Of a film at the pace that a model was trained at, so that every window of it, but perhaps the first,
    holds the violation in its middle."""
    return max(2 * (geometry.num_frames - geometry.tubelet_size), FEWEST_FRAMES)


class _Shared(FrozenTargets):
    """Targets of the same clips, asked for by one model after the other, computed once."""

    needs_records = False

    def __init__(self, provider: TargetProvider) -> None:
        self.provider, self.dim = provider, provider.dim
        self._last: tuple[bytes, Tensor] | None = None

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        key = xxhash.xxh3_128_digest(frames.cpu().numpy().tobytes())
        if self._last is None or self._last[0] != key:
            self._last = (key, self.provider.targets(frames, records))
        return self._last[1]


def share_targets(models: Mapping[str, SurpriseModel]) -> None:
    """Let models that are held against the same targets, as a run and its random init, share their cost."""
    shared: dict[int, Task] = {}
    for model in models.values():
        if isinstance(model, RunPredictor):
            task = model.task
            model.task = shared.setdefault(id(task), replace(task, provider=_Shared(task.provider)))


def rooms(seed: int, scenes: int, geometry: ClipGeometry) -> list[Pairs]:
    frames = film_frames(geometry)
    return [partial(_drawn, seed, scene, frames, geometry.image_size) for scene in range(scenes)]


def _drawn(seed: int, scene: int, frames: int, size: int) -> list[ViolationPair]:
    return list(rendered_pairs(seed, scene, frames, size))


def episodes(data: str, scenes: int, geometry: ClipGeometry, frame_step: int) -> list[Pairs]:
    """Held-out episodes of the first camera, spread over all that are long enough."""
    geometry = replace(geometry, num_frames=film_frames(geometry), tubelet_size=1)
    view = ViewConfig(frame_stride=frame_step)
    table = split_table(open_table(data, view, geometry)).validation
    camera = table.rows["camera"][0].as_py()
    by_episode: dict[int, list[str]] = {}
    for clip in table.select(camera=camera).clips():
        by_episode.setdefault(clip.episode, []).append(clip.clip_id)
    numbers = sorted(by_episode)
    chosen = sorted({numbers[n * len(numbers) // scenes] for n in range(scenes)})
    reader = ViewReader(table, view, geometry)
    return [partial(_violated, reader, f"episode-{n}", by_episode[n]) for n in chosen]


def _violated(reader: ViewReader, scene: str, clips: list[str]) -> list[ViolationPair]:
    """Of the clip in the episode's middle, where most moves, and the one that is furthest from it."""
    middle = len(clips) // 2
    other = 0 if middle else len(clips) - 1
    films = reader.read_many([(clips[place], 0) for place in dict.fromkeys((middle, other))])
    return list(filmed_pairs(scene, films[0], films[1] if len(films) > 1 else None))


def _look_at(
    kind: str,
    scenes: Iterable[Pairs],
    models: Mapping[str, SurpriseModel],
    windows: Windows,
    advance: Callable[[], None],
) -> Violations:
    twins: list[Pair] = []

    def films_of(make: Pairs) -> list[FilmSource]:
        """A scene's, which are kept in one file."""
        sources = []
        for pair in make():
            films = [_film(pair, label, make) for label in (POSSIBLE, IMPOSSIBLE)]
            sources += [_source(film.name, pair.film(film.label == POSSIBLE)) for film in films]
            twins.append(Pair(*films))
        return sources

    found = store().surprises(models, map(films_of, scenes), windows, advance)
    every = tuple(film for pair in twins for film in (pair.possible, pair.impossible))
    return Violations(FilmSet(kind, every, tuple(twins)), found)


def _source(name: str, frames: UInt8[np.ndarray, "frames height width 3"]) -> FilmSource:
    """Known by its very pixels: whatever draws or violates films may change."""
    return FilmSource(name, f"{frames.shape} {xxhash.xxh3_128_hexdigest(frames.tobytes())}", lambda: frames)


def _film(pair: ViolationPair, label: str, make: Pairs) -> MadeFilm:
    parts = {CONDITION: pair.condition}
    name, run = f"{pair.name}/{label}", f"{pair.condition} {pair.run}"
    return MadeFilm(name, Path(), pair.scene, run, label, parts, pair.frame, make)
