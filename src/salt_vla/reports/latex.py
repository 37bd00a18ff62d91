"""Tables as LaTeX: a plain `tabular`, which needs no package.

Knows what LaTeX takes for orders, not what a table says.
"""

from __future__ import annotations

from salt_vla.reports.tables import Cell, Table

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    # What engines without Unicode fonts lack.
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
    "²": r"\textsuperscript{2}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "’": "'",
    "“": "``",
    "”": "''",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; line breaks and control characters become spaces."""
    return "".join(_ESCAPES.get(sign, sign if sign.isprintable() else " ") for sign in text)


def to_latex(table: Table) -> str:
    """A `tabular` with its caption, to be put into a `table`; figures that are best or apart are bold."""
    head = " & ".join(map(escape, (table.corner, *table.columns)))
    lines = [
        f"% {escape(table.title)}",
        r"\begin{table}",
        rf"\caption{{{escape(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\hline",
        rf"{head} \\",
        r"\hline",
    ]
    for (name, unit), cells in zip(table.names, table.cells, strict=True):
        first = escape(f"{name} ({unit})" if unit else name)
        lines.append(rf"{' & '.join([first, *map(_cell, cells)])} \\")
    lines += [r"\hline", r"\end{tabular}"]
    if table.note:
        lines += ["", rf"{{\footnotesize {escape(table.note)}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    # A bracket behind a line's end would be taken for an option of it.
    return rf"\textbf{{{text}}}" if cell.mark in ("best", "ahead", "behind") else f"{{}}{text}"
