"""Every setting of a run as frozen dataclasses, checked when they are made; to and from JSON.

Knows neither torch nor the code that acts on the settings.
"""

from salt_vla.config.checks import ADDED_LATER, FREE, parse_bytes
from salt_vla.config.criteria import Criterion, parse_criterion
from salt_vla.config.data import DataConfig, PhotometricConfig, TargetConfig, ViewConfig
from salt_vla.config.files import config_hash, differing_fields, from_json, leaves, to_json
from salt_vla.config.model import (
    VJEPA_BLOCKS,
    BlockSpec,
    EncoderConfig,
    MaskConfig,
    Positions,
    PredictorConfig,
    Truncate,
)
from salt_vla.config.overrides import override, read_value, value_of
from salt_vla.config.training import (
    GuardConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
    RuntimeConfig,
    TrainConfig,
)

__all__ = [
    "ADDED_LATER",
    "FREE",
    "VJEPA_BLOCKS",
    "BlockSpec",
    "Criterion",
    "DataConfig",
    "EncoderConfig",
    "GuardConfig",
    "MaskConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhotometricConfig",
    "Positions",
    "PredictorConfig",
    "Recipe",
    "RuntimeConfig",
    "TargetConfig",
    "TrainConfig",
    "Truncate",
    "ViewConfig",
    "config_hash",
    "differing_fields",
    "from_json",
    "leaves",
    "override",
    "parse_bytes",
    "parse_criterion",
    "read_value",
    "to_json",
    "value_of",
]
