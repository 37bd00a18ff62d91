"""`demo --seeds N`: the demonstration at several seeds, and one table over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from salt_vla.evaluation.results import Comparison, Row, SuiteResult, from_objects, to_objects
from salt_vla.evaluation.seeds import aggregate_seeds, group_results, scores_from_arrays
from salt_vla.jobs.demo import run_demo
from salt_vla.jobs.demo_plan import Demo, plan_demo
from salt_vla.jobs.demo_report import R2_NAMES, describe, last_r2
from salt_vla.reports.conclusions import conclusions
from salt_vla.reports.tables import difference_table, score_table, to_markdown, to_rich
from salt_vla.rundir import root, write_text


def run_seeds(name: str, num_seeds: int, data: str) -> Path:
    """Run (or resume) the demonstration at seeds 0 … n − 1, then join their tables; the Markdown file.

    Seed 0 is the plain demonstration; seed s lies at `NAME_s<s>`.
    """
    demos = [plan_demo(name if seed == 0 else f"{name}_s{seed}", seed, data) for seed in range(num_seeds)]
    for demo in demos:
        run_demo(demo)
    rows, pairs = aggregate_seeds([result for demo in demos for result in read_results(demo)])
    folder = root() / "runs" / f"{name}_seeds"
    row_objects, pair_objects = to_objects(rows), to_objects(pairs)
    write_text(folder / "rows.json", json.dumps(row_objects, indent=1))
    write_text(folder / "comparisons.json", json.dumps(pair_objects, indent=1))
    return _write_table(folder / "results.md", row_objects, pair_objects, mean_r2(demos), num_seeds)


def read_results(demo: Demo) -> list[SuiteResult]:
    """One seed's tables, with the sums that let seeds be joined over the same episodes."""
    rows = from_objects(Row, json.loads((demo.folder / "report.json").read_text()))
    pairs = from_objects(Comparison, json.loads((demo.folder / "comparisons.json").read_text()))
    with np.load(demo.folder / "scores.npz", allow_pickle=False) as arrays:
        scores = scores_from_arrays({key: arrays[key] for key in arrays.files})
    return group_results(rows, pairs, scores)


def mean_r2(demos: list[Demo]) -> dict[str, float | None]:
    """The students' held-out R² at the end, against each baseline, averaged over seeds."""
    per_seed = [last_r2(demo.student_run) for demo in demos]
    means: dict[str, float | None] = {}
    for name in R2_NAMES:
        values = [row[name] for row in per_seed]
        # Not defined at one seed (a baseline that is perfect): not defined over all of them.
        means[name] = None if None in values else float(np.mean(np.array(values, dtype=float)))
    return means


def _write_table(
    file: Path,
    rows: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    r2: dict[str, float | None],
    num_seeds: int,
) -> Path:
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    names = {suite: describe(suite) for suite in suites}
    sentences = conclusions(rows, pairs, r2, num_seeds, suite=suites[0], suite_names=names)
    parts = [*sentences, ""]
    for suite in suites:
        table = score_table(rows, pairs, suite, title=f"Probes, {names[suite]}, {num_seeds} seeds")
        differences = difference_table(pairs, "student", suite)
        parts += [f"## {table.title}", "", to_markdown(table), "", table.note, ""]
        parts += [f"### {differences.title}", "", to_markdown(differences), "", differences.note, ""]
    write_text(file, "\n".join(parts))
    console = Console()
    for suite in suites[:1]:
        console.print(
            to_rich(score_table(rows, pairs, suite, title=f"Probes, {names[suite]}, {num_seeds} seeds"))
        )
        console.print(to_rich(difference_table(pairs, "student", suite)))
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"Table over seeds: {file}", highlight=False)
    return file
