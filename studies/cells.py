"""A study's cells: ordinary runs by name, several side by side, each finished one kept for the next start.

Knows runs, not what a study varies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from salt_vla.config import TrainConfig
from salt_vla.errors import UserError
from salt_vla.interrupts import Stopped
from salt_vla.jobs.demo import train_unless_finished
from salt_vla.rundir import RunDirectory, read_json, root, write_text

DEPTH = 2  # of encoder and predictor
BATCH_SIZE = 8


def folder_of(study: str) -> Path:
    """Where a study's records lie, beside its runs."""
    return root() / "runs" / f"{study}_study"


@dataclass(frozen=True)
class Cell:
    """One student: what is varied by name, of which teacher, and the whole configuration, seed included."""

    study: str
    teacher: str
    name: str
    config: TrainConfig

    @property
    def run(self) -> RunDirectory:
        return RunDirectory.named(f"{self.study}-{self.teacher}-{self.name}-s{self.config.seed}")

    @property
    def result_file(self) -> Path:
        return folder_of(self.study) / f"{self.run.name}.json"


Score = Callable[[Cell], dict[str, Any]]


def finished(cell: Cell) -> dict[str, Any] | None:
    """What is on record of a cell; None where it is still to be made. Raises `UserError` where the record is
    of other settings."""
    if not cell.result_file.exists():
        return None
    result = read_json(cell.result_file, dict)
    if result["config"] != json.loads(json.dumps(asdict(cell.config))):
        raise UserError(
            f"{cell.result_file} is of other settings than the study's now; choose another SALT_VLA_ROOT"
        )
    return result


def run_cell(cell: Cell, score: Score) -> dict[str, Any]:
    """Train, or go on training, and score; the record."""
    train_unless_finished(cell.run, cell.config)
    facts = {"study": cell.study, "teacher": cell.teacher, "name": cell.name, "seed": cell.config.seed}
    result = facts | shares_changed(cell) | {"seconds": round(cell.run.status().seconds, 1)} | score(cell)
    result["config"] = json.loads(json.dumps(asdict(cell.config)))
    write_text(cell.result_file, json.dumps(result, indent=1))
    return result


def shares_changed(cell: Cell) -> dict[str, float]:
    """Which share of the weights an update gave another value: the mean over the steps on record that lie in
    the middle half of the run, and over those of its last tenth, where the rate has fallen."""
    steps = cell.config.steps
    rows = [(row["step"] / steps, row["changed_share"]) for row in cell.run.metrics("train")]
    middle = [share for at, share in rows if 0.25 <= at <= 0.75]
    late = [share for at, share in rows if at >= 0.9]
    return {"changed": sum(middle) / len(middle), "changed_late": sum(late) / len(late)}


def run_cells(cells: Sequence[Cell], score: Score, jobs: int) -> list[dict[str, Any]]:
    """All cells, `jobs` at a time, in the order given; those on record already are not made again.

    A cell that fails is named at the end, and does not keep the others from being made: then `UserError`.
    """
    found = {cell.run.name: finished(cell) for cell in cells}
    todo = [cell for cell in cells if found[cell.run.name] is None]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are on record", flush=True)
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_cell, cell, score): cell for cell in todo}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                name = futures[future].run.name
                try:
                    found[name] = result = future.result()
                    print(f"{number}/{len(todo)} {name}: {result['seconds']} s", flush=True)
                except UserError as error:
                    failed.append(f"{name}: {error}")
                    print(f"{number}/{len(todo)} {name} failed: {error}", flush=True)
        except (KeyboardInterrupt, Stopped):
            pool.shutdown(cancel_futures=True)  # Those in work have written their checkpoints.
            raise
    if failed:
        raise UserError(f"{len(failed)} cells failed; the first: {failed[0]}")
    return [result for result in found.values() if result is not None]


def on_record(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The records of those cells that are finished."""
    return [result for cell in cells if (result := finished(cell)) is not None]


def side_by_side(config: TrainConfig, steps: int, seed: int) -> TrainConfig:
    """A student's settings for a study: half as deep as the demonstration's, half its batch, one thread,
    float32 compute, schedules cut to `steps`."""
    optimizer = replace(config.optimizer, warmup_steps=steps // 10)
    runtime = replace(
        config.runtime,
        threads=1,
        precision="float32",
        log_every=20,
        checkpoint_every=50,
        validate_every=steps,
        validation_clips=64,
    )
    encoder, predictor = replace(config.encoder, depth=DEPTH), replace(config.predictor, depth=DEPTH)
    shallow = replace(config, encoder=encoder, predictor=predictor)
    return replace(
        shallow, steps=steps, batch_size=BATCH_SIZE, seed=seed, optimizer=optimizer, runtime=runtime
    )
