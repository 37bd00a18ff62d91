"""The suite `action-prediction`: what the robot does at a moment and in the frames after it, from frames up
to that moment.

Knows no policy: what is scored are probes of frozen features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.robots import (
    Recorded,
    examples,
    leave_out,
    own_state,
    recorded_sides,
    score_examples,
)
from salt_vla.evaluation.targets import ACTION

if TYPE_CHECKING:
    import numpy as np

READS = ("horizon", "moment_stride")
SUITE = "action-prediction"


def score(bench: Bench) -> list[Scored]:
    """R² of `action` (at the window's last frame), of `chunk` (that and the following ones, `horizon` in
    all), and of the chunk's steps half way and last. Causal. Raises `DataError` where no action was recorded
    or no episode is as long as the chunk."""
    return [one for camera in bench.cameras for one in _of_camera(bench, camera)]


def _of_camera(bench: Bench, camera: str) -> list[Scored]:
    suite, horizon = f"{SUITE}/{short_name(camera)}", bench.settings.horizon
    sides = recorded_sides(bench, SUITE, camera, [ACTION])
    why = f"fewer than {horizon} frames (the horizon) are left of the episode"
    kept = leave_out(bench, suite, sides, [side.has(0, horizon - 1) for side in sides], why)
    train, test = (
        examples(bench, side, rows, action_targets(side, horizon), own_state(side))
        for side, rows in zip(sides, kept, strict=True)
    )
    return score_examples(bench, suite, train, test, causal=True)


def action_targets(side: Recorded, horizon: int) -> dict[str, np.ndarray]:
    """(windows, dims) each; the chunk's steps are numbered from 1, which is `action`."""
    chunk = side.at(ACTION, range(horizon))
    targets = {"action": chunk[:, 0]}
    if horizon > 1:
        targets["chunk"] = chunk.reshape(len(chunk), -1)
        for step in sorted({(horizon + 1) // 2, horizon} - {1}):
            targets[f"chunk_step_{step}"] = chunk[:, step - 1]
    return targets
