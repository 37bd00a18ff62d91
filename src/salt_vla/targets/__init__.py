"""What the predictor must produce, from one of several providers, and the space it is compared in.

Stage 1, SALT, teacher-in-the-loop and V-JEPA are the same training loop with another provider.
"""

from salt_vla.targets.copying import nearest_context
from salt_vla.targets.ema import EmaTargets
from salt_vla.targets.providers import (
    CachedTargets,
    FrozenTargets,
    PixelTargets,
    TargetProvider,
    TeacherTargets,
    dequantise,
)
from salt_vla.targets.space import RunningSpace, TargetSpace, has_running_statistics, mean_per_position
from salt_vla.targets.task import Task

__all__ = [
    "CachedTargets",
    "EmaTargets",
    "FrozenTargets",
    "PixelTargets",
    "RunningSpace",
    "TargetProvider",
    "TargetSpace",
    "Task",
    "TeacherTargets",
    "dequantise",
    "has_running_statistics",
    "mean_per_position",
    "nearest_context",
]
