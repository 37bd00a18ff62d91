"""The suite `state`: where the robot and an object are at a moment and how they move, from frames up to it.

Knows targets by the table `STATE_TARGETS`; the robot's own state is no baseline here, for it is the answer.
"""

from __future__ import annotations

from salt_vla.data.signals import ClipSignals
from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.robots import (
    Recorded,
    examples,
    leave_out,
    recorded_sides,
    score_examples,
)
from salt_vla.evaluation.targets import END_STEPS, STATE_TARGETS, build_targets

READS = ("horizon", "moment_stride")
SUITE = "state"


def score(bench: Bench) -> list[Scored]:
    """R² of every target that the data set offers. Causal: velocities look back too. Raises `DataError` where
    neither the robot's state nor an object's place was recorded."""
    scored = []
    for camera in bench.cameras:
        suite = f"{SUITE}/{short_name(camera)}"
        sides = recorded_sides(bench, SUITE, camera, [])
        why = f"the episode has run for fewer than {END_STEPS} frames"
        kept = leave_out(bench, suite, sides, [side.has(-END_STEPS, 0) for side in sides], why)
        targets = [build_targets(_signals(side), STATE_TARGETS) for side in sides]
        train, test = (examples(bench, sides[i], kept[i], targets[i]) for i in range(2))
        scored += score_examples(bench, suite, train, test, causal=True)
    return scored


def _signals(side: Recorded) -> ClipSignals:
    """The last frames of each window, as targets read them."""
    wanted = {target.signal for target in STATE_TARGETS.values()} & side.recordings.signals.keys()
    windows = side.windows
    return ClipSignals(
        tuple(windows.side.clips.clip_ids),
        windows.episodes,
        windows.tasks,
        side.recordings.fps,
        {name: side.at(name, range(-END_STEPS, 1)) for name in sorted(wanted)},
    )
