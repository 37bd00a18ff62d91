"""What the page says of a run: read from its directory, one damaged run never hides the others.

Knows files of runs; what follows from several of them is for `effects`, how it is written for `sections`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from salt_vla.config import TrainConfig, leaves
from salt_vla.errors import UserError
from salt_vla.operations.curves import Follower, Row, points
from salt_vla.operations.handoff.trends import Trend, trend
from salt_vla.operations.launch import supervision
from salt_vla.operations.overview import PROBES, Overview, config_of, noted, overview
from salt_vla.rundir import RunDirectory, Status, all_runs
from salt_vla.verdicts import CLIPS, TEACHERS

NEWEST = 200  # runs that the page looks into; of the others it says how many there are
FINEST = "/grid"  # The pooling that reads out most (docs/evaluation.md).
R2 = ("r2_position_mean", "r2_channel_mean", "r2_copy_nearest")
PINS = (CLIPS, *TEACHERS)


@dataclass(frozen=True)
class RunFacts:
    """One run. `space`: what its losses are measured in, in words; `space_key`: equal for runs whose losses
    compare, empty where none does (no settings, or targets of its own that move). `last_loss`: the mean of
    its last rows of kind train, as many as `last_rows`. `r2`: the last held-out row's. `pins`: what lies at
    the places that the settings name. `broke_off`: why each of its supervised starts ended that did not end
    well."""

    run: RunDirectory
    seen: Overview
    config: TrainConfig | None = None
    space: str = ""
    space_key: str = ""
    pins: str = ""
    min_loss: float | None = None
    min_step: int = 0
    last_loss: float | None = None
    last_rows: int = 0
    r2: dict[str, float] | None = None
    trend: Trend | None = None
    last_lr: float | None = None
    alarms: tuple[str, ...] = ()
    probes: tuple[Row, ...] = ()
    broke_off: tuple[str, ...] = ()
    problem: str = ""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def state(self) -> str:
        return self.seen.state

    @property
    def is_whole(self) -> bool:
        """Whether it has done all steps of its schedules."""
        return self.state == "finished" and self.config is not None and self.seen.step >= self.config.steps

    @property
    def clips(self) -> int | None:
        a_step = self.seen.cost.get("clips_a_step") or (self.config.batch_size if self.config else 0)
        return self.seen.step * int(a_step) if a_step else None

    def to_json(self) -> dict[str, Any]:
        """Without the curves."""
        said = {"name": self.name, "state": self.state, "step": self.seen.step, "clips": self.clips}
        said |= {"seconds": self.seen.status.seconds, "exit_reason": self.seen.status.exit_reason}
        said |= {
            "recipe": self.seen.recipe.get("name", ""),
            "verdict": self.seen.verdict,
            "space": self.space,
        }
        said |= {"min_loss": self.min_loss, "min_step": self.min_step, "last_loss": self.last_loss}
        said |= {"r2": self.r2, "alarms": list(self.alarms), "probes": list(self.probes)}
        curve = asdict(self.trend) | {"verdict": self.trend.verdict} if self.trend else None
        return said | {"trend": curve, "eta_seconds": self.seen.eta_seconds, "problem": self.problem}


def newest_runs(count: int = NEWEST) -> tuple[list[RunDirectory], int]:
    """(the runs that changed last, by name; how many others there are)."""
    runs = all_runs()
    chosen = sorted(runs, key=_changed, reverse=True)[:count]
    return sorted(chosen, key=lambda run: run.name), len(runs) - len(chosen)


def _changed(run: RunDirectory) -> float:
    for file in (run.path / "status.json", run.path):
        try:
            return file.stat().st_mtime
        except OSError:
            continue
    return 0.0


def facts_of(run: RunDirectory) -> RunFacts:
    """Of any run, a damaged one too: then `problem` says what is wrong with it."""
    try:
        follower = Follower(run.metrics_file)
        follower.poll()
        rows = follower.rows
        seen = overview(run, rows)
    except (UserError, OSError) as error:
        return RunFacts(
            run, Overview(run.name, Status("damaged", exit_reason=str(error))), problem=str(error)
        )
    if seen.state == "damaged":
        return RunFacts(run, seen, problem=seen.status.exit_reason)
    try:
        config, pins, probes = config_of(run), _pins(run), noted_probes(run)
    except (UserError, OSError) as error:
        return RunFacts(run, seen, problem=str(error), **_curve(rows))
    space, key = _space(run, config, pins) if config else ("", "")
    broke_off, curve = _broke_off(run), _curve(rows)
    return RunFacts(run, seen, config, space, key, _hash(pins), probes=probes, broke_off=broke_off, **curve)


def _broke_off(run: RunDirectory) -> tuple[str, ...]:
    try:
        now = supervision(run.path)
    except UserError:  # What it said is lost; the run is not.
        return ()
    return tuple(each.reason for each in now.attempts if each.code not in (0, None)) if now else ()


def _curve(rows: list[Row]) -> dict[str, Any]:
    steps, losses = points(rows, "train", "loss")
    said: dict[str, Any] = {"alarms": tuple(_alarms(rows))}
    if losses:
        lowest = losses.index(min(losses))
        tail = losses[-min(100, max(1, len(losses) // 10)) :]
        said |= {"min_loss": losses[lowest], "min_step": int(steps[lowest])}
        said |= {"last_loss": sum(tail) / len(tail), "last_rows": len(tail)}
        said["trend"] = trend([int(step) for step in steps], losses)
    _, rates = points(rows, "train", "lr")
    held_out = {name: values[-1] for name in R2 if (values := points(rows, "val", name)[1])}
    return said | {"r2": held_out or None, "last_lr": rates[-1] if rates else None}


def _alarms(rows: list[Row]) -> list[str]:
    collapsed = [row["step"] for row in rows if row.get("collapse") is True]
    said = []
    if collapsed:
        said.append(f"the collapse alarm rang {len(collapsed)} times, first at step {collapsed[0]}")
    for column, what in (("bad_steps", "bad steps were left out"), ("rollbacks", "returns to a checkpoint")):
        counts = points(rows, "train", column)[1]
        if counts and counts[-1]:
            said.append(f"{int(counts[-1])} {what}")
    damaged = max((value for kind in ("train", "val") for value in points(rows, kind, "corrupt_records")[1]),
                  default=0)  # fmt: skip
    if damaged:
        said.append(f"{int(damaged)} damaged records were met")
    waits = points(rows, "train", "data_wait_share")[1]
    if waits and sum(waits) / len(waits) > 0.2:
        said.append(f"{sum(waits) / len(waits):.0%} of its time was spent waiting for data")
    return said


def _pins(run: RunDirectory) -> dict[str, Any]:
    return {name: pin for name in PINS if (pin := noted(run, name))}


def noted_probes(run: RunDirectory) -> tuple[Row, ...]:
    """The rows and the paired comparisons (those have `against`) in `probes.json`, each with the hash of the
    clips that it is of: those that keep places and times, where there are such."""
    held = noted(run, PROBES).get("suites", [])
    suites = [suite for suite in held if isinstance(suite, dict)] if isinstance(held, list) else []
    suites = [suite for suite in suites if str(suite.get("suite")).endswith(FINEST)] or suites
    return tuple(
        row | {"clip_table": suite.get("clip_table", "")}
        for suite in suites
        for part in ("rows", "comparisons")
        for row in suite.get(part, [])
        if isinstance(row, dict)
    )


def _space(run: RunDirectory, config: TrainConfig, pins: dict[str, Any]) -> tuple[str, str]:
    """What losses are measured in: the targets, how they are compared, and which tokens are asked for."""
    teacher = pins.get(TEACHERS[0]) or pins.get(TEACHERS[1], {})
    whose, print_of = str(teacher.get("teacher") or ""), str(teacher.get("fingerprint") or "")[:8]
    target, objective, masks = config.target, config.objective, config.masks
    of = {
        "pixels": "pixels",
        "ema": f"{run.name}'s own moving average",
        "cache": f"latents of {whose or target.source} {print_of}".strip(),
        "teacher": f"latents of {whose or target.source} {print_of}".strip(),
    }[target.provider]
    which = f"{len(masks.blocks)} groups of blocks" if masks.strategy == "multiblock" else f"{masks.ratio:g}"
    loss = f"|error|^{objective.power:g}" if objective.loss == "power" else objective.loss
    words = f"{of}; {objective.targets}; {loss}; masks {masks.strategy}, {which}"
    if target.provider == "ema":
        return words, ""
    parts = ("objective", "masks", "data.view", "encoder.geometry")
    decisive = {name: str(value) for name, value in leaves(config) if name.startswith(parts)}
    return words, _hash([decisive, target.provider, pins or target.source])


def _hash(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
