"""The suite `time-arrow`: was a clip shown forwards or backwards? Chance is one half.

Both orders of a clip lie on the same side of the split, so that only its direction tells them apart.
"""

from __future__ import annotations

from salt_vla.evaluation.arrangements import score_orders
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.results import Scored

VERSION = 3
READS = ("min_motion",)


def score(bench: Bench) -> list[Scored]:
    """Accuracy a camera and pooling. Frames are turned round after decoding, so what compression does from
    one to the next is a sign of direction too: compare with `pixels` and `random`, which see it as well."""
    return score_orders(bench, "time-arrow", ("forward", "reversed"))
