"""What watching a run costs its steps: `python benchmarks/overhead.py` (ten minutes, idle machine).

Pairs of the same run take turns: bare, which is the training alone in a process, and watched, which is what
`salt-vla train … --detach --track wandb --track tensorboard` starts: log capture, supervisor with its sign of
life, two keepers and their senders. A run's step is the median of its rows' wall time a step (validation and
checkpoints are in none); a ratio is watched ÷ bare of a pair. Both must come to the same losses.
wandb writes its files and sends nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from salt_vla.operations.launch import supervision
from salt_vla.operations.trackers.journal import Mirror
from salt_vla.rundir import RunDirectory

GOAL = 1.01
TRACKERS = ("wandb", "tensorboard")
FIRST_ROWS = 3  # Of each run, in which memory is touched for the first time.
BARE = """
import sys
from salt_vla.config import override
from salt_vla.jobs.train import train, with_paths
from salt_vla.recipes import get_recipe
recipe, name, *overrides = sys.argv[1:]
train(with_paths(override(get_recipe(recipe).config, overrides), "metaworld-mini", None), name)
"""
COMMON = (
    "data.view.num_views=1",
    "runtime.log_every=5",
    "runtime.checkpoint_every=100000",
    "runtime.validate_every=100000",
)
COMMON += (
    "runtime.validation_clips=4",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "masks.max_targets=0",
)


@dataclass(frozen=True)
class Size:
    """A recipe with overrides, and how many of its steps are one run."""

    recipe: str
    steps: int
    overrides: tuple[str, ...]


SIZES = {
    "tiny": Size(
        "demo_teacher",
        600,
        ("encoder.depth=1", "predictor.depth=1", "batch_size=2"),
    ),
    "demo": Size("demo_teacher", 60, ()),
    "small": Size(
        "demo_teacher",
        25,
        ("encoder.name=vit_tiny_patch16_224", "batch_size=16"),
    ),
}


def arguments(size: Size) -> list[str]:
    return [*size.overrides, *COMMON, f"steps={size.steps}", "optimizer.warmup_steps=4"]


def bare(size: Size, name: str) -> None:
    subprocess.run(
        [sys.executable, "-c", BARE, size.recipe, name, *arguments(size)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def watched(size: Size, name: str, root: Path) -> None:
    trackers = [word for tracker in TRACKERS for word in ("--track", tracker)]
    command = ["train", size.recipe, *arguments(size), "--data", "metaworld-mini", "--name", name, *trackers]
    subprocess.run(
        [sys.executable, "-m", "salt_vla", *command, "--detach"], check=True, stdout=subprocess.DEVNULL
    )
    run = RunDirectory(root / "runs" / name)
    while not ((now := supervision(run.path)) and now.is_over):
        time.sleep(0.2)
    for tracker in TRACKERS:  # They are not to be in the next run's way.
        mirror = Mirror(run, tracker)
        while not (mirror.place_file.exists() and mirror.place().is_closed and not mirror.left()):
            time.sleep(0.2)


def step_of(root: Path, name: str, batch: int) -> tuple[float, list[float]]:
    """Seconds a step, and the losses."""
    rows = RunDirectory(root / "runs" / name).metrics("train")
    seconds = [batch / row["clips_per_s"] for row in rows[FIRST_ROWS:]]
    return statistics.median(seconds), [row["loss"] for row in rows]


def measure(size: Size, label: str, pairs: int, root: Path) -> list[tuple[float, float]]:
    found = []
    for pair in range(-1, pairs):  # The first makes the store of views, and counts for nothing.
        took: dict[str, tuple[float, list[float]]] = {}
        for way in ("bare", "watched") if pair % 2 else ("watched", "bare"):
            name = f"{label}-{pair + 1}-{way}"
            if way == "bare":
                bare(size, name)
            else:
                watched(size, name, root)
            config = json.loads((root / "runs" / name / "config.json").read_text())
            took[way] = step_of(root, name, config["batch_size"])
        if took["bare"][1] != took["watched"][1]:
            raise SystemExit(f"{label}: the watched run has other losses than the bare one")
        if pair >= 0:
            found.append((took["bare"][0], took["watched"][0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=0, help="of every run; default: its size's own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    answer = {}
    with tempfile.TemporaryDirectory(prefix="salt-vla-overhead-") as folder:
        os.environ |= {"SALT_VLA_ROOT": folder, "WANDB_MODE": "offline"}
        for label in options.sizes:
            size = replace(SIZES[label], steps=options.steps or SIZES[label].steps)
            answer[label] = measure(size, label, options.pairs, Path(folder))
    if options.json:
        print(json.dumps(answer))
        return
    table = Table(
        "step", "bare ms", "watched ms", "watched ÷ bare", "goal", title="log, supervisor, two trackers"
    )
    for label, pairs in answer.items():
        low, middle, high = statistics.quantiles([watched / bare for bare, watched in pairs], n=4)
        times = (f"{1000 * statistics.median(column):.2f}" for column in zip(*pairs, strict=True))
        table.add_row(label, *times, f"{middle:.4f} [{low:.4f}, {high:.4f}]", f"< {GOAL}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
