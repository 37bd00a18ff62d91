"""Result rows as tables, and tables as HTML, Markdown or a terminal's rich table.

Targets run down, encoders across. Knows the rows, not where they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from rich.table import Table as RichTable
from rich.text import Text

from salt_vla.reports.rows import (
    SIGNIFICANT,
    Difference,
    Row,
    Score,
    encoder_label,
    in_report_order,
    interval,
    metric_label,
    number,
    pool_differences,
    pool_scores,
    target_label,
    told_from,
)

Mark = Literal["", "best", "ahead", "behind", "level"]
_ARROWS: dict[Mark, str] = {"ahead": "▲", "behind": "▼"}
_RICH_STYLES: dict[Mark, str] = {"best": "bold", "ahead": "bold green", "behind": "bold red", "level": "dim"}
_PROVEN: tuple[Mark, ...] = ("best", "ahead", "behind")


@dataclass(frozen=True)
class Cell:
    """A figure and its interval; `mark` says what the paired intervals allow to be said of it, `is_sure` that
    it also holds corrected for the number of targets."""

    figure: str = ""
    interval: str = ""
    mark: Mark = ""
    is_sure: bool = False

    @property
    def arrow(self) -> str:
        sign = _ARROWS.get(self.mark, "")
        return f"{sign * (1 + self.is_sure)} " if sign else ""

    @property
    def text(self) -> str:
        return f"{self.arrow}{self.figure} {self.interval}".strip()


@dataclass(frozen=True)
class Table:
    """Row names and columns of cells, ready to be written in any of the three forms.

    A row name is (name, unit); the unit is printed quietly beside it.
    """

    title: str
    corner: str
    columns: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    cells: tuple[tuple[Cell, ...], ...]
    note: str = ""


def score_table(
    rows: Iterable[Row], comparisons: Iterable[Row] = (), suite: str = "", title: str = ""
) -> Table:
    """Values `[low, high]` of one suite (of all rows where `suite` is empty).

    An encoder is marked best only where it leads and its paired interval against the runner-up, and against
    everything else it was compared with on that target, excludes zero.
    """
    scores = [score for score in pool_scores(rows) if suite in ("", score.suite)]
    differences = [item for item in pool_differences(comparisons) if suite in ("", item.suite)]
    encoders = in_report_order(score.encoder for score in scores)
    targets = list(dict.fromkeys((score.target, score.metric) for score in scores))
    by_place = {(score.target, score.metric, score.encoder): score for score in scores}
    lines = []
    for target, metric in targets:
        line = [by_place.get((target, metric, encoder)) for encoder in encoders]
        best = _proven_best([score for score in line if score], differences)
        lines.append(tuple(score_cell(score, best) for score in line))
    marked = any(cell.mark == "best" for line in lines for cell in line)
    return Table(
        title=title or "Probes on held-out episodes",
        corner="target",
        columns=tuple(encoder_label(encoder) for encoder in encoders),
        names=tuple((target_label(target), metric_label(metric)) for target, metric in targets),
        cells=tuple(lines),
        note=_score_note(scores, marked),
    )


def difference_table(
    comparisons: Iterable[Row], encoder: str = "student", suite: str = "", title: str = ""
) -> Table:
    """Paired differences of `encoder` against each other encoder, with a mark where the interval is apart."""
    pooled = [item for item in pool_differences(comparisons) if suite in ("", item.suite)]
    differences = told_from(encoder, pooled)
    others = in_report_order(item.against for item in differences)
    targets = list(dict.fromkeys((item.target, item.metric) for item in differences))
    by_place = {(item.target, item.metric, item.against): item for item in differences}
    return Table(
        title=title or f"Paired differences: {encoder_label(encoder)} minus …",
        corner="target",
        columns=tuple(encoder_label(other) for other in others),
        names=tuple((target_label(target), metric_label(metric)) for target, metric in targets),
        cells=tuple(
            tuple(difference_cell(by_place.get((target, metric, other))) for other in others)
            for target, metric in targets
        ),
        note=f"{arrows_note(differences)} {_intervals(differences)}",
    )


def to_html(table: Table) -> str:
    """An HTML `<table>` in a box that scrolls sideways on narrow screens; everything is escaped."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for (name, unit), cells in zip(table.names, table.cells, strict=True):
        quiet = f' <span class="unit">{escape(unit)}</span>' if unit else ""
        body.append(f'<tr><th scope="row">{escape(name)}{quiet}</th>{"".join(map(_html_cell, cells))}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.title, quote=True)
    return (
        f'<div class="table" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption><span>{escape(table.title)}</span></caption>"
        f'<thead><tr><th scope="col">{escape(table.corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def to_markdown(table: Table) -> str:
    """A Markdown table for a log or an issue; the best and the apart are bold."""
    lines = [
        _markdown_line([table.corner, *table.columns]),
        _markdown_line(["---"] + ["---:"] * len(table.columns)),
    ]
    for (name, unit), cells in zip(table.names, table.cells, strict=True):
        texts = [f"**{cell.text}**" if cell.mark in _PROVEN else cell.text for cell in cells]
        lines.append(_markdown_line([f"{name} ({unit})" if unit else name, *texts]))
    return "\n".join(lines) + "\n"


def to_rich(table: Table) -> RichTable:
    """The table for a terminal: interval under the figure, so that five encoders fit."""
    rich = RichTable(title=Text(table.title), caption=Text(table.note) if table.note else None, box=None)
    rich.title_justify = rich.caption_justify = "left"
    rich.add_column(Text(table.corner), overflow="fold")  # Names that are cut look alike.
    for column in table.columns:
        rich.add_column(Text(column), justify="right")
    for (name, unit), cells in zip(table.names, table.cells, strict=True):
        head = Text.assemble(name, (f"\n{unit}" if unit else "", "dim"))
        rich.add_row(head, *map(_rich_cell, cells))
    return rich


def score_cell(score: Score | None, best: str = "") -> Cell:
    """The figure with its interval, marked where the encoder is the `best`; a dash where there is none."""
    if score is None:
        return Cell("–", mark="level")
    mark: Mark = "best" if score.encoder == best else ""
    star = "*" if score.note else ""
    return Cell(number(score.value) + star, interval(score.low, score.high), mark)


def difference_cell(item: Difference | None) -> Cell:
    """The difference with its interval, marked where that excludes zero; a dash where there is none."""
    if item is None:
        return Cell("–", mark="level")
    mark: Mark = "ahead" if item.ahead else "behind" if item.behind else "level"
    spread = interval(item.low, item.high, signed=True)
    return Cell(number(item.difference, signed=True), spread, mark, item.is_sure)


def _proven_best(scores: Sequence[Score], differences: Sequence[Difference]) -> str:
    """The encoder that leads one target beyond doubt, or an empty string."""
    ranked = sorted((s for s in scores if s.value == s.value), key=lambda score: score.value, reverse=True)
    if len(ranked) < 2:
        return ""
    leader, runner_up = ranked[0], ranked[1]
    places = (leader.suite, leader.target, leader.metric)
    here = [item for item in differences if (item.suite, item.target, item.metric) == places]
    duels = told_from(leader.encoder, here)
    met_runner_up = any(duel.against == runner_up.encoder for duel in duels)
    return leader.encoder if met_runner_up and all(duel.ahead for duel in duels) else ""


def arrows_note(differences: Sequence[Difference]) -> str:
    """What the marks of a table of differences mean, p-values as far as it has some."""
    arrows = "▲ ahead, ▼ behind: the paired interval excludes zero"
    if any(item.p_holm is not None for item in differences):
        arrows += f"; ▲▲, ▼▼: and p < {SIGNIFICANT}, corrected (Holm) for the suite's targets"
    elif differences:
        arrows += " (no p-values here)"
    return f"{arrows}; unmarked: the two cannot be told apart."


def _intervals(items: Sequence[Score | Difference]) -> str:
    """How many seeds stand behind a table, and what its intervals are."""
    if not items:
        return ""
    most = max(item.seeds for item in items)
    means = f"Means over {most} seeds. " if most > 1 else ""
    return f"{means}Intervals: {'; '.join(dict.fromkeys(item.spread for item in items))}."


def _score_note(scores: Sequence[Score], marked: bool) -> str:
    bold = (
        "Bold: best, and its paired intervals against the others exclude zero."
        if marked
        else "None is bold: no leader's paired interval against the runner-up excludes zero."
    )
    stars = stars_note(
        (score.note, f"{encoder_label(score.encoder)}, {target_label(score.target)}") for score in scores
    )
    return f"{_intervals(scores)} {bold}{stars}".strip()


def stars_note(notes: Iterable[tuple[str, str]]) -> str:
    """Of (what is to be said, where): each thing once, with all its places."""
    starred: dict[str, list[str]] = {}
    for note, where in notes:
        if note:
            starred.setdefault(note, []).append(where)
    return "".join(f" * {note} ({'; '.join(where)})." for note, where in starred.items())


def _html_cell(cell: Cell) -> str:
    spread = f' <span class="interval">{escape(cell.interval)}</span>' if cell.interval else ""
    kind = f' class="{cell.mark}"' if cell.mark else ""
    return f'<td{kind}><span class="figure">{cell.arrow}{escape(cell.figure)}</span>{spread}</td>'


def _rich_cell(cell: Cell) -> Text:
    figure = Text(cell.arrow + cell.figure, style=_RICH_STYLES.get(cell.mark, ""))
    return figure.append(f"\n{cell.interval}", style="dim") if cell.interval else figure


def markdown_text(text: str) -> str:
    """On one line, and no tag in it."""
    return " ".join(text.split()).replace("<", "\\<")


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(markdown_text(text).replace("|", "\\|") for text in texts) + " |"
