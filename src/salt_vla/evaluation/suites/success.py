"""The suite `success`: will this episode succeed, told from frames up to some moments of it.

The moments are the same for all episodes: a share of each one's own length would tell how long it will be,
and episodes that fail are the long ones.
"""

from __future__ import annotations

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.causal import Moments
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.robots import (
    Recorded,
    examples,
    leave_out,
    recorded_sides,
    score_examples,
)
from salt_vla.evaluation.statistics import auroc_sums
from salt_vla.evaluation.targets import TASK

SUITE, SUCCESS = "success", "next.success"
VERSION = 2
READS = ("horizon", "moment_stride")
SHARES = (25, 50, 75)  # percent of the training episodes' median length


def score(bench: Bench) -> list[Scored]:
    """Area under the ROC curve at each moment, as `success/<camera>/at-<percent>`; episodes that are over by
    then, or have succeeded, are left out. Causal. What the task alone tells stands beside (`task`).

    Raises `DataError` where success was not recorded, or all episodes end alike.
    """
    scored: list[Scored] = []
    for camera in bench.cameras:
        rows = bench.train.of_camera(camera).clips.clips()
        lengths = {clip.episode: clip.episode_frames for clip in rows}
        for share in SHARES:
            moment = int(np.median(list(lengths.values())) * share / 100)
            scored += _at(bench, camera, f"{SUITE}/{short_name(camera)}/at-{share}", moment)
    if not scored:
        raise DataError(f"suite {SUITE!r}: {bench.notes[-1]}")
    return scored


def _at(bench: Bench, camera: str, suite: str, moment: int) -> list[Scored]:
    sides = recorded_sides(bench, SUITE, camera, [SUCCESS], _only(moment))
    undecided = [~_succeeds(side, moment + 1) for side in sides]
    kept = leave_out(bench, suite, sides, undecided, "they have succeeded already")
    ends = [_succeeds(side)[:, None].astype(np.float64) for side in sides]
    for side, rows in zip(ends, kept, strict=True):
        if side[rows].min() == side[rows].max():
            how = "succeed" if side[rows].all() else "fail"
            bench.notes.append(f"{suite} is left out: all episodes of one side of the split {how}")
            return []
    names = sorted(set(sides[0].windows.tasks))
    train, test = (
        examples(bench, side, rows, {"succeeds": end}, _one_hot(side, names))
        for side, rows, end in zip(sides, kept, ends, strict=True)
    )
    return score_examples(bench, suite, train, test, causal=True, known=TASK, score=auroc_sums)


def _only(moment: int) -> Moments:
    return lambda frames: [moment] if moment < frames else []


def _succeeds(side: Recorded, frames: int | None = None) -> np.ndarray:
    """Whether each window's episode does so within its first frames, or at all."""
    by_episode = side.recordings.signals[SUCCESS]
    return np.array([bool(by_episode[e][:frames].any()) for e in side.windows.episodes.tolist()])


def _one_hot(side: Recorded, names: list[str]) -> np.ndarray:
    return (np.array(side.windows.tasks)[:, None] == np.array(names)).astype(np.float64)
