"""Sections of tables in every form that files come in: JSON, CSV, Markdown, LaTeX and one HTML page.

Knows tables and objects, not what they are of.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salt_vla.errors import ConfigError
from salt_vla.files import write_bytes, write_text
from salt_vla.reports.html import ReportContent, render
from salt_vla.reports.latex import to_latex
from salt_vla.reports.tables import Table, markdown_text, to_markdown

Objects = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TableSection:
    """Tables under a heading."""

    heading: str
    tables: list[Table]


def require_folder(folder: Path, option: str = "--out") -> None:
    """Made now, so that nothing is measured in vain. Raises `ConfigError` for what cannot be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "it may not be written into"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ConfigError(f"{option} {folder} is no folder to write into ({reason}); choose another")


def write_forms(
    folder: Path,
    name: str,
    data: Mapping[str, Any],
    sheets: Mapping[str, str],
    sections: Sequence[TableSection],
    page: ReportContent,
    pictures: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """`name`.json (of `data`), .md, .tex and .html, the `sheets` (file → CSV) and `pictures` (file → PNG)
    beside them; their paths."""
    texts = {
        f"{name}.json": json.dumps(data, indent=1),
        **sheets,
        f"{name}.md": _markdown(sections),
        f"{name}.tex": "\n".join(to_latex(table) for section in sections for table in section.tables),
        f"{name}.html": render(page),
    }
    for file, text in texts.items():
        write_text(folder / file, text)
    for file, png in (pictures or {}).items():
        write_bytes(folder / file, png)
    return [folder / file for file in (*texts, *(pictures or {}))]


def to_csv(rows: Objects, columns: Sequence[str] = ()) -> str:
    """One line an object, its fields in the order of `columns` as far as it has them."""
    held = list(dict.fromkeys(name for row in rows for name in row))
    names = [*(name for name in columns if name in held), *(name for name in held if name not in columns)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def facts_of(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values, those of groups after the others."""
    found = [(name, json.dumps(value)) for name, value in about.items() if not isinstance(value, dict)]
    for value in about.values():
        if isinstance(value, dict):
            found += [(name, json.dumps(each)) for name, each in value.items()]
    return found


def _markdown(sections: Sequence[TableSection]) -> str:
    parts = []
    for section in sections:
        parts += [f"## {markdown_text(section.heading)}", ""]
        for table in section.tables:
            title, note = markdown_text(table.title), markdown_text(table.note)
            parts += [f"**{title}**", "", to_markdown(table), note, ""]
    return "\n".join(parts)
