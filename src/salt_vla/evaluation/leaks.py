"""Clips that are on both sides of a split under other names: found before anything is measured, and refused.

Knows clip tables and the bytes of their files; neither encoders nor pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

    from salt_vla.data.clip_table import ClipTable

SPLIT_ANEW = "give the two the same split, or leave one out"


def require_no_leak(train: ClipTable, test: ClipTable) -> None:
    """Raise `DataError`, naming a clip of either side, where both sides hold the same clip, clips of one
    episode, or clips of one stretch of video: the same frames of one file, or of files whose bytes are the
    same under two names (by their size and both ends, `ClipTable.file_samples`).

    A video that was encoded anew has other bytes, and is not found.
    """
    shared = set(train.clip_ids) & set(test.clip_ids)
    if shared:
        raise DataError(f"clip {min(shared)!r} is in both training and held-out data; {SPLIT_ANEW}")
    _refuse_shared_episodes(train, test)
    mine, theirs = train.file_samples, test.file_samples
    for sample in np.intersect1d(mine[mine != 0], theirs[theirs != 0]):
        rows, others = np.flatnonzero(mine == sample), np.flatnonzero(theirs == sample)
        (first, last), (start, end) = _spans(train, rows), _spans(test, others)
        overlapping = _overlap(first, last, start, end)
        if overlapping.any():
            other = int(np.argmax(overlapping))
            one = int(np.argmax((first < end[other]) & (last > start[other])))
            raise DataError(
                f"{_said(train, int(rows[one]))} in training and {_said(test, int(others[other]))} held out "
                f"show the same frames of one video; {SPLIT_ANEW}"
            )


def _refuse_shared_episodes(train: ClipTable, test: ClipTable) -> None:
    names = ("dataset", "episode", "clip_id")
    sides = [
        {(dataset, episode): clip for dataset, episode, clip in zip(*columns, strict=True)}
        for columns in ([side.rows[name].to_pylist() for name in names] for side in (train, test))
    ]
    shared = sides[0].keys() & sides[1].keys()
    if shared:
        key = min(shared)
        raise DataError(
            f"clip {sides[0][key]!r} in training and clip {sides[1][key]!r} held out are of one episode, "
            f"{key[1]} of {key[0]} ({len(shared)} such episode(s)); split by episode"
        )


def _spans(side: ClipTable, rows: Int64[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray]:
    """First frame, and one past the last, of the clips' episodes in their files."""
    first, frames = (
        np.asarray(side.rows[name].take(rows).to_pylist(), np.int64)
        for name in ("episode_first_frame", "episode_frames")
    )
    return first, first + frames


def _overlap(
    first: Int64[np.ndarray, " a"],
    last: Int64[np.ndarray, " a"],
    start: Int64[np.ndarray, " b"],
    end: Int64[np.ndarray, " b"],
) -> Bool[np.ndarray, " b"]:
    """Which of start … end share a frame with one of first … last: the furthest end of all that begin before
    it ends lies past its start."""
    order = np.argsort(first, kind="stable")
    furthest = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(last[order])])
    return np.asarray(furthest[np.searchsorted(first[order], end, side="left")] > start)


def _said(side: ClipTable, row: int) -> str:
    clip = side.clip(side.clip_ids[row])
    return f"clip {clip.clip_id!r} ({clip.file})"
