"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # Escape sequences among them.


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Cells are shown as they are: `[red]` and `:x:` are no orders here, nor is what a terminal obeys."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(row[c])) for c in columns))
    console = Console(markup=False, emoji=False)
    with console.capture() as captured:  # Else it would end the program when its reader has left.
        console.print(table)
    print(captured.get(), end="")
