"""Which clips a run does without, from its start to its end, since their number orders all the others.

Knows clip ids and the run's directory; why a clip cannot be read is the cache's business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError, RunError
from salt_vla.rundir import RunDirectory, read_json, write_text

LEFT_OUT = "left_out_provenance.json"  # A branch takes everything of this ending along.


def usable_as_before(run: RunDirectory, clips: ClipTable, usable: Sequence[str]) -> list[str]:
    """Of the `usable` among `clips` those that the run had when it began: what has come out of quarantine
    since stays left out, so that a run that goes on meets the clips that it would have met.

    Raises `CacheError` where one that it began with is no longer usable.
    """
    before = _noted(run).get(clips.hash)
    if before is None:  # The run begins, or has other clips altogether, which is said as such.
        return list(usable)
    known = {*before, *usable}
    gone = [clip for clip in clips.clip_ids if clip not in known]
    if gone:
        raise CacheError(
            f"run {run.name!r} began with {len(gone)} more clip(s) than can be read now, the first: "
            f"{gone[0]!r}; mend the cache with `salt-vla cache repair --quarantined` (or, where films were "
            "away, remove caches/views-…), or give the run another --name"
        )
    without = set(before)
    return [clip for clip in usable if clip not in without]


def pin_left_out(run: RunDirectory, clips: ClipTable, usable: Sequence[str]) -> int:
    """Write down, once, which of `clips` the run does without; how many they are."""
    without = sorted(set(clips.clip_ids) - set(usable))
    noted = _noted(run)
    if clips.hash not in noted:
        write_text(run.path / LEFT_OUT, json.dumps(noted | {clips.hash: without}, indent=2))
    return len(without)


def _noted(run: RunDirectory) -> dict[str, list[str]]:
    """By the hash of a split's clips, the ids of those left out."""
    file = run.path / LEFT_OUT
    noted = read_json(file, dict) if file.exists() else {}
    if not all(isinstance(ids, list) for ids in noted.values()):
        raise RunError(f"{file} is damaged; remove it and run the same command again")
    return noted
