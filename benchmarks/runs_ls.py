"""`salt-vla runs ls` over 10,000 runs: `python benchmarks/runs_ls.py [--runs 10000] [--lines 200]`.

Whole processes, their start included, over directories as training leaves them: most finished, some failed,
one in a hundred damaged, one in work. `--folder` keeps the runs for another time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from salt_vla.config import to_json
from salt_vla.identity import identity
from salt_vla.recipes import get_recipe
from salt_vla.rundir import Status

COMMANDS = ("--help", "runs ls", "runs ls --json", "runs ls --last 20 --best", "runs ls --state failed")
REPEATS = 5
R2 = ("r2_channel_mean", "r2_position_mean", "r2_copy_nearest")


def make_runs(folder: Path, count: int, lines: int) -> None:
    """`count` runs with `lines` lines of metrics each below `folder`."""
    recipe = get_recipe("demo_student")
    config = to_json(recipe.config)
    noted = {key: getattr(recipe, key) for key in ("name", "parent", "hypothesis", "target", "criterion")}
    noted |= {"changed": [], "differs_from_parent": ["steps", "optimizer.warmup_steps"]}
    verdict = {"verdict": "undecided", "reason": "no condition that a program can check", "step": 20 * lines}
    metrics = "".join(json.dumps(row) + "\n" for row in _rows(lines))
    me = identity()
    for number in range(count):
        run = folder / f"run_{number:05d}"
        run.mkdir(parents=True)
        state = "failed" if number % 10 == 3 else "finished"
        status = Status(state, 20 * lines, 20 * lines, 4_000_000 + number, 1.7e9, [100], state, 3600.0)
        if number == count // 2:
            status = Status("running", 10 * lines, 20 * lines, me.pid, me.started)
        (run / "status.json").write_text(json.dumps(asdict(status), indent=2))
        if number % 100 == 7:
            (run / "status.json").write_text("{")
        (run / "config.json").write_text(config)
        (run / "recipe.json").write_text(json.dumps(noted, indent=2))
        (run / "verdict.json").write_text(json.dumps(verdict, indent=2))
        (run / "metrics.jsonl").write_text(metrics)
        (run / "log.txt").write_text("started, step 0\n" * 20)


def _rows(lines: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for line in range(1, lines + 1):
        loss = 0.9 - 0.5 * line / lines
        scores = {"loss": loss} | dict.fromkeys(R2, 1 - loss)
        pace = {"clips_per_s": 93.713, "data_wait_share": 0.0113, "memory_gb": 12.345, "step_s": 0.1677}
        rest = {
            "lr": 1.0e-4,
            "weight_decay": 0.04,
            "grad_norm": 0.159,
            "target_std": 1.01,
            "encoder_rank": 83.2,
        }
        rows.append({"kind": "train", "step": 20 * line} | scores | rest | pace)
        if line % 10 == 0:
            rows.append({"kind": "val", "step": 20 * line, "clips": 256} | scores)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root = chosen.folder or Path(made)
        if not (root / "runs").is_dir():
            make_runs(root / "runs", chosen.runs, chosen.lines)
        program = str(Path(sys.executable).with_name("salt-vla"))
        environment = os.environ | {"SALT_VLA_ROOT": str(root)}
        print(f"{'command':28} {'first s':>8} {'min s':>8} {'median s':>10} {'CPU s':>8}   ({REPEATS} runs)")
        for command in COMMANDS:
            found = [_seconds([program, *command.split()], environment) for _ in range(1 + REPEATS)]
            (first, _), walls, cpus = found[0], [w for w, _ in found[1:]], [c for _, c in found[1:]]
            figures = f"{first:8.3f} {min(walls):8.3f} {statistics.median(walls):10.3f} {min(cpus):8.3f}"
            print(f"{command:28} {figures}", flush=True)


def _seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall, processor) seconds of a process; where the machine is busy, the second says more."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
