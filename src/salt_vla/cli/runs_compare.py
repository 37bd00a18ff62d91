"""`salt-vla runs compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from salt_vla.cli.printing import print_json, printable
from salt_vla.errors import UserError
from salt_vla.operations.compare import AXES, COLUMNS, Comparison
from salt_vla.operations.compare import compare as compare_runs
from salt_vla.operations.compare_tables import UNITS, TextTable, label, tables_of
from salt_vla.rundir import require_place, write_text

if TYPE_CHECKING:
    from salt_vla.reports.html import Figure
    from salt_vla.reports.tables import Table

ACROSS = {"steps": "step", "clips": "clips", "flops": "PFLOP"}


def compare(
    names: Annotated[tuple[str, ...], tyro.conf.Positional],
    column: str = COLUMNS[0],
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Runs beside one another: settings, figures, curves at equal steps, clips and FLOPs, seeds, and probes.

    Runs that differ in their seed alone are taken together, with an interval from three seeds on.

    Example: salt-vla runs compare demo_student slower --html compared.html

    Args:
        names: of two runs or more.
        column: what is compared at equal points and over seeds, as KIND.COLUMN of metrics.jsonl.
        html: also write a page with the curves.
        json: print JSON instead of tables.
    """
    if len(set(names)) < 2:
        raise UserError("a comparison needs two runs or more; `salt-vla runs ls` lists them")
    if html is not None:
        require_place(html)
    found = compare_runs(names, column)
    if html is not None:
        write_text(html, _page(found))
    if json:
        return print_json(found.to_json())
    for table in tables_of(found):
        _print(table)
    if html is not None:
        print(f"written: {html}")


def _print(table: TextTable) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(box=None, pad_edge=False)
    for place, column in enumerate(table.columns):
        shown.add_column(column, overflow="fold", no_wrap=place == 0 and len(table.columns) < 6)
    for row in table.rows:
        shown.add_row(*map(printable, row))
    console = Console(markup=False, emoji=False, highlight=False)
    with console.capture() as captured:  # Else it would end the program when its reader has left.
        console.print(table.title, style="bold")
        console.print(shown)
        for line in table.note.splitlines():
            console.print(printable(line), style="dim")
        console.print()
    print(captured.get(), end="")


def _page(found: Comparison) -> str:
    from salt_vla.reports.html import ReportContent, Section, render

    tables = tables_of(found)
    warnings = [f"Not to be ranked: {said}." for said in found.incomparable]
    return render(
        ReportContent(
            title=f"{len(found.runs)} runs compared",
            lead=f"By {label(found.column)}: {', '.join(found.names)}.",
            conclusions=[*warnings, *_sentences(found), *(f"Seeds: {said}." for said in found.apart)],
            answer=_curves(found),
            sections=[
                Section(part, [_cells(table) for table in tables if table.part == part])
                for part in dict.fromkeys(table.part for table in tables)
            ],
        )
    )


def _sentences(found: Comparison) -> list[str]:
    """What the seeds allow to be said."""
    said = []
    for row in found.paired:
        if row.low is None or row.high is None:
            said.append(f"{row.first} and {row.against}: {row.note}; a difference cannot be claimed.")
            continue
        claim = "differ" if row.apart else "cannot be told apart"
        span = f"{row.mean:+.4g} [{row.low:+.4g}, {row.high:+.4g}], {row.note}"
        said.append(f"{row.first} and {row.against} {claim} in {label(found.column)}: {span}.")
    return said


def _curves(found: Comparison) -> list[Figure]:
    from salt_vla.reports.figures import LOWEST_R2_SHOWN
    from salt_vla.reports.html import Figure
    from salt_vla.reports.overlay import overlay

    figures, lowest = [], LOWEST_R2_SHOWN if ".r2_" in found.column else None
    for axis in AXES:
        curves = {}
        for run in found.runs:
            x, values = run.curve(found.column, axis)
            curves[run.name] = ([each / UNITS[axis] for each in x], values)
        if not any(x for x, _ in curves.values()):
            continue
        light, dark = (
            overlay(curves, ACROSS[axis], label(found.column), is_dark, lowest) for is_dark in (False, True)
        )
        lacking = [name for name, (x, _) in curves.items() if not x]
        without = f" Not drawn, since it is not known of them: {', '.join(lacking)}." if lacking else ""
        text = f"{label(found.column)} by {ACROSS[axis]}"
        figures.append(Figure(light, f"{text}.{without}", f"Curves of {', '.join(curves)}: {text}", dark))
    return figures


def _cells(table: TextTable) -> Table:
    from salt_vla.reports.tables import Cell, Table

    return Table(
        title=table.title,
        corner=table.columns[0],
        columns=table.columns[1:],
        names=tuple((row[0], "") for row in table.rows),
        cells=tuple(tuple(Cell(text) for text in row[1:]) for row in table.rows),
        note=table.note.replace("\n", " "),
    )
