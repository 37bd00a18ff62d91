"""What is written down of a run before its first step, once: what its masks do, and the weights that its
encoder begins with. Reading it back needs no numerical library.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.rundir import RunDirectory, read_json, write_text

MASKS = "masks.json"


def note_masks(run: RunDirectory, config: TrainConfig) -> None:
    """`masks.json` and a line a group in the log: how the run's first batches are masked."""
    from salt_vla.masks import build_masks, report_masks

    if (run.path / MASKS).exists():
        return
    report = report_masks(build_masks(config.masks, config.geometry), config.batch_size, config.seed)
    write_text(run.path / MASKS, json.dumps(asdict(report) | {"summary": report.lines}, indent=2))
    for line in report.lines:
        run.log(line)


def noted_masks(run: RunDirectory) -> dict[str, Any]:
    """`masks.json`; empty for a run that has none. Raises `RunError` for a damaged one."""
    file = run.path / MASKS
    noted = read_json(file, dict) if file.exists() else {}
    lines = noted.get("summary", [])
    if noted and not (lines and isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise RunError(f"{file} is damaged (no summary); remove it and run the same command again")
    return noted
