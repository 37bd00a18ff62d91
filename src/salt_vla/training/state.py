"""Where a run stands between two steps, tensors aside: one JSON object in every checkpoint.

Knows neither what changes it nor the files it is kept in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from salt_vla.errors import RunError


@dataclass
class RunState:
    """Every count that decides what the next steps compute or say, so that a resume says the same.

    The next batch is number `step` + `batches_passed` (from 0): after a return to a checkpoint the run goes
    on with other clips. `missed_updates`: how far the optimizer's own count is behind `step`. `bad_steps` are
    counted over the whole run, `bad_in_a_row` since the last good one. `mean_loss` is a running mean over
    `losses_seen` good steps. `…_since_line`: since the last `train` line of metrics.
    `best_step`, `safe_step`: of the best checkpoint, and of the one that a rollback goes back to. That is the
    last planned one, `planned_step`, once a step from there was good: its weights may be the damage.
    `collapsed`: 1 where the last line showed a collapse, so that it is said once.
    """

    step: int = 0
    batches_passed: int = 0
    missed_updates: int = 0
    corrupt_records: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    mean_loss: float = 0.0
    losses_seen: int = 0
    steps_since_line: int = 0
    clipped_since_line: int = 0
    best_step: int = 0
    best_r2: float | None = None
    safe_step: int = 0
    planned_step: int = 0
    collapsed: int = 0

    @property
    def next_batch(self) -> int:
        return self.step + self.batches_passed

    def as_line(self) -> dict[str, Any]:
        """What a `train` line says of the steps since the last one."""
        row: dict[str, Any] = {"clipped_share": self.clipped_since_line / self.steps_since_line}
        return row | ({"bad_steps": self.bad_steps, "rollbacks": self.rollbacks} if self.bad_steps else {})

    def begin_line(self) -> None:
        self.steps_since_line = self.clipped_since_line = 0

    def forget_losses(self) -> None:
        """From here on the loss is another one."""
        self.mean_loss, self.losses_seen = 0.0, 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], where: object) -> RunState:
        """Of a checkpoint's file: counts that an earlier version did not keep are at their start."""
        known = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        numbers = {name: known.pop(name) for name in ("mean_loss", "best_r2") if name in known}
        wrong = [name for name, value in known.items() if type(value) is not int or value < 0]
        kinds = {"mean_loss": (int, float), "best_r2": (int, float, type(None))}
        wrong += [name for name, value in numbers.items() if type(value) not in kinds[name]]
        if "step" not in known or wrong:
            raise RunError(f"{where} is damaged ({', '.join(wrong) or 'no step'}); remove its folder")
        return cls(**known, **numbers)

    def after_rollback(self, failed: RunState) -> RunState:
        """This state, of a checkpoint, once `failed`, a later one, is given up: what was read meanwhile is
        passed over, what went wrong stays counted."""
        return replace(
            self,
            batches_passed=failed.next_batch - self.step,
            safe_step=self.step,
            planned_step=self.step,
            bad_steps=failed.bad_steps,
            rollbacks=failed.rollbacks + 1,
            bad_in_a_row=0,
        )
