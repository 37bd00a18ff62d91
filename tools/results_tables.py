"""The tables of docs/results.md from the `table.json` that `salt-vla eval … --out` writes.

    python tools/results_tables.py results/table.json

Markdown on standard output: figures of every encoder on every target with their intervals, then paired
differences (`▲`/`▼`: the 95 % interval excludes zero; doubled: p < .05 after Holm's correction, too).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN = ("constant", "state", "pixels", "random", "teacher", "student", "jepa")
ASKED = ("student", "jepa")  # Where none of them is there, every encoder that is no baseline.
AGAINST = ("random", "pixels", "teacher", "student")
BESIDE_STATE = "state+"
WORDS = {"constant": "mean predictor", "random": "random init", "jepa": "JEPA", "pixels": "pixels 16 × 16"}


def number(value: float, signed: bool = False) -> str:
    text = f"{value:{'+' if signed else ''}.3f}"
    return text.replace("-", "−").replace("0.", ".", 1) if abs(value) < 1 else text.replace("-", "−")


def ranged(low: float, high: float, signed: bool = False) -> str:
    return f"[{number(low, signed)}, {number(high, signed)}]"


def marks(pair: dict[str, Any]) -> str:
    if not pair["apart"]:
        return ""
    mark = "▲" if pair["difference"] > 0 else "▼"
    is_sure = pair["p_holm"] is not None and pair["p_holm"] < 0.05
    return mark * (2 if is_sure else 1) + " "


def values(rows: list[dict[str, Any]]) -> list[str]:
    by_target: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_target.setdefault((row["suite"], row["target"], row["metric"]), {})[row["encoder"]] = row
    met = dict.fromkeys(row["encoder"] for row in rows)
    shown = [name for name in SHOWN if name in met]
    shown += [name for name in met if name not in SHOWN and not name.startswith(BESIDE_STATE)]
    lines = [
        f"| suite | target | metric | {' | '.join(WORDS.get(name, name) for name in shown)} |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for (suite, target, metric), found in by_target.items():
        cells = [
            f"{number(found[name]['value'])} {ranged(found[name]['low'], found[name]['high'])}"
            if name in found
            else ""
            for name in shown
        ]
        lines.append(f"| {suite} | {target} | {metric} | {' | '.join(cells)} |")
    return lines


def turned(pair: dict[str, Any]) -> dict[str, Any]:
    """The same difference, the other way round."""
    low, high = -pair["high"], -pair["low"]
    names = {"encoder": pair["against"], "against": pair["encoder"]}
    return pair | names | {"difference": -pair["difference"], "low": low, "high": high}


def differences(pairs: list[dict[str, Any]]) -> list[str]:
    met = dict.fromkeys(pair["encoder"] for pair in pairs)
    others = [name for name in met if name not in SHOWN and not name.startswith(BESIDE_STATE)]
    asked = ASKED if any(name in met for name in ASKED) else tuple(others)
    against = (*AGAINST, *(name for name in asked if name not in SHOWN))
    columns = [(a, b) for a in asked for b in against if a != b]
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for pair in [*pairs, *map(turned, pairs)]:
        key = (pair["encoder"], pair["against"])
        if key in columns:
            found.setdefault((pair["suite"], pair["target"]), {})[key] = pair
    columns = [column for column in columns if any(column in each for each in found.values())]
    titles = [f"{a} − {b}" for a, b in columns]
    lines = [f"| suite | target | {' | '.join(titles)} |", "|---|---|" + "---|" * len(columns)]
    for (suite, target), by_pair in found.items():
        cells = []
        for column in columns:
            if (pair := by_pair.get(column)) is None:
                cells.append("")
                continue
            span = ranged(pair["low"], pair["high"], signed=True)
            cells.append(f"{marks(pair)}{number(pair['difference'], signed=True)} {span}")
        lines.append(f"| {suite} | {target} | {' | '.join(cells)} |")
    counts = []
    for column in columns:
        said = Counter(marks(each[column]).strip() for each in found.values() if column in each)
        counts.append(f"▲ {said['▲'] + said['▲▲']} ({said['▲▲']}), ▼ {said['▼'] + said['▼▼']} ({said['▼▼']})")
    return [*lines, f"| **all** | ahead, behind (after Holm) | {' | '.join(counts)} |"]


def main() -> None:
    said = json.loads(Path(sys.argv[1]).read_text())
    print("\n".join([*values(said["rows"]), "", *differences(said["comparisons"])]))


if __name__ == "__main__":
    main()
