"""When the online probe looks, and at how many clips, so that it stays a small share of what a run computes.

Knows settings and floating-point operations, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from salt_vla.config import TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.training.flops import look_flops

SHARE = 0.02  # of a run's floating-point operations, at most; a promise of less than 0.03 of its time
LEAST_CLIPS = 128  # to fit to, where their number is not asked for


@dataclass(frozen=True)
class Plan:
    """It looks at validations of steps that are multiples of `every`, and of the last of `steps`: at up to
    `clips` of the steps before."""

    every: int
    clips: int
    steps: int

    def is_due(self, step: int) -> bool:
        """After so many steps."""
        return step % self.every == 0 or step == self.steps

    def next_due(self, step: int) -> int:
        """The first of such steps after `step`."""
        following = (step // self.every + 1) * self.every
        return min(following, self.steps) if step < self.steps else following


def plan_probe(config: TrainConfig, held_out: int, flops_a_clip: float) -> Plan | None:
    """As `runtime.probe_clips` and `probe_every` ask; where the latter is 0, the most clips, and then the
    most often, that `SHARE` of the run's operations pays for, its first look included. None where these are
    fewer than `LEAST_CLIPS` at its beginning and end.

    `held_out`: clips of a validation; `flops_a_clip`: of a training step.
    """
    runtime = config.runtime
    if runtime.probe_every:
        return Plan(runtime.probe_every, runtime.probe_clips, config.steps)
    tokens = len(ends(config.geometry)) * config.geometry.num_tokens // config.geometry.token_grid[0]
    looks = int(SHARE * config.steps * config.batch_size * flops_a_clip / look_flops(config, tokens))
    clips = min(runtime.probe_clips, looks // 2 - held_out)
    if clips < min(LEAST_CLIPS, runtime.probe_clips):
        return None
    times = looks // (clips + held_out) - 1
    every = runtime.validate_every * -(-config.steps // (times * runtime.validate_every))
    return Plan(every, clips, config.steps)


def ends(geometry: ClipGeometry) -> list[int]:
    """The time steps that are looked at: the first and the last."""
    return sorted({0, geometry.token_grid[0] - 1})
