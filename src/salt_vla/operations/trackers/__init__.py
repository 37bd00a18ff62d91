"""Mirrors of a run's metrics elsewhere: wandb, trackio, TensorBoard.

`metrics.jsonl` is the truth, and a tracker follows it in processes of its own: what hangs, throws or loses
its network there reaches no step. A new tracker is one file and one line of `base.TRACKERS`.
"""

from salt_vla.operations.trackers.base import require_trackers
from salt_vla.operations.trackers.keeper import following

__all__ = ["following", "require_trackers"]
