"""What a person wants to know of a run at a glance, read from its directory, whatever state that is in.

Knows files of runs, not how they are shown; one damaged run never hides the others.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from salt_vla.config import TrainConfig, from_json
from salt_vla.errors import UserError
from salt_vla.operations import index
from salt_vla.operations.curves import Follower, Row, is_number, last_rows, points
from salt_vla.operations.noted import COST as COST
from salt_vla.operations.noted import MASKS as MASKS
from salt_vla.operations.noted import PROBES as PROBES
from salt_vla.operations.noted import noted as noted
from salt_vla.rundir import RunDirectory, Status, root, status_from
from salt_vla.verdicts import noted_recipe, noted_verdict

MINIMA = (
    ("train", "loss"), ("val", "loss"),
    ("val", "r2_position_mean"), ("val", "r2_channel_mean"), ("val", "r2_copy_nearest"),
)  # fmt: skip
HIGHER_IS_BETTER = "r2_"
ENDED = ("finished", "failed", "killed", "stopped")
LARGEST_STATUS = 1 << 20  # bytes
UNSETTLED = ("running", "queued")  # States that change without a file of the run's doing so.
FEW = 50  # runs read anew before it is worth keeping what was read of them
ROWS_OF_PACE = 20  # lines of metrics that a rate is taken over: validations and checkpoints fall among them
WAITS_TOO_LONG = 0.2  # share of the time that a loop waits for its data, from which on it is said


@dataclass(frozen=True)
class Overview:
    """A run as it is now. `status.state` is `damaged` where its files cannot be read, `exit_reason` says why.

    `recipe`, `verdict`, `masks`, `cost` are what its files hold, empty where there are none. `best` has, for
    `kind.column`, the best value and its step: the lowest, or of an R² the highest. Lists lack `masks`,
    `cost` and `last_probe`, and `best` unless it is asked for (`with_best`). `clips_per_s` is that of the
    last lines while a run is at work, later of its last; `rate` is in steps a second. `updated` is when the
    run last gave a sign of life, in seconds since the epoch."""

    name: str
    status: Status
    recipe: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    last_train: Row = field(default_factory=dict)
    last_val: Row = field(default_factory=dict)
    last_probe: Row = field(default_factory=dict)
    best: dict[str, tuple[float, int]] = field(default_factory=dict)
    clips_per_s: float | None = None
    rate: float | None = None
    warnings: tuple[str, ...] = ()
    updated: float = 0.0

    @property
    def state(self) -> str:
        return self.status.state

    @property
    def recipe_name(self) -> str:
        """Empty where the run is of none on record."""
        return str(self.recipe["name"]) if self.recipe else ""

    @property
    def hypothesis(self) -> str:
        return str(self.recipe["hypothesis"]) if self.recipe else ""

    @property
    def is_running(self) -> bool:
        return self.status.state == "running"

    @property
    def step(self) -> int:
        """The last step that is known of: status.json is written at checkpoints, metrics more often."""
        return max(self.status.step, self.last_train.get("step", 0))

    @property
    def total_steps(self) -> int:
        return self.status.total_steps

    @property
    def share(self) -> float:
        """Of its steps that are done, from 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Until the last step, of a run at work."""
        if not self.is_running or not self.rate:
            return None
        return max(0, self.total_steps - self.step) / self.rate

    @property
    def data_wait_share(self) -> float | None:
        return _number(self.last_train, "data_wait_share")

    @property
    def memory_gb(self) -> float | None:
        return _number(self.last_train, "memory_gb")

    def figure(self, kind: str, column: str) -> float | None:
        """Of the last row of that kind, `train` or `val`."""
        return _number(self.last_train if kind == "train" else self.last_val, column)

    def to_json(self) -> dict[str, Any]:
        """One flat object, as `runs show --json` prints it: the status' fields among the others."""
        row = {"name": self.name, **vars(self.status), "recipe": self.recipe, "verdict": self.verdict}
        row |= {"masks": self.masks, "cost": self.cost, "current_step": self.step, "rate": self.rate}
        row |= {"eta_seconds": self.eta_seconds, "clips_per_s": self.clips_per_s}
        row |= {"data_wait_share": self.data_wait_share, "memory_gb": self.memory_gb}
        row |= {"best": {k: {"value": v, "step": s} for k, (v, s) in self.best.items()}}
        row |= {"warnings": list(self.warnings), "updated": self.updated}
        lasts = {"train": self.last_train, "val": self.last_val, "probe": self.last_probe}
        for kind, last in lasts.items():
            row |= {f"last_{kind}": last} if last else {}
        return row


def overview(run: RunDirectory, rows: list[Row] | None = None) -> Overview:
    """All of it, the best figures too; `rows`: the run's metrics, where somebody has them already."""
    rows = all_rows(run) if rows is None else rows
    train = [row for row in rows if row["kind"] == "train"][-ROWS_OF_PACE:]
    val = [row for row in rows if row["kind"] == "val"][-1:]
    seen = _glance(str(run.path), train, val, index.look(str(run.path)))
    if seen.state != "damaged":
        with suppress(UserError, OSError):  # Neither is worth hiding the rest for.
            seen = replace(seen, masks=noted(run, MASKS))
        with suppress(UserError, OSError):
            seen = replace(seen, cost=noted(run, COST))
    return replace(seen, best=best_of(rows), last_probe=last_of(rows, "probe"))


def glance(run: RunDirectory) -> Overview:
    """As `overview`, from the end of the metrics alone: without best figures, masks and cost."""
    return _from_the_end(str(run.path), index.look(str(run.path)))


def _from_the_end(run: str, look: index.Look) -> Overview:
    metrics = f"{run}/metrics.jsonl"
    seen = _glance(run, *last_rows(metrics), look)
    return _glance(run, *last_rows(metrics, ROWS_OF_PACE), look) if seen.is_running else seen


def overviews() -> list[Overview]:
    """A glance at every run under the root, by name. What has been read of a run that has ended is not read
    again until its files change."""
    folder = root() / "runs"
    if not folder.is_dir():
        return []
    known, fresh, found = index.read(folder), {}, []
    names = sorted(entry.name for entry in os.scandir(folder))
    with _no_collection():
        for name in names:
            run = f"{folder}/{name}"
            held, look = known.get(name), index.look(run)
            is_known = held is not None and held.signature == look.signature
            seen = _restored(name, held) if held is not None and is_known else None
            if seen is None:
                if "status.json" not in look.changed and not _directory(run).exists():
                    continue
                seen = _from_the_end(run, look)
                if seen.state not in UNSETTLED and look.has_settled:
                    fresh[name] = _kept(seen, look.signature)
            found.append(seen)
    gone = known.keys() - set(names)
    if len(fresh) + len(gone) >= FEW:
        index.write(folder, fresh, gone)
    return found


def with_best(runs: Sequence[Overview]) -> list[Overview]:
    """The same with their best figures: all of a run's metrics are read for them, once after it has ended."""
    folder = root() / "runs"
    known, fresh, found = index.read(folder), {}, []
    for seen in runs:
        held, look = known.get(seen.name), index.look(f"{folder}/{seen.name}")
        kept = _restored(seen.name, held) if held is not None and held.best else None
        if kept is None or held is None or held.signature != look.signature:
            kept = replace(seen, best=best_of(all_rows(RunDirectory(folder / seen.name))))
            if seen.state not in UNSETTLED and look.has_settled:
                fresh[seen.name] = _kept(kept, look.signature, best=True)
        found.append(replace(seen, best=kept.best))
    if fresh:
        index.write(folder, fresh, set())
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Ten thousand runs are many objects, and none of them is garbage: looking takes as long as making."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _kept(seen: Overview, signature: str, best: bool = False) -> index.Entry:
    names = ("verdict", "last_train", "last_val", "clips_per_s", "warnings", "updated")
    glance = {"status": vars(seen.status), "recipe": json.dumps(seen.recipe)} | {
        name: getattr(seen, name) for name in names
    }
    return index.Entry(signature, json.dumps(glance), json.dumps(seen.best) if best else "")


def _restored(name: str, held: index.Entry) -> Overview | None:
    """None where what was kept is no such thing: then the run itself is read."""
    try:
        glance, best = json.loads(held.glance), json.loads(held.best or "{}")
        glance |= {"status": status_from(glance["status"]), "warnings": tuple(glance["warnings"])}
        glance["recipe"] = _recipe(glance["recipe"])
        return Overview(name, **glance, best={column: tuple(found) for column, found in best.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@lru_cache(maxsize=256)
def _recipe(text: str) -> dict[str, Any]:
    """Many runs are of few recipes."""
    return dict(json.loads(text))


def _directory(run: str) -> RunDirectory:
    return RunDirectory(Path(run))


def _status(run: str) -> Status:
    """As `RunDirectory.status`, which is asked where the file is not that of a run that has plainly ended."""
    try:
        descriptor = os.open(f"{run}/status.json", os.O_RDONLY)
        try:
            held = json.loads(os.read(descriptor, LARGEST_STATUS))
        finally:
            os.close(descriptor)
        if held["state"] in ENDED:
            return status_from(held)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # It says itself what is wrong.
    return _directory(run).status()


def _glance(run: str, train: list[Row], val: list[Row], look: index.Look) -> Overview:
    name = run.rpartition("/")[2]
    updated = max(look.changed.get("status.json", 0), look.changed.get("metrics.jsonl", 0)) / 1e9
    try:
        recipe = noted_recipe(_directory(run)) if "recipe.json" in look.changed else {}
        verdict = noted_verdict(_directory(run)) if "verdict.json" in look.changed else {}
        status = _status(run)
    except (UserError, OSError) as error:
        return Overview(name, Status("damaged", exit_reason=str(error)), updated=updated)
    last_train, last_val = (rows[-1] if rows else {} for rows in (train, val))
    rows = train if status.state == "running" else train[-1:]
    pace = [row["clips_per_s"] for row in rows if is_number(row.get("clips_per_s")) and row["clips_per_s"]]
    clips_per_s = len(pace) / sum(1 / each for each in pace) if pace else None
    clips = _clips_a_step(_directory(run)) if clips_per_s and status.state == "running" else None
    return Overview(
        name, status, recipe, verdict,
        last_train=last_train,
        last_val=last_val,
        clips_per_s=clips_per_s,
        rate=clips_per_s / clips if clips_per_s and clips else None,
        warnings=(*_warnings(last_train, last_val), *_unreadable(run, look, bool(train or val))),
        updated=updated,
    )  # fmt: skip


def curve(run: RunDirectory, kind: str, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of the run's metrics; what is no finite number is left out."""
    return points(all_rows(run), kind, column)


def all_rows(run: RunDirectory) -> list[Row]:
    """Of the run's metrics; lines that are damaged are passed over."""
    follower = Follower(run.metrics_file)
    follower.poll()
    return follower.rows


def last_of(rows: Sequence[Row], kind: str) -> Row:
    """The last row of a kind; empty where there is none."""
    return next((row for row in reversed(rows) if row["kind"] == kind), {})


def best_of(rows: list[Row]) -> dict[str, tuple[float, int]]:
    """`kind.column` → (best value, its step) of the columns that runs are judged by."""
    best: dict[str, tuple[float, int]] = {}
    for kind, column in MINIMA:
        steps, values = points(rows, kind, column)
        if values:
            value = max(values) if column.startswith(HIGHER_IS_BETTER) else min(values)
            best[f"{kind}.{column}"] = (value, steps[values.index(value)])
    return best


def config_of(run: RunDirectory) -> TrainConfig | None:
    """None where the run ended before it had one. Raises `ConfigError` for a damaged one."""
    if not run.config_file.is_file():
        return None
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))


def _clips_a_step(run: RunDirectory) -> int | None:
    try:
        config = config_of(run)
    except UserError:  # A rate is not worth hiding the rest for.
        return None
    return config.batch_size if config else None


def _warnings(train: Row, val: Row) -> list[str]:
    said = []
    wait = _number(train, "data_wait_share") or 0.0
    if wait > WAITS_TOO_LONG:
        said.append(f"waits for its data {wait:.0%} of the time")
    if train.get("collapse"):
        said.append(f"predictions have collapsed (step {train['step']})")
    for row, what in ((train, "train"), (val, "val")):
        if row.get("corrupt_records"):
            said.append(f"{row['corrupt_records']} damaged records skipped ({what})")
    if train.get("bad_steps"):
        said.append(f"{train['bad_steps']} bad steps left the weights as they were")
    return said


def _unreadable(run: str, look: index.Look, has_rows: bool) -> list[str]:
    """Why metrics that are there show nothing, where the disk says so."""
    if has_rows or "metrics.jsonl" not in look.changed:
        return []
    try:
        with open(f"{run}/metrics.jsonl", "rb") as file:  # noqa: PTH123
            file.read(1)
    except OSError as error:
        return [f"metrics.jsonl cannot be read ({error.strerror})"]
    return []


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    return float(value) if is_number(value) and value is not None else None
