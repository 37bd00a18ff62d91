"""Surprise as a page: tables of relative accuracy, and surprise over time below the films of a pair.

Knows figures and films, not how either was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.axes import Axes

from salt_vla.data.film_pairs import Film, FilmSet, Pair
from salt_vla.data.view_lock import resized, square
from salt_vla.evaluation.surprise import Curve, FilmSurprise, Windows
from salt_vla.evaluation.surprise_scores import ALL, OVER, PairScore
from salt_vla.files import write_text
from salt_vla.reports.canvas import Theme, legend, new_figure, quiet_axes, theme, to_png
from salt_vla.reports.html import Facts, Figure, ReportContent, Section, render
from salt_vla.reports.rows import interval, number
from salt_vla.reports.tables import Cell, Table

if TYPE_CHECKING:
    from jaxtyping import UInt8

SIGNIFICANT = 0.05
ROUNDING = 1e-9
TOLD = {"ahead": "above chance", "behind": "below chance", "level": "not told from chance"}
THUMBNAIL = 96
PICTURES_SHOWN = 8
WIDTH = 8.6
THUMBNAIL_ROW = WIDTH / PICTURES_SHOWN * 1.08  # Square, less what labels take.
CURVES_CAPTION = (
    "Above, pictures of the possible and of the impossible film; below, how much each surprised, at the "
    "frame that prediction begins with. Dashed: the first frame in which the films differ, where all before "
    "it are the same. Where the lines part, the model has told the films apart; each panel has a scale of "
    "its own."
)
TABLE_NOTE = (
    "Share of pairs in which the possible film surprises strictly less (ties are not wins), with the middle "
    "95 % of resampled scenes. ▲ better, ▼ worse than chance: the interval excludes 50 % and, above it, the "
    "exact one-sided test after Holm's correction within its kind of part has p < 0.05."
)


@dataclass(frozen=True)
class SurprisePage:
    """`targets`: what each model's predictions are held against, the first one's being the one of interest;
    `sets`: films with what was found of them, by model and film."""

    name: str
    targets: Mapping[str, str]
    windows: Windows
    scores: Sequence[PairScore]
    sets: Sequence[tuple[FilmSet, Mapping[str, Mapping[str, FilmSurprise]]]]


def write_surprise_page(page: SurprisePage, file: Path) -> Path:
    """One HTML file; where it is. Raises `DataError` for films that can no longer be read."""
    write_text(file, render(_content(page)))
    return file


def score_tables(scores: Sequence[PairScore]) -> list[Table]:
    """One a set and way of summing windows up: parts down, models across, with pairs and scenes."""
    tables = []
    for name in dict.fromkeys(score.set for score in scores):
        for over in OVER:
            own = [score for score in scores if (score.set, score.over) == (name, over)]
            parts = list(dict.fromkeys(score.part for score in own))
            encoders = list(dict.fromkeys(score.encoder for score in own))
            by_place = {(score.part, score.encoder): score for score in own}
            cells = tuple(tuple(_cell(by_place.get((part, e))) for e in encoders) for part in parts)
            first = {part: next(score for score in own if score.part == part) for part in parts}
            names = tuple((part, f"{first[part].pairs} pairs, {first[part].scenes} scenes") for part in parts)
            title = f"{name}: relative accuracy, {over} over windows"
            tables.append(Table(title, "pairs", tuple(encoders), names, cells, TABLE_NOTE))
    return tables


def _cell(score: PairScore | None) -> Cell:
    if score is None:
        return Cell()
    said = f"{interval(score.low, score.high)} p {score.p_holm:.2g}"
    return Cell(number(score.value), said, _against_chance(score, score.p_holm))


def _against_chance(score: PairScore, p: float) -> Literal["ahead", "behind", "level"]:
    """Intervals of equal scenes end at their value up to rounding: that alone is no side."""
    if score.low > 0.5 + ROUNDING and p < SIGNIFICANT:
        return "ahead"
    return "behind" if score.high < 0.5 - ROUNDING else "level"


def pair_figure(
    pair: Pair, found: Mapping[str, Mapping[str, FilmSurprise]], models: Sequence[str], dark: bool = False
) -> bytes:
    """Both films as strips over one axis of frames, and below them a panel of surprise for each model (in the
    first setting that was looked at). A PNG."""
    colours = theme(dark)
    films = [_thumbnails(film) for film in (pair.possible, pair.impossible)]
    length = max(len(each) for each in films)
    heights = [THUMBNAIL_ROW, THUMBNAIL_ROW, *[1.25] * len(models)]
    figure = new_figure(WIDTH, sum(heights) + 0.75, colours.paper, dpi=120)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes, each, label in zip(panels, films, ("possible", "impossible"), strict=False):
        _strip(axes, each, length, label, colours)
    for number_of, (axes, model) in enumerate(zip(panels[2:], models, strict=True)):
        curves = [found[model][film.name].curves[0] for film in (pair.possible, pair.impossible)]
        _lines(axes, curves, model, colours, with_legend=number_of == 0)
    apart = first_difference(*films)
    for axes in panels if apart else ():
        axes.axvline(apart, color=colours.quiet, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    if apart:
        panels[2].annotate(
            "films part",
            (apart, 1),
            xytext=(-4, 4),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            ha="right",
            fontsize=8,
            color=colours.quiet,
        )
    panels[-1].set_xlabel("film frame", color=colours.quiet, fontsize=9)
    panels[-1].set_xlim(0, length)
    figure.tight_layout(h_pad=0.5)
    return to_png(figure)


def first_difference(possible: Sequence[np.ndarray], impossible: Sequence[np.ndarray]) -> int:
    """The first frame that the two do not share to the last bit; 0 where they share none, as films do that
    were encoded apart, or where they never part."""
    same = (np.array_equal(*pictures) for pictures in zip(possible, impossible, strict=False))
    return next((number for number, is_same in enumerate(same) if not is_same), 0)


def _thumbnails(film: Film) -> list[UInt8[np.ndarray, "side side 3"]]:
    small = []
    for picture in film.pictures():
        height, width = picture.shape[:2]
        short = min(height, width)
        middle = square(picture, (0.5 * (width / short - 1), 0.5 * (height / short - 1), 1.0))
        small.append(resized(middle[None], min(THUMBNAIL, short))[0])
    return small


def _strip(axes: Axes, pictures: Sequence[np.ndarray], length: int, label: str, colours: Theme) -> None:
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    axes.set_ylabel(label, color=colours.quiet, fontsize=9)
    axes.set_ylim(0, 1)
    width = length / PICTURES_SHOWN
    for place in range(PICTURES_SHOWN):
        middle = int((place + 0.5) * width)
        if middle < len(pictures):
            # Pictures keep clear of one another.
            extent = (place * width + 0.03 * width, (place + 1) * width - 0.03 * width, 0, 1)
            axes.imshow(pictures[middle], extent=extent, aspect="auto", interpolation="nearest")
    axes.set_facecolor("none")


def _lines(axes: Axes, curves: Sequence[Curve], model: str, colours: Theme, with_legend: bool) -> None:
    quiet_axes(axes, colours)
    for curve, label, colour in zip(curves, ("possible", "impossible"), colours.series, strict=False):
        axes.plot(
            curve.first, curve.values, color=colour, linewidth=1.5, marker="o", markersize=2.5, label=label
        )
    axes.set_ylabel("surprise", color=colours.quiet, fontsize=9)
    axes.set_title(model, loc="right", fontsize=9, color=colours.ink, pad=3)
    if with_legend:
        legend(axes, colours, columns=2)


def shown_pairs(films: FilmSet, found: Mapping[str, FilmSurprise]) -> list[tuple[str, Pair]]:
    """(why, pair): the pairs whose impossible film surprises the most and the least more than its twin, and
    the one in the middle: none is chosen for its looks."""

    def gap(pair: Pair) -> float:
        return found[pair.impossible.name].mean - found[pair.possible.name].mean

    ordered = sorted(films.pairs, key=gap)
    places = {
        "the clearest win": len(ordered) - 1,
        "the middle pair": len(ordered) // 2,
        "the clearest loss": 0,
    }
    chosen: dict[int, str] = {}
    for why, place in places.items():
        chosen.setdefault(place, why)
    return [
        (f"{why} (impossible − possible {gap(ordered[n]):+.3g})", ordered[n]) for n, why in chosen.items()
    ]


def _content(page: SurprisePage) -> ReportContent:
    model = next(iter(page.targets))
    models = [model, *[name for name in page.targets if name in ("random", "copy-last-frame")]]
    sections = [Section("Relative accuracy", score_tables(page.scores))]
    for films, found in page.sets:
        blocks = [_pair_block(why, pair, found, models) for why, pair in shown_pairs(films, found[model])]
        sections.append(Section(f"Surprise over time: {films.name}", blocks))
    facts = [(name, f"held against {target}") for name, target in page.targets.items()]
    sections.append(Section("What was compared", [Facts(facts)]))
    whole = [score for score in page.scores if score.part == ALL and score.over == "mean"]
    return ReportContent(
        title=f"Surprise: {page.name}",
        lead=f"{len({s.part for s in page.scores})} parts, windows every {page.windows.stride} frames",
        conclusions=conclusions(whole, model),
        answer=[],
        sections=sections,
    )


def _pair_block(
    why: str, pair: Pair, found: Mapping[str, Mapping[str, FilmSurprise]], models: Sequence[str]
) -> Figure:
    light, dark = (pair_figure(pair, found, models, dark) for dark in (False, True))
    parts = ", ".join(f"{name} {value}" for name, value in pair.parts.items())
    caption = f"Scene {pair.scene}, {why}{f'; {parts}' if parts else ''}. {CURVES_CAPTION}"
    alt = f"Two films of scene {pair.scene} and their surprise over time"
    return Figure(light, caption, alt, dark, wide=True)


def conclusions(scores: Sequence[PairScore], model: str) -> list[str]:
    """In words, whichever way they fall: the model against chance, then what its baselines do."""
    sentences = []
    for score in scores:
        if score.encoder == model:
            told = TOLD[_against_chance(score, score.p)]
            sentences.append(
                f"{score.set}: {model} finds the impossible film more surprising in {score.value:.1%} of "
                f"{score.pairs} pairs [{score.low:.1%}, {score.high:.1%}], {told} (p = {score.p:.2g})."
            )
    for score in scores:
        if score.encoder != model and _against_chance(score, score.p) == "ahead":
            sentences.append(
                f"{score.set}: {score.encoder} is above chance too, with {score.value:.1%} "
                f"[{score.low:.1%}, {score.high:.1%}]: they show without what {model} learned."
            )
    return sentences
