"""The suite `frame-order`: in which of four orders did a clip's four segments stand? Chance is one quarter.

The orders are fixed, and in them every segment stands once in every place.
"""

from __future__ import annotations

from salt_vla.errors import ConfigError
from salt_vla.evaluation.arrangements import score_orders
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.features import SEGMENTS, SHUFFLES
from salt_vla.evaluation.results import Scored

VERSION = 3
READS = ("min_motion",)


def score(bench: Bench) -> list[Scored]:
    """Accuracy a camera and pooling. Raises `ConfigError` for clips of too few frames."""
    if bench.geometry.num_frames < SEGMENTS:
        raise ConfigError(
            f"frame-order cuts clips into {SEGMENTS} segments; clips of {bench.geometry.num_frames} frame(s) "
            "are too short"
        )
    return score_orders(bench, "frame-order", ("forward", *SHUFFLES))
