"""Encoder and predictor networks."""

from salt_vla.config import EncoderConfig, PredictorConfig
from salt_vla.models.encoder import VideoEncoder, build_encoder, gather_tokens, patchify
from salt_vla.models.predictor import Predictor, build_predictor

__all__ = [
    "EncoderConfig",
    "Predictor",
    "PredictorConfig",
    "VideoEncoder",
    "build_encoder",
    "build_predictor",
    "gather_tokens",
    "patchify",
]
