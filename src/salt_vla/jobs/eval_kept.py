"""Where an evaluation's figures are left: beside the runs whose encoders were asked about, and in files that
seeds are joined by.

Knows figures as they came out, not how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import RunError
from salt_vla.evaluation.results import CONSTANT, PROBES_FILE, SuiteResult, to_objects
from salt_vla.evaluation.seeds import scores_to_arrays
from salt_vla.evaluation.settings import OF_CLIPS, POOLINGS, EvalSettings
from salt_vla.models.loading import encoder_directory
from salt_vla.rundir import RunDirectory, read_json, root, run_or_directory, write_atomically, write_text

RESULTS = ("report.json", "comparisons.json", "scores.npz")


def write_results(results: list[SuiteResult], folder: Path) -> None:
    """`report.json` (rows), `comparisons.json` (paired differences) and the sums that seeds are joined by."""
    rows = [row for result in results for row in to_objects(result.rows)]
    pairs = [pair for result in results for pair in to_objects(result.comparisons)]
    write_atomically(folder / "scores.npz", lambda path: _save_npz(path, scores_to_arrays(results)))
    write_text(folder / "comparisons.json", json.dumps(pairs, indent=1))
    write_text(folder / "report.json", json.dumps(rows, indent=1))


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def leave_probes(
    results: Sequence[SuiteResult],
    paths: Mapping[str, str | Path],
    table: ClipTable,
    settings: EvalSettings | None = None,
    frame_stride: int | None = None,
    steps: Mapping[str, int] = {},
) -> list[RunDirectory]:
    """Write each encoder's own rows and comparisons into `probes.json` of the run whose last checkpoint it
    was, in place of what that said of the same suite, probe, settings and clips; those runs. `paths`: where
    each encoder was read from, by its name in the results; `steps`: the step that was read (the last)."""
    left = []
    for name, path in paths.items():
        place = run_or_directory(path)
        run = RunDirectory(root() / "runs" / place.absolute().name)
        if not run.config_file.is_file() or not place.samefile(run.path):
            continue  # A checkpoint or an export: whether it is some run's last, nobody says.
        step = steps.get(name) or int(encoder_directory(place).name.removeprefix("step_"))
        about = {"clip_table": table.hash, "step": step}
        now = []
        for result in results:
            suite = _kept_as(result, settings or EvalSettings(), frame_stride)
            parts = {
                part: [
                    entry | {"suite": suite}
                    for entry in to_objects(each for each in found if each.encoder == name)
                ]
                for part, found in (("rows", result.rows), ("comparisons", result.comparisons))
            }
            now.append({"suite": suite} | about | parts)
        replaced = {(each["suite"], each["clip_table"]) for each in now}
        file = run.path / PROBES_FILE
        kept = [each for each in _kept(file) if (each["suite"], each["clip_table"]) not in replaced]
        write_text(file, json.dumps({"suites": kept + now}, indent=1))
        left.append(run)
    return left


def _kept(file: Path) -> list[dict[str, Any]]:
    """What was left there before. Raises `RunError` for a damaged file."""
    suites = read_json(file, dict).get("suites", []) if file.is_file() else []
    needed = {"suite", "clip_table", "rows"}
    if not isinstance(suites, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in suites):
        raise RunError(f"{file} is damaged (no list of suites with rows); remove it and eval the run anew")
    return suites


def _kept_as(result: SuiteResult, settings: EvalSettings, frame_stride: int | None) -> str:
    """The suite's name in `probes.json`: with the probe, the protocol and the settings, where they are not
    the usual ones, so that runs are compared in what was measured alike."""
    how = {(row.probe, row.protocol) for row in result.rows if row.encoder != CONSTANT}
    said = sorted({word for each in how for word in each} - {"linear", "held-out"})
    usual = EvalSettings()
    for name in OF_CLIPS:
        if getattr(settings, name) != getattr(usual, name):
            said.append(f"{name.replace('_', ' ')} {getattr(settings, name)}")
    if settings.poolings[:1] != POOLINGS[:1] and result.suite.split("/")[-1] not in POOLINGS:
        said += settings.poolings[:1]  # Suites of one table read the first one.
    if frame_stride is not None:
        said.append(f"frame stride {frame_stride}")
    return f"{result.suite} ({', '.join(said)})" if said else result.suite
