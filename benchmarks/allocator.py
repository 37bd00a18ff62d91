"""What `keep_freed_memory` saves: `python benchmarks/allocator.py [turns]`, on an otherwise idle machine.

Processes that keep memory that was freed and processes that leave it to the C library take turns, each with
the same work: an encoder's bare forward (as `eval` and `cache build` ask for it), or a training step with
cached targets, ViT-B at 16 × 224² and a demo student. The first two repetitions warm up. The ratio is default
÷ kept, the median over turns and its quartiles; page faults are those of one repetition.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from salt_vla.config import TrainConfig
from salt_vla.freed_memory import keep_freed_memory
from salt_vla.recipes import get_recipe

COLUMNS = "{:<28} {:>13} {:>13} {:>22} {:>15} {:>15} {:>9} {:>9}"
WORK = {"tiny": 10, "small": 10, "base": 8, "step base": 4, "step demo": 20}
REPETITIONS = {"tiny": 5, "small": 3, "base": 2, "step base": 2, "step demo": 12}
WARM_UP = 2


def forward(size: str, clips: int) -> Callable[[], object]:
    from salt_vla.teachers import load_teacher

    model = load_teacher(f"random:vit_{size}_patch16_224")
    frames = torch.zeros(clips, 16, 224, 224, 3, dtype=torch.uint8)
    return lambda: model.latents(frames)


def step(recipe: str, clips: int) -> Callable[[], object]:
    from train_step import make_work, our_contenders

    config = TrainConfig() if recipe == "base" else get_recipe("demo_student").config
    contender = our_contenders("cached", config, "cpu")[0]
    work = [make_work(config, clips, number, "cpu") for number in range(4)]
    turn = iter(range(10**6))
    return lambda: contender.take(work[next(turn) % len(work)], "float32")


def child(name: str, is_kept: bool) -> None:
    kind, _, of = name.rpartition(" ")
    take = (step if kind else forward)(of, WORK[name])
    if is_kept and not keep_freed_memory():
        sys.exit("this C library has no mallopt: there is nothing to compare")
    seconds = []
    for number in range(WARM_UP + REPETITIONS[name]):
        if number == WARM_UP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.perf_counter()
        take()
        seconds.append(time.perf_counter() - began)
    used = resource.getrusage(resource.RUSAGE_SELF)
    faults = (used.ru_minflt - faults) // REPETITIONS[name]
    print(json.dumps([sum(seconds[WARM_UP:]) / REPETITIONS[name], faults, used.ru_maxrss / 1e6]))


def measured(name: str, how: str) -> list[float]:
    command = [sys.executable, __file__, "child", name, how]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: list[float] = json.loads(told.splitlines()[-1])
    return found


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    names = sys.argv[2:] or list(WORK)
    titles = (
        "work",
        "default s",
        "kept s",
        "default / kept",
        "faults default",
        "faults kept",
        "GB",
        "GB kept",
    )
    print(COLUMNS.format(*titles), flush=True)
    for name in names:
        found: dict[str, list[list[float]]] = {"default": [], "kept": []}
        for turn in range(turns):
            for how in ("default", "kept") if turn % 2 else ("kept", "default"):
                found[how].append(measured(name, how))
        default, kept = (np.array(found[how]) for how in ("default", "kept"))
        low, middle, high = np.quantile(default[:, 0] / kept[:, 0], [0.25, 0.5, 0.75])
        each = [np.median(rows, axis=0) for rows in (default, kept)]
        print(
            COLUMNS.format(
                f"{name}, {WORK[name]} clips", *(f"{one[0]:.3f}" for one in each),
                f"{middle:.3f} [{low:.3f}, {high:.3f}]", *(f"{one[1]:,.0f}" for one in each),
                *(f"{one[2]:.2f}" for one in each),
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3] == "kept")
    else:
        main()
