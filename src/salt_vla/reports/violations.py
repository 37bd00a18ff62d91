"""Violations in words and curves: what a model's surprise shows that pixels and random weights do not.

A pure function of scores and curves; claims only what intervals and corrected p-values allow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from salt_vla.evaluation.surprise_scores import PairScore
from salt_vla.reports.canvas import Theme, new_figure, quiet_axes, theme, to_png

SIGNIFICANT = 0.05
CHANCE = 0.5
PANELS_A_ROW = 5
PANEL = 1.75  # inches
LEAST_SHOWN = 0.1  # percent: less is drawn as what it is, a line at zero
Place = tuple[str, str]  # (set, condition)
BASELINES = {
    "random": "random init",
    "copy-last-frame": "copying the last frame",
    "pixel-difference": "the difference of neighbouring frames",
}
CURVES_CAPTION = (
    "How much more the impossible films surprise than the possible ones, in percent of what the possible "
    "ones do, by how many frames of what cannot be a window holds. Zero: nothing is told apart."
)


@dataclass(frozen=True)
class Excess:
    """Mean of (impossible − possible) ÷ possible over a condition's pairs. `seen`: how many frames from the
    violation on a window holds; ascending."""

    set: str
    condition: str
    encoder: str
    seen: tuple[int, ...]
    values: tuple[float, ...]


def conclusions(scores: Sequence[PairScore], told_from_random: Collection[Place], model: str) -> list[str]:
    """What was seen that pixels and random weights do not see, what they see too, what was not seen.

    `told_from_random`: the places (set, condition) where the paired difference of `model` and random weights
    excludes zero, `model` being ahead.
    """
    beyond: list[str] = []
    also: list[str] = []
    missed: list[str] = []
    reversed_: list[str] = []
    for score in scores:
        if score.encoder != model:
            continue
        name = f"{score.part} ({score.set})"
        figures = f"{score.part} ({score.set}; {_figures(score)})"
        if sees(score):
            others = _who_else(scores, score, told_from_random)
            (also if others else beyond).append(f"{figures}, as does {_join(others)}" if others else figures)
        elif score.high < CHANCE:
            reversed_.append(figures)
        else:
            missed.append(name)
    sentences = [
        f"The {model} is more surprised by the impossible where neither pixels nor random weights are: "
        f"{'; '.join(beyond)}."
        if beyond
        else f"In no condition does the {model} see a violation that neither pixels nor random weights see: "
        "these films show no sign of physics in it."
    ]
    if also:
        sentences.append(
            f"It tells apart {'; '.join(also)}: a violation that they see too proves nothing about what was "
            "learned."
        )
    if reversed_:
        sentences.append(f"It is surprised by the possible film instead in {'; '.join(reversed_)}.")
    if missed:
        sentences.append(f"It cannot be told from chance in {_join(missed)}.")
    return sentences


def _who_else(
    scores: Sequence[PairScore], score: PairScore, told_from_random: Collection[Place]
) -> list[str]:
    """Baselines that see it too; random weights are given the benefit of the doubt."""
    place = (score.set, score.part)
    others = [
        BASELINES[other.encoder]
        for other in scores
        if (other.set, other.part) == place and other.encoder in BASELINES and other.low > CHANCE
    ]
    if place not in told_from_random and BASELINES["random"] not in others:
        others.append(f"{BASELINES['random']}, from which it is not told apart")
    return others


def sees(score: PairScore) -> bool:
    """Above chance, by its interval and by the corrected test."""
    return score.low > CHANCE and score.p_holm < SIGNIFICANT


def excess_figure(curves: Sequence[Excess], encoders: Mapping[str, str], dark: bool = False) -> bytes:
    """A panel a condition, a line an encoder (name → label). A PNG."""
    colours = theme(dark)
    places = list(dict.fromkeys((each.set, each.condition) for each in curves))
    rows = -(-len(places) // PANELS_A_ROW)
    figure = new_figure(PANEL * PANELS_A_ROW, PANEL * rows + 0.7, colours.paper, dpi=120)
    panels = list(figure.subplots(rows, PANELS_A_ROW, squeeze=False).flat)
    for axes, (kind, condition) in zip(panels, places, strict=False):
        own = {each.encoder: each for each in curves if (each.set, each.condition) == (kind, condition)}
        _panel(axes, [own[name] for name in encoders if name in own], encoders, colours)
        axes.set_title(f"{condition}\n{kind}", fontsize=8, color=colours.ink, pad=4)
    for axes in panels[len(places) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=8, labelcolor=colours.ink
    )
    figure.supxlabel("frames of what cannot be that a window holds", fontsize=8, color=colours.quiet)
    figure.supylabel("surprise beyond that at possible films, %", fontsize=8, color=colours.quiet)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return to_png(figure)


def _panel(axes: Axes, curves: Sequence[Excess], encoders: Mapping[str, str], colours: Theme) -> None:
    quiet_axes(axes, colours)
    axes.tick_params(labelsize=7)
    axes.axhline(0, color=colours.quiet, linewidth=0.8)
    for curve, colour in zip(curves, colours.series, strict=False):
        percent = [100 * value for value in curve.values]
        label = encoders[curve.encoder]
        axes.plot(curve.seen, percent, color=colour, linewidth=1.3, marker="o", markersize=2, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -LEAST_SHOWN), max(high, LEAST_SHOWN))


def _figures(score: PairScore) -> str:
    return f"{score.value:.0%} [{score.low:.0%}, {score.high:.0%}] of {score.pairs}"


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
