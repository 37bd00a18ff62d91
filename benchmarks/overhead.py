"""What watching a run costs its steps: `python benchmarks/overhead.py` (eight minutes, idle machine).

One run each size, as `salt-vla train … --detach --track wandb --track tensorboard` starts it: log companion,
supervisor with its sign of life, two keepers, their senders and wandb's service, which writes files and sends
nothing. In turns all of these are stopped (SIGSTOP) and go on, some seconds each, while the training goes on;
a pair is a stretch without them and the one with them after it, so that changes of the machine fall on both.
What they could not do while they stood still they do in the stretch that counts against them: the ratio is
above what watching really costs, and noisy. So the processor time that they use in a minute of their own is
there too, as a share of all cores: a training that uses every core loses that much, another less. What is
done in each step within the process is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from salt_vla import senders
from salt_vla.rundir import RunDirectory

TRACKERS = ("wandb", "tensorboard")
SECONDS_TO_SETTLE = 10.0  # after the start: memory is touched for the first time, trackers load
LONGEST_START = 300.0
SECONDS_OF_CPU = 60.0
FEWEST_ROWS = 3
COMMON = (
    "data.view.num_views=1",
    "runtime.log_every=5",
    "runtime.checkpoint_every=1000000",
    "runtime.validate_every=1000000",
    "runtime.validation_clips=4",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "masks.max_targets=0",
    "optimizer.warmup_steps=4",
    "steps=1000000",
)


@dataclass(frozen=True)
class Size:
    """Overrides of `demo_teacher`, and the seconds of a stretch."""

    seconds: float
    overrides: tuple[str, ...] = ()


SIZES = {
    "tiny": Size(4.0, ("encoder.depth=1", "predictor.depth=1", "batch_size=2")),
    "demo": Size(8.0),
}


@contextmanager
def watched(size: Size, name: str, root: Path) -> Iterator[RunDirectory]:
    """Such a run, past its start."""
    trackers = [word for tracker in TRACKERS for word in ("--track", tracker)]
    command = ["train", "demo_teacher", *size.overrides, *COMMON]
    command += ["--data", "metaworld-mini", "--name", name, *trackers, "--detach"]
    subprocess.run([sys.executable, "-m", "salt_vla", *command], check=True, stdout=subprocess.DEVNULL)
    run, until = RunDirectory(root / "runs" / name), time.monotonic() + LONGEST_START
    try:
        while not run.metrics("train"):
            if time.monotonic() > until:
                raise SystemExit(f"{name} did not begin: {run.log_file} says why")
            time.sleep(0.2)
        time.sleep(SECONDS_TO_SETTLE)
        yield run
    finally:
        ends = [sys.executable, "-m", "salt_vla", "runs", "kill", name]
        subprocess.run(ends, check=False, stdout=subprocess.DEVNULL)


def watchers(run: RunDirectory, root: Path) -> list[psutil.Process]:
    """Every process below the root but this one, the training and the processes that read its data."""
    own = {os.getpid(), run.status().pid}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_reader = "multiprocessing" in " ".join(process.cmdline())
            is_below = process.environ().get("SALT_VLA_ROOT") == str(root)
            if is_below and not is_reader and process.pid not in own:
                found.append(process)
    return found


def share_of_cores(them: list[psutil.Process], seconds: float) -> float:
    """Processor time that they use from now on, of all that there is."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in them)

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)


def stretch(run: RunDirectory, seconds: float) -> float:
    """Mean seconds a clip over that time or more, by the rows that lie in it whole."""
    before, until = len(run.metrics("train")), time.monotonic() + LONGEST_START
    time.sleep(seconds)
    while len(rows := run.metrics("train")[before + 1 :]) < FEWEST_ROWS:
        if time.monotonic() > until:
            raise SystemExit(f"{run.name} stands still; {run.log_file} may say why")
        time.sleep(0.1)
    return statistics.fmean(1 / row["clips_per_s"] for row in rows)


@dataclass(frozen=True)
class Measured:
    """(seconds a step without, with) of each pair; how many processes watch, and their share of all cores."""

    pairs: list[tuple[float, float]]
    processes: int
    share: float


def measure(size: Size, label: str, pairs: int, root: Path) -> Measured:
    found = []
    with watched(size, label, root) as run:
        batch = json.loads(run.config_file.read_text())["batch_size"]
        them = watchers(run, root)
        share = share_of_cores(them, SECONDS_OF_CPU)
        for _ in range(pairs):
            try:
                for process in them:
                    process.send_signal(signal.SIGSTOP)
                without = stretch(run, size.seconds)
            finally:
                for process in them:
                    process.send_signal(signal.SIGCONT)
            found.append((batch * without, batch * stretch(run, size.seconds)))
    return Measured(found, len(them), share)


def within_the_process() -> float:
    """Seconds that listening for signals adds to a step, the one thing that is done in each."""
    senders.listen(lambda number, sender: None)
    return timeit.timeit(senders.listen_again, number=100_000) / 100_000


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 %, of the median, by the bootstrap over pairs."""
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    columns = ("step", "without, ms", "with, ms", "with ÷ without", "processes", "CPU, of all cores")
    table = Table(
        *columns, title="log companion, supervisor, wandb and TensorBoard; their share of CPU: < 1 %"
    )
    with tempfile.TemporaryDirectory(prefix="salt-vla-overhead-") as folder:
        root = Path(folder).resolve()
        os.environ |= {"SALT_VLA_ROOT": str(root), "WANDB_MODE": "offline"}
        for label in options.sizes:
            found = measure(SIZES[label], label, options.pairs, root)
            ratios = [there / bare for bare, there in found.pairs]
            low, high = interval(ratios)
            times = (f"{1000 * statistics.median(column):.2f}" for column in zip(*found.pairs, strict=True))
            said = f"{statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]"
            table.add_row(label, *times, said, str(found.processes), f"{found.share:.2%}")
    Console(width=120).print(table)
    print(f"within the process: {1e6 * within_the_process():.2f} µs a step")


if __name__ == "__main__":
    main()
