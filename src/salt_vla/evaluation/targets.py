"""What the probes predict: robot and object quantities computed from a data set's recorded signals.

A target is one line of `TARGETS`. A data set that lacks a target's signal lacks the target
(`missing_targets` says why); knows nothing of frames or encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

    from salt_vla.data.signals import ClipSignals

    Signal = Float[np.ndarray, "clips span dims"]
    Value = Float[np.ndarray, "clips dims"]
    Reduce = Callable[[Signal, float], Value]

# Differences of file frames over which "velocity at the end" is taken.
END_STEPS = 3


def at_end(signal: Signal, fps: float) -> Value:
    """The value at the clip's last frame."""
    return signal[:, -1]


def mean_over_clip(signal: Signal, fps: float) -> Value:
    """The mean over every frame of the file that the clip spans."""
    return signal.mean(1)


def mean_velocity(signal: Signal, fps: float) -> Value:
    """Displacement from first to last frame per second (m/s for positions in metres)."""
    return _velocity(signal, fps, signal.shape[1] - 1)


def end_velocity(signal: Signal, fps: float) -> Value:
    """Displacement over the last `END_STEPS` frames per second; looks back only, never past the clip."""
    return _velocity(signal, fps, min(END_STEPS, signal.shape[1] - 1))


def _velocity(signal: Signal, fps: float, steps: int) -> Value:
    if steps < 1:
        raise DataError("a clip of one frame has no velocity; use clips of at least two frames")
    return (signal[:, -1] - signal[:, -1 - steps]) * (fps / steps)


@dataclass(frozen=True)
class Target:
    """Columns (None: all) of one recorded signal, reduced to one vector a clip.

    `width` is the signal's width under which its columns mean what the target's name says (0: any).
    """

    signal: str
    reduce: Reduce
    columns: tuple[int, ...] | None = None
    width: int = 0


ACTION, STATE, WORLD = "action", "observation.state", "observation.environment_state"
XYZ = (0, 1, 2)

# observation.state: hand x, y, z, gripper; environment_state: x, y, z of object 1, of object 2, of the goal.
TARGETS: dict[str, Target] = {
    "action_end": Target(ACTION, at_end),
    "action_mean": Target(ACTION, mean_over_clip),
    "hand_position": Target(STATE, at_end, XYZ, width=4),
    "hand_velocity": Target(STATE, mean_velocity, XYZ, width=4),
    "hand_velocity_end": Target(STATE, end_velocity, XYZ, width=4),
    "object_position": Target(WORLD, at_end, XYZ, width=9),
    "object_velocity": Target(WORLD, mean_velocity, XYZ, width=9),
}
TASK = "task"
# Those that no frame after their moment was seen for, in a clip that ends at that moment: not the means over
# a clip, most of whose frames were seen with what follows them.
CAUSAL = frozenset({"action_end", "hand_position", "hand_velocity_end", "object_position", TASK})
# Of a moment, from clips that end at it; `state` and its velocity are a robot's own, of any width.
STATE_TARGETS: dict[str, Target] = {
    "state": Target(STATE, at_end),
    "state_velocity": Target(STATE, end_velocity),
    "hand_position": Target(STATE, at_end, XYZ, width=4),
    "hand_velocity": Target(STATE, end_velocity, XYZ, width=4),
    "object_position": Target(WORLD, at_end, XYZ, width=9),
    "object_velocity": Target(WORLD, end_velocity, XYZ, width=9),
}


def missing_targets(signals: ClipSignals, table: Mapping[str, Target] = TARGETS) -> dict[str, str]:
    """Targets that this data set cannot offer, each with the reason in words."""
    reasons = {}
    for name, target in table.items():
        if target.signal not in signals.signals:
            reasons[name] = f"the data set has no feature {target.signal!r}"
            continue
        width = signals.signals[target.signal].shape[2]
        if target.width not in (0, width):
            reasons[name] = f"{target.signal!r} has {width} columns where the target reads {target.width}"
    if len(set(signals.tasks)) < 2:
        reasons[TASK] = "all clips have the same task"
    return reasons


def build_targets(
    signals: ClipSignals, table: Mapping[str, Target] = TARGETS
) -> dict[str, Shaped[np.ndarray, " clips *dims"]]:
    """Every target the data set offers: float64 (clips, dims) to regress, or text (clips,) to classify; the
    episode's task belongs to `TARGETS` alone.

    Raises `DataError` when it offers none, or when a recorded value is not a number.
    """
    missing = missing_targets(signals, table)
    offered = {name: target for name, target in table.items() if name not in missing}
    for key in sorted({target.signal for target in offered.values()}):
        bad = ~np.isfinite(signals.signals[key]).all((1, 2))
        if bad.any():
            clip = signals.clip_ids[int(np.flatnonzero(bad)[0])]
            raise DataError(f"feature {key!r} of clip {clip} holds a value that is not a number")
    targets: dict[str, np.ndarray] = {}
    for name, target in offered.items():
        signal = signals.signals[target.signal].astype(np.float64)
        columns = signal if target.columns is None else signal[:, :, list(target.columns)]
        targets[name] = target.reduce(columns, signals.fps)
    if table is TARGETS and TASK not in missing:
        targets[TASK] = np.array(signals.tasks, dtype=np.str_)
    if not targets:
        wanted = ", ".join(sorted({target.signal for target in table.values()}))
        raise DataError(f"the data set has nothing to probe: it needs one of {wanted}, or two tasks or more")
    return targets
