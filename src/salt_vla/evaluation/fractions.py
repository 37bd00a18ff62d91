"""A share of the training episodes: nested, drawn by seed, every class kept, for label-fraction curves.

Knows clip tables; neither features nor probes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from salt_vla.data.clip_table import ClipTable

FEWEST_EPISODES = 2
# Labels are classes where they have so many episodes each; where nearly every episode has its own, a smaller
# share would otherwise still need all of them.
EPISODES_A_CLASS = 2


def share_of(clips: ClipTable, fraction: float, seed: int) -> ClipTable:
    """All clips of `fraction` of the episodes, at least 2, and one of every label that is a class.

    A smaller share lies within a larger one of the same seed. Within a label episodes come in an order drawn
    by the seed from their own keys, and labels take turns, so shares keep the labels' proportions. Raises
    `DataError` where there are fewer than two episodes.
    """
    if fraction >= 1:
        return clips
    names = ("dataset", "episode", "label")
    of_clip = list(zip(*(clips.rows[name].to_pylist() for name in names), strict=True))
    label_of = {(dataset, episode): label for dataset, episode, label in of_clip}
    if len(label_of) < FEWEST_EPISODES:
        raise DataError(f"{clips.name} has one training episode; a share of them needs two or more")
    labels: dict[str, list[tuple[str, int]]] = {}
    for key in sorted(label_of, key=lambda key: xxhash.xxh3_64_intdigest(repr((seed, *key)).encode())):
        labels.setdefault(label_of[key], []).append(key)
    places = sorted(
        ((place + 0.5) / len(keys), place > 0, key)
        for keys in labels.values()
        for place, key in enumerate(keys)
    )
    are_classes = len(label_of) >= EPISODES_A_CLASS * len(labels)
    if are_classes:  # The first of every class before all second ones.
        places.sort(key=lambda each: each[1])
    fewest = max(FEWEST_EPISODES, len(labels) if are_classes else 0)
    wanted = max(fewest, int(np.ceil(fraction * len(places) - 1e-9)))
    chosen = {key for _, _, key in places[:wanted]}
    return clips.filtered(clips.rows.filter(pa.array([each[:2] in chosen for each in of_clip])))
