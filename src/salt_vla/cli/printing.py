"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MANY = 200  # rows from which on a table that is laid out by its contents takes too long
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # Escape sequences among them.


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_rows(rows: Iterable[Any]) -> None:
    """A JSON list, a line each: indented, ten thousand take seconds."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    print(f"[\n{lines}\n]" if lines else "[]")


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Cells are shown as they are: `[red]` and `:x:` are no orders here, nor is what a terminal obeys."""
    if len(rows) > MANY:
        return _print_plainly(rows, columns)
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(printable(str(row[c])) for c in columns))
    console = Console(markup=False, emoji=False)
    with console.capture() as captured:  # Else it would end the program when its reader has left.
        console.print(table)
    print(captured.get(), end="")


def _print_plainly(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """One line a row, however long: nobody reads so many on one screen."""
    table = [list(columns), *([printable(str(row[c])).replace("\n", " ") for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    print("\n".join(form.format(*line).rstrip() for line in table))
