"""Figures by how many of the training episodes probes learned from: tables, and a curve a target.

Knows rows and comparisons, each with its `fraction`; not how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from salt_vla.reports.canvas import CHART_WIDTH, Theme, encoder_style, new_figure, quiet_axes, theme, to_png
from salt_vla.reports.evaluation import marks_of
from salt_vla.reports.figures import LOWEST_SCORE_SHOWN
from salt_vla.reports.forms import Objects, TableSection, facts_of, to_csv, write_forms
from salt_vla.reports.html import Block, Facts, Figure, ReportContent, Section
from salt_vla.reports.rows import (
    ENCODERS,
    Score,
    encoder_label,
    in_report_order,
    metric_label,
    number,
    pool_differences,
    pool_scores,
    suites_of,
    target_label,
    told_from,
)
from salt_vla.reports.tables import Cell, Table, arrows_note, difference_cell, score_cell, stars_note

PANELS_A_ROW = 2
SPREAD = 1.045  # of an encoder's dots from the next one's, so that intervals do not hide each other
CAPTION = (
    "By the share of the training episodes that probes learned from, all scored on the same held-out clips: "
    "the dot is the value, the line its 95 % interval for new held-out episodes (not for another draw of the "
    f"training episodes). What lies below {number(LOWEST_SCORE_SHOWN)} is not shown."
)


@dataclass(frozen=True)
class LabelCurve:
    """`rows` and `comparisons` as of `eval`, each with its `fraction`. `names`: the encoders asked for."""

    names: Sequence[str]
    rows: Objects
    comparisons: Objects = ()
    notes: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fractions(self) -> list[float]:
        return sorted({float(row["fraction"]) for row in self.rows})


def curve_tables(found: LabelCurve) -> list[TableSection]:
    """A section a suite, a table a target: encoders, then the paired differences of those asked for; shares
    run across."""
    sections = []
    for suite in suites_of(found.rows):
        targets = dict.fromkeys(str(row["target"]) for row in found.rows if row["suite"] == suite)
        sections.append(TableSection(suite, [_table(found, suite, target) for target in targets]))
    return sections


def _table(found: LabelCurve, suite: str, target: str) -> Table:
    scores, differences = [], []
    for fraction in found.fractions:
        here = (suite, target, fraction)
        scores.append(pool_scores(row for row in found.rows if _place(row) == here))
        pairs = pool_differences(pair for pair in found.comparisons if _place(pair) == here)
        differences.append([item for name in found.names for item in told_from(name, pairs)])
    encoders = in_report_order(score.encoder for each in scores for score in each)
    duels = list(dict.fromkeys((item.encoder, item.against) for each in differences for item in each))
    lines = [
        *(tuple(_of(each, (name,)) for each in scores) for name in encoders),
        *(tuple(_of(each, duel) for each in differences) for duel in duels),
    ]
    labels = [encoder_label(name) for name in encoders]
    labels += [f"{encoder_label(one)} − {encoder_label(other)}" for one, other in duels]
    metric = metric_label(next(score.metric for each in scores for score in each))
    spread = next(score.spread for each in scores for score in each)
    shares = tuple(f"{100 * fraction:g} %" for fraction in found.fractions)
    stars = stars_note(
        (score.note, f"{encoder_label(score.encoder)}, {share}")
        for share, each in zip(shares, scores, strict=True)
        for score in each
    )
    pairs_told = [item for each in differences for item in each]
    marks = marks_of([row for row in found.rows if (row["suite"], row["target"]) == (suite, target)])
    return Table(
        f"{suite}: {target_label(target)} ({metric}), by share of the training episodes{marks}",
        "encoder",
        shares,
        tuple((label, "") for label in labels),
        tuple(lines),
        f"Intervals: {spread}. {arrows_note(pairs_told)}{stars}",
    )


def _place(row: Mapping[str, Any]) -> tuple[str, str, float]:
    return str(row["suite"]), str(row["target"]), float(row["fraction"])


def _of(items: Sequence[Any], who: tuple[str, ...]) -> Cell:
    """The cell of an encoder, or of a pair of them."""
    for item in items:
        if isinstance(item, Score):
            if (item.encoder,) == who:
                return score_cell(item)
        elif (item.encoder, item.against) == who:
            return difference_cell(item)
    return Cell("–", mark="level")


def curve_figure(rows: Objects, suite: str, dark: bool = False) -> bytes:
    """A panel a target: shares across on a logarithmic scale, an encoder a line, intervals upright."""
    colours = theme(dark)
    mine = [row for row in rows if row["suite"] == suite]
    targets = list(dict.fromkeys(str(row["target"]) for row in mine))
    encoders = in_report_order(str(row["encoder"]) for row in mine)
    columns = min(PANELS_A_ROW, len(targets))
    lines = math.ceil(len(targets) / columns)
    figure = new_figure(CHART_WIDTH * columns, 0.7 + 2.5 * lines, colours.paper)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, target in zip(panels, targets, strict=False):
        _panel(axes, [row for row in mine if row["target"] == target], encoders, colours)
    for axes in panels[len(targets) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", ncols=len(labels), frameon=False, fontsize=9,
        labelcolor=colours.ink, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip
    figure.supxlabel("training episodes that the probe learned from", color=colours.quiet, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (0.7 + 2.5 * lines)), h_pad=1.6, w_pad=2.0)
    return to_png(figure)


def _panel(axes: Axes, rows: Objects, encoders: Sequence[str], colours: Theme) -> None:
    quiet_axes(axes, colours)
    others = [name for name in encoders if name not in ENCODERS]
    for place, encoder in enumerate(encoders):
        mine = [row for row in rows if row["encoder"] == encoder]
        scores = [
            (fraction, score)
            for fraction in sorted({float(row["fraction"]) for row in mine})
            for score in pool_scores(row for row in mine if float(row["fraction"]) == fraction)
        ]
        aside = SPREAD ** (place - (len(encoders) - 1) / 2)
        colour, marker = encoder_style(encoder, others, colours)
        axes.errorbar(
            [100 * fraction * aside for fraction, _ in scores],
            [score.value for _, score in scores],
            yerr=[
                [max(score.value - score.low, 0) for _, score in scores],
                [max(score.high - score.value, 0) for _, score in scores],
            ],
            color=colour, marker=marker, markersize=3.8, linewidth=1.2, elinewidth=1.0,
            label=encoder_label(encoder),
        )  # fmt: skip
    shares = sorted({100 * float(row["fraction"]) for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g} %" for share in shares])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LOWEST_SCORE_SHOWN), max(high, LOWEST_SCORE_SHOWN + 0.1))
    metric = metric_label(str(rows[0]["metric"]))
    title = f"{target_label(str(rows[0]['target']))} ({metric})"
    axes.set_title(title, loc="left", color=colours.ink, fontsize=10)


def write_curve(found: LabelCurve, folder: Path) -> list[Path]:
    """`curve.json`, `.csv`, `.md`, `.tex`, `.html`, `curve-comparisons.csv` and a picture a suite; their
    paths."""
    sections = curve_tables(found)
    pictures = {section.heading: curve_figure(found.rows, section.heading) for section in sections}
    page = ReportContent(
        title="What the encoders know, by how many labels",
        lead=f"{', '.join(found.names)}; probes of "
        f"{', '.join(f'{100 * share:g} %' for share in found.fractions)} of the training episodes.",
        conclusions=[],
        answer=list(found.notes),
        sections=[
            *(_section(each, found.rows, pictures[each.heading]) for each in sections),
            Section("How it was measured", [Facts(facts_of(found.about))]),
        ],
        footer="Intervals are not corrected for the number of targets and shares.",
    )
    sheets = {"curve.csv": to_csv(found.rows), "curve-comparisons.csv": to_csv(found.comparisons)}
    files = {f"curve-{suite.replace('/', '-')}.png": png for suite, png in pictures.items()}
    return write_forms(folder, "curve", asdict(found), sheets, sections, page, files)


def _section(section: TableSection, rows: Objects, light: bytes) -> Section:
    drawn = Figure(
        light,
        CAPTION,
        f"Curves of {section.heading}: every encoder's figures by share of the training episodes.",
        curve_figure(rows, section.heading, dark=True),
        wide=True,
    )
    blocks: list[Block] = [drawn, *section.tables]
    return Section(section.heading, blocks)
