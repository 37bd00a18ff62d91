"""A teacher that has learned nothing: our encoder at random init, the baseline that every other must beat.

Knows how such a name is written; needs no files.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from salt_vla.config import EncoderConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.encoder import build_encoder
from salt_vla.teachers.base import TeacherRequest
from salt_vla.teachers.pixel import EncoderTeacher

PREFIX = "random:"
_NAME = re.compile(
    r"random:(?P<encoder>vit_[a-z]+(?:_patch(?P<patch>\d+)_(?P<image>\d+))?)(?::(?P<seed>\d+))?"
)


def load(path: Path | None, name: str, request: TeacherRequest) -> EncoderTeacher:
    """`random:<encoder>[:seed]`, such as `random:vit_tiny_patch16_224:0`; `path` is not read.

    The same name, seed and geometry give the same weights, whatever was drawn before. Without a geometry in
    the request it is 16 frames of the size that the encoder's name says. Its query and value biases start at
    zero, as those of any new encoder do. Raises `ConfigError` for a name that does not read like this.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"a random teacher is random:<encoder>[:seed], as {PREFIX}vit_tiny_patch16_224:0")
    geometry = request.geometry or ClipGeometry(
        image_size=int(match["image"] or 224), patch_size=int(match["patch"] or 16)
    )
    seed = int(match["seed"] or 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(EncoderConfig(name=match["encoder"], geometry=geometry))
    return EncoderTeacher(encoder, f"{PREFIX}{match['encoder']}:{seed}", request)
