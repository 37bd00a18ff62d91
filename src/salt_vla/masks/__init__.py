"""Which tokens of a clip the encoder sees and which the predictor must produce.

Pure functions of (batch size, seed, step); knows the token grid, not the pixels or the models.
"""

from salt_vla.config import BlockSpec
from salt_vla.masks.groups import MaskGroup
from salt_vla.masks.statistics import GroupStatistics, MaskReport, mask_statistics, report_masks
from salt_vla.masks.strategies import (
    Masks,
    MaskStrategy,
    MultiBlockMasks,
    RandomMasks,
    TopUpBlockMasks,
    TubeMasks,
    build_masks,
)

__all__ = [
    "BlockSpec",
    "GroupStatistics",
    "MaskGroup",
    "MaskReport",
    "MaskStrategy",
    "Masks",
    "MultiBlockMasks",
    "RandomMasks",
    "TopUpBlockMasks",
    "TubeMasks",
    "build_masks",
    "mask_statistics",
    "report_masks",
]
