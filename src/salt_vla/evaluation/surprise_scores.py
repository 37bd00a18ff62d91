"""From the surprise of films to figures: relative accuracy of all pairs and of each part of them.

Knows pairs and what was found of their films; neither networks nor how films are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from salt_vla.data.film_pairs import Pair
from salt_vla.errors import DataError
from salt_vla.evaluation.intphys2 import chance_p_value, pair_sums
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.significance import holm
from salt_vla.evaluation.statistics import interval
from salt_vla.evaluation.surprise import FilmSurprise, Setting

Over = Literal["mean", "max"]
OVER: tuple[Over, ...] = ("mean", "max")  # windows
FEWEST_SCENES = 2
ALL = "all"


@dataclass(frozen=True)
class Part:
    """Some of a set's pairs (`places`), looked at in one setting or in all. `family`: what its p-value is
    corrected within, such as the column that it is a value of; "" for none."""

    name: str
    family: str
    places: tuple[int, ...]
    setting: Setting | None = None


@dataclass(frozen=True)
class PairScore:
    """One figure. `p` is one-sided against chance, `p_holm` corrected for the other parts of its family;
    `scenes` is what the interval resamples; `ties` are pairs that surprised equally, which are not wins."""

    encoder: str
    set: str
    part: str
    over: Over
    value: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int
    scenes: int
    ties: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Found = Mapping[str, Mapping[str, FilmSurprise]]  # encoder → film → surprise


def parts_of(pairs: Sequence[Pair], settings: Sequence[Setting]) -> list[Part]:
    """All pairs; each value of each column; and each setting where there are several. Parts of one scene
    have no interval and are left out."""
    everything = tuple(range(len(pairs)))
    parts = [Part(ALL, "", everything)]
    columns = dict.fromkeys(column for pair in pairs for column in pair.parts)
    for column in columns:
        values = dict.fromkeys(pair.parts[column] for pair in pairs if column in pair.parts)
        for value in values:
            places = tuple(n for n, pair in enumerate(pairs) if pair.parts.get(column) == value)
            if len({pairs[n].scene for n in places}) >= FEWEST_SCENES:
                parts.append(Part(f"{column}={value}", column, places))
    if len(settings) > 1:
        parts += [Part(str(setting), "setting", everything, setting) for setting in settings]
    return parts


def score_pairs(name: str, pairs: Sequence[Pair], found: Found) -> tuple[list[Scored], list[PairScore]]:
    """The set's figures, for the tables of `eval` and for the report.

    Raises `DataError` for a set of fewer than two scenes, and for a film that nothing was found of.
    """
    if len({pair.scene for pair in pairs}) < FEWEST_SCENES:
        raise DataError(f"{name} has pairs of one scene only: an interval needs {FEWEST_SCENES} or more")
    scored, scores = [], []
    for encoder, films in found.items():
        settings = [curve.setting for curve in next(iter(films.values())).curves]
        for over in OVER:
            table = [_score(name, encoder, part, over, pairs, films) for part in parts_of(pairs, settings)]
            corrected = _corrected([(part, score.p) for part, score, _ in table])
            for (part, score, one), p_holm in zip(table, corrected, strict=True):
                scores.append(PairScore(**score.as_dict() | {"p_holm": p_holm}))
                scored.append(Scored(**_fields(one) | {"note": _note(score, p_holm, part)}))
    return scored, scores


def _score(
    name: str,
    encoder: str,
    part: Part,
    over: Over,
    pairs: Sequence[Pair],
    films: Mapping[str, FilmSurprise],
) -> tuple[Part, PairScore, Scored]:
    chosen = [pairs[place] for place in part.places]
    possible = [_value(films, pair.possible.name, part.setting, over) for pair in chosen]
    impossible = [_value(films, pair.impossible.name, part.setting, over) for pair in chosen]
    scenes = [pair.scene for pair in chosen]
    sums = pair_sums(possible, impossible, scenes)
    estimate = interval(sums)
    p = chance_p_value(possible, impossible, scenes)
    ties = sum(a == b for a, b in zip(possible, impossible, strict=True))
    figures = (estimate.value, estimate.low, estimate.high, p, p)
    counts = (len(chosen), len(sums.episodes), ties)
    suite = f"intphys2/{name}" + (f"/{part.name}" if part.name != ALL else "")
    target = f"{over} surprise"
    return (
        part,
        PairScore(encoder, name, part.name, over, *figures, *counts),
        Scored(encoder, suite, target, sums, probe="predictor"),
    )


def _value(films: Mapping[str, FilmSurprise], film: str, setting: Setting | None, over: Over) -> float:
    if film not in films:
        raise DataError(f"nothing was found of film {film}: its pair cannot be scored")
    surprise = films[film]
    if setting is None:
        return surprise.mean if over == "mean" else surprise.max
    curve = next(curve for curve in surprise.curves if curve.setting == setting)
    return curve.mean if over == "mean" else curve.max


def _corrected(found: Sequence[tuple[Part, float]]) -> list[float]:
    """P-values after Holm's correction within each family; as they are outside of one."""
    corrected = [p for _, p in found]
    for family in {part.family for part, _ in found if part.family}:
        places = [n for n, (part, _) in enumerate(found) if part.family == family]
        for place, p in zip(places, holm([found[n][1] for n in places]), strict=True):
            corrected[place] = p
    return corrected


def _fields(one: Scored) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def _note(score: PairScore, p_holm: float, part: Part) -> str:
    note = f"against chance p = {score.p:.2g}"
    if part.family:
        note += f" ({p_holm:.2g} after Holm)"
    return note + f"; {score.ties} ties" * bool(score.ties)
