"""What the page says of a run: read from its directory, one damaged run never hides the others.

Knows files of runs; what follows from several of them is for `effects`, how it is written for `sections`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from salt_vla.config import TrainConfig, leaves
from salt_vla.errors import UserError
from salt_vla.operations.curves import Row
from salt_vla.operations.handoff.measured import Kept, Measured
from salt_vla.operations.launch import supervision
from salt_vla.operations.overview import PROBES, Overview, config_of, glance, noted
from salt_vla.rundir import RunDirectory, Status, all_runs, root
from salt_vla.verdicts import CLIPS, TEACHERS, changed_on_the_way, departures, origin_of

NEWEST = 200  # runs that the page looks into; of the others it says how many there are
FINEST = "/grid"  # The pooling that reads out most (docs/evaluation.md).
PINS = (CLIPS, *TEACHERS)


@dataclass(frozen=True)
class RunFacts:
    """One run. `space`: what its losses are measured in, in words; `space_key`: equal for runs whose losses
    compare, empty where none does (no settings, or targets of its own that move). `pins`: what lies at the
    places that the settings name. `origin`: RUN@STEP whose weights it began with; `is_steady`: no resume has
    changed what is computed; `odd`: why it does not answer its recipe's criterion. `broke_off`: why each of
    its supervised starts ended that did not end well."""

    run: RunDirectory
    seen: Overview
    config: TrainConfig | None = None
    space: str = ""
    space_key: str = ""
    pins: str = ""
    origin: str = ""
    is_steady: bool = True
    odd: str = ""
    measured: Measured = field(default_factory=Measured)
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
        return self.seen.step * self.config.batch_size if self.config else None

    @property
    def r2(self) -> float | None:
        """Held out, against each place's mean."""
        return self.measured.r2.get("r2_position_mean")

    def to_json(self) -> dict[str, Any]:
        """Without the curves."""
        said: dict[str, Any] = {
            "name": self.name,
            "state": self.state,
            "step": self.seen.step,
            "clips": self.clips,
        }
        said |= {"seconds": self.seen.status.seconds, "exit_reason": self.seen.status.exit_reason}
        said |= {
            "recipe": self.seen.recipe_name,
            "verdict": self.seen.verdict,
            "space": self.space,
        }
        said |= asdict(self.measured) | {"probes": list(self.probes), "broke_off": list(self.broke_off)}
        if self.measured.trend is not None:
            said["trend"]["verdict"] = self.measured.trend.verdict
        return said | {"eta_seconds": self.seen.eta_seconds, "problem": self.problem}


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


def facts_of_all(runs: Sequence[RunDirectory]) -> list[RunFacts]:
    """Of every one; metrics that have not changed since the last time are not read again."""
    kept = Kept(root() / "runs")
    found = [facts_of(run, kept) for run in runs]
    kept.keep()
    return found


def facts_of(run: RunDirectory, kept: Kept | None = None) -> RunFacts:
    """Of any run, a damaged one too: then `problem` says what is wrong with it."""
    try:
        figures = (kept or Kept(run.path)).of(run)
        seen = glance(run)
    except (UserError, OSError) as error:
        seen = Overview(run.name, Status("damaged", exit_reason=str(error)))
        return RunFacts(run, seen, problem=str(error))
    if seen.state == "damaged":
        return RunFacts(run, seen, problem=seen.status.exit_reason)
    try:
        config, pins, probes = config_of(run), _pins(run), noted_probes(run)
        origin, is_steady = origin_of(run), not changed_on_the_way(run)
        odd = departures(run, seen.recipe) if seen.recipe.get("criterion") else ""
    except (UserError, OSError) as error:
        return RunFacts(run, seen, measured=figures, problem=str(error))
    space, key = _space(run, config, pins) if config else ("", "")
    return RunFacts(
        run, seen, config, space, key, _hash(pins), origin, is_steady, odd, figures, probes, _broke_off(run)
    )


def _broke_off(run: RunDirectory) -> tuple[str, ...]:
    try:
        now = supervision(run.path)
    except UserError:  # What it said is lost; the run is not.
        return ()
    return tuple(each.reason for each in now.attempts if each.code not in (0, None)) if now else ()


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
