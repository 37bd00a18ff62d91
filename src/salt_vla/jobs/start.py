"""What is written down of a run before its first step, once: what its masks do, and what its steps cost.
Reading it back needs no numerical library.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.rundir import RunDirectory, read_json, write_text

MASKS, COST = "masks.json", "cost.json"


def note_masks(run: RunDirectory, config: TrainConfig) -> None:
    """`masks.json` and a line a group in the log: how the run's first batches are masked."""
    from salt_vla.masks import build_masks, report_masks

    if (run.path / MASKS).exists():
        return
    report = report_masks(build_masks(config.masks, config.geometry), config.batch_size, config.seed)
    write_text(run.path / MASKS, json.dumps(asdict(report) | {"summary": report.lines}, indent=2))
    for line in report.lines:
        run.log(line)


def note_cost(run: RunDirectory, config: TrainConfig, target_dim: int, clips: int) -> None:
    """`cost.json`: parameters, and what a step and an epoch over `clips` training clips take. FLOPs are those
    of `training.flops`, averaged over the masks of the first steps; a frozen teacher's own are left out."""
    from salt_vla.masks import build_masks
    from salt_vla.training.flops import mean_step_flops
    from salt_vla.training.memory import parameters

    if (run.path / COST).exists():
        return
    size = parameters(config, target_dim)
    flops = mean_step_flops(config, target_dim, build_masks(config.masks, config.geometry))
    cost = {
        "parameters": {"encoder": size.encoder, "predictor": size.predictor},
        "flops_a_clip": flops.parts | {"total": flops.total},
        "flops_a_step": flops.total * config.batch_size,
        "clips_a_step": config.batch_size,
        "clips_an_epoch": clips,
        "tokens_a_clip": config.geometry.num_tokens,
    }
    write_text(run.path / COST, json.dumps(cost, indent=2))


def noted_masks(run: RunDirectory) -> dict[str, Any]:
    """`masks.json`; empty for a run that has none. Raises `RunError` for a damaged one."""
    file = run.path / MASKS
    noted = read_json(file, dict) if file.exists() else {}
    lines = noted.get("summary", [])
    if noted and not (lines and isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise RunError(f"{file} is damaged (no summary); remove it and run the same command again")
    return noted
