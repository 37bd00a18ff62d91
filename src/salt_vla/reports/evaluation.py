"""An evaluation as tables in every form: for a terminal, as JSON, CSV, Markdown, LaTeX and one HTML page.

Knows rows, comparisons and costs as plain objects; not where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from salt_vla.reports.forms import TableSection, facts_of, to_csv, write_forms
from salt_vla.reports.html import Block, Facts, ReportContent, Section
from salt_vla.reports.rows import (
    encoder_label,
    in_report_order,
    number,
    pool_differences,
    suites_of,
    told_from,
)
from salt_vla.reports.tables import Cell, Table, difference_table, score_table

BASELINES = ("random", "pixels", "constant")
COLUMNS = (
    *("suite", "target", "metric", "encoder", "value", "low", "high", "interval", "seed", "seeds"),
    *("clips", "episodes", "probe", "protocol", "causal", "alpha", "note"),
)
TEST_SELECTED = "vjepa2-max: the best head on the scored clips themselves, not a held-out figure"
NOT_CAUSAL = "not causal: frames after the target's moment are seen"
Objects = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EvaluationTables:
    """What tables are made of. `names`: the encoders asked for, baselines left out; `compute`: an object an
    encoder, suite and seed; `about`: settings and data."""

    names: Sequence[str]
    rows: Objects
    comparisons: Objects
    compute: Objects = ()
    notes: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def tables_of(found: EvaluationTables) -> list[TableSection]:
    """A section a suite: its figures, and the paired differences of every encoder asked for. Then what all of
    them come to, and what was computed."""
    sections = []
    for suite in suites_of(found.rows):
        rows = [row for row in found.rows if row["suite"] == suite]
        marks = marks_of(rows)
        scores = score_table(rows, found.comparisons, suite, title=f"{suite}{marks}")
        tables = [scores]
        for name in found.names:
            table = difference_table(found.comparisons, name, suite)
            if table.names:
                tables.append(replace(table, title=f"{suite}, paired differences: {name} minus …{marks}"))
        sections.append(TableSection(suite, tables))
    rest = [table for table in (_standing(found), _compute(found.compute)) if table.names]
    return [*sections, TableSection("All together", rest)] if rest else sections


def marks_of(rows: Objects) -> str:
    """What must be said of figures wherever they stand: how they were read, and what they may not claim."""
    said = [f"{' and '.join(sorted({str(row.get('probe', '')) for row in rows} - {''}))} probe"]
    if any(row.get("protocol") == "vjepa2-max" for row in rows):
        said.append(TEST_SELECTED)
    if any(row.get("causal") is False for row in rows):
        of_all = all(row.get("causal") is False for row in rows)
        targets = sorted({str(row["target"]) for row in rows if row.get("causal") is False})
        said.append(NOT_CAUSAL + ("" if of_all else f" ({', '.join(targets)})"))
    return f" [{'; '.join(said)}]"


def _standing(found: EvaluationTables) -> Table:
    """In how many figures each encoder is apart from each other one."""
    differences = pool_differences(found.comparisons)
    lines = {name: told_from(name, differences) for name in found.names}
    others = in_report_order(item.against for line in lines.values() for item in line)
    cells = []
    for line in lines.values():
        met = {other: [item for item in line if item.against == other] for other in others}
        cells.append(tuple(_standing_cell(met[other]) for other in others))
    return Table(
        "In how many figures an encoder is ahead and behind, of all that were compared",
        "encoder",
        tuple(encoder_label(other) for other in others),
        tuple((encoder_label(name), "") for name in lines) if others else (),
        tuple(cells) if others else (),
        "Ahead or behind: the paired 95 % interval excludes zero. Of twenty figures that are truly level one "
        "is expected to look apart.",
    )


def _standing_cell(items: Sequence[Any]) -> Cell:
    if not items:
        return Cell("–", mark="level")
    ahead, behind = sum(item.ahead for item in items), sum(item.behind for item in items)
    return Cell(f"{ahead} ahead, {behind} behind", f"of {len(items)}")


def _compute(compute: Objects) -> Table:
    """What each encoder costs, seeds and suites added up where that means something."""
    names = in_report_order(str(each["encoder"]) for each in compute)
    lines = []
    for name in names:
        mine = [each for each in compute if each["encoder"] == name]
        training = [each["training_flops"] for each in mine if "training_flops" in each]
        steps = [each["training_steps"] for each in mine if "training_steps" in each]
        lines.append(
            (
                Cell(_millions(mine[0].get("parameters"))),
                Cell(number(mine[0]["flops_a_clip"] / 1e9) if mine[0].get("flops_a_clip") else "–"),
                Cell(f"{max(steps):,.0f}" if steps else "–"),
                Cell(number(max(training) / 1e15) if training else "–"),
                Cell(number(sum(each.get("seconds", 0.0) for each in mine))),
                Cell(number(max(each.get("peak_memory_gb", 0.0) for each in mine))),
            )
        )
    return Table(
        "What was computed",
        "encoder",
        ("M parameters", "GFLOP a clip", "training steps", "training PFLOP", "seconds", "GB peak"),
        tuple((encoder_label(name), "") for name in names),
        tuple(lines),
        "FLOP: products of matrices, a multiply-add being two; training without a frozen teacher's own. "
        "Seconds are of suites and seeds together, when they were measured; what had been extracted before "
        "is not in them. Peak: of the whole process, up to then.",
    )


def _millions(parameters: float | None) -> str:
    return "–" if not parameters else number(parameters / 1e6)


def write_tables(found: EvaluationTables, folder: Path) -> list[Path]:
    """`table.json`, `.csv`, `.md`, `.tex`, `.html` and `comparisons.csv`; their paths."""
    sections = tables_of(found)
    sheets = {"table.csv": to_csv(found.rows, COLUMNS), "comparisons.csv": to_csv(found.comparisons)}
    return write_forms(folder, "table", asdict(found), sheets, sections, _page(found, sections))


def _page(found: EvaluationTables, sections: Sequence[TableSection]) -> ReportContent:
    """The summary first; a section a suite, so that the contents lead to it."""
    last = sections[-1] if sections and sections[-1].heading == "All together" else None
    blocks: list[Block] = list(last.tables) if last else []
    return ReportContent(
        title="What the encoders know",
        lead=f"{', '.join(found.names)}; every figure on held-out clips, with its interval.",
        conclusions=[],
        answer=[*blocks, *found.notes],
        sections=[
            *(Section(section.heading, section.tables) for section in sections if section is not last),
            Section("How it was measured", [Facts(facts_of(found.about))]),
        ],
        footer="Intervals are not corrected for the number of targets; a doubled arrow is.",
    )
