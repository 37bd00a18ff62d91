"""The suite `events`: whether the gripper opens or closes, or an object begins to move, within some frames.

Knows how such events are told from what was recorded, not how they look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError
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
from salt_vla.evaluation.statistics import auroc_sums
from salt_vla.evaluation.targets import ACTION, END_STEPS, STATE, TARGETS, WORLD, XYZ

if TYPE_CHECKING:
    from jaxtyping import Float

SUITE = "events"
VERSION = 2
READS = ("horizon", "moment_stride")
GRIPPER = "gripper"
MOVED = 0.005  # metres from where it lay: an object has been moved
AT_REST = 0.001
RANGE = (0.05, 0.95)  # of a gripper's values in training; half way between is neither open nor closed


def score(bench: Bench) -> list[Scored]:
    """Area under the ROC curve of each event happening within `horizon` frames after the window. Causal.
    Raises `DataError` where neither a gripper nor an object was recorded."""
    scored, horizon = [], bench.settings.horizon
    for camera in bench.cameras:
        suite = f"{SUITE}/{short_name(camera)}"
        sides = recorded_sides(bench, SUITE, camera, [])
        why = f"fewer than {END_STEPS} frames lie before them in the episode, or {horizon} after"
        kept = leave_out(bench, suite, sides, [side.has(-END_STEPS, horizon) for side in sides], why)
        targets = event_targets(sides, horizon)
        _say_how_often(bench, suite, sides[1], kept[1], targets[1])
        train, test = (
            examples(bench, side, rows, events, own_state(side))
            for side, rows, events in zip(sides, kept, targets, strict=True)
        )
        scored += score_examples(bench, suite, train, test, causal=True, score=auroc_sums)
    return scored


def _say_how_often(
    bench: Bench, suite: str, side: Recorded, rows: np.ndarray, targets: Mapping[str, np.ndarray]
) -> None:
    """An area from a handful of events is worth no more than they are."""
    for name, events in targets.items():
        happens = rows[events[rows, 0] > 0]
        episodes = len(set(side.windows.episodes[happens].tolist()))
        said = f"{name} happens after {len(happens)} of {len(rows)} held-out windows, in {episodes} episodes"
        bench.notes.append(f"{suite}: {said}")


def event_targets(sides: Sequence[Recorded], horizon: int) -> list[dict[str, Float[np.ndarray, "windows 1"]]]:
    """Of both sides: 1 where it happens, else 0. What "open" is, is learned from the first side."""
    found: list[dict[str, np.ndarray]] = [{}, {}]
    if gripper := _gripper(sides[0]):
        signal, column = gripper
        values = [side.at(signal, range(horizon + 1))[:, :, column] for side in sides]
        middle = np.quantile(values[0], RANGE).mean()
        for targets, each in zip(found, values, strict=True):
            is_open = each > middle
            targets["gripper_switches"] = (is_open[:, 1:] != is_open[:, :1]).any(1)[:, None].astype(float)
    world = sides[0].recordings.signals.get(WORLD)
    if world and next(iter(world.values())).shape[1] == TARGETS["object_position"].width:
        for targets, side in zip(found, sides, strict=True):
            place = side.at(WORLD, range(-END_STEPS, horizon + 1))[:, :, list(XYZ)]
            away = np.linalg.norm(place - place[:, END_STEPS : END_STEPS + 1], axis=2)
            rests = (away[:, :END_STEPS] < AT_REST).all(1)
            moves = (away[:, END_STEPS + 1 :] > MOVED).any(1)
            targets["object_starts_moving"] = (rests & moves)[:, None].astype(float)
    if not found[0]:
        raise DataError(
            f"suite {SUITE!r} needs a column of {ACTION!r} or {STATE!r} whose name holds {GRIPPER!r}, or "
            f"{WORLD!r} as Meta-World has it; the data set has neither"
        )
    return found


def _gripper(side: Recorded) -> tuple[str, int] | None:
    """Signal and column that are called a gripper's, the command before the measurement."""
    for signal in (ACTION, STATE):
        for column, name in enumerate(side.recordings.columns.get(signal, ())):
            if GRIPPER in name.lower():
                return signal, column
    return None
