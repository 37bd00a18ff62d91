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
from salt_vla.teachers.base import TeacherRequest, require_geometry
from salt_vla.teachers.pixel import EncoderTeacher

PREFIX = "random:"
MAX_PARAMETERS = 4e9  # Twice the largest of our sizes: others come from patches as large as the picture.
_NAME = re.compile(
    r"random:(?P<encoder>vit_[a-z]+(?:_patch(?P<patch>\d{1,9})_(?P<image>\d{1,9}))?)(?::(?P<seed>\d+))?"
)


def load(path: Path | None, name: str, request: TeacherRequest) -> EncoderTeacher:
    """`random:<encoder>[:seed]`, such as `random:vit_tiny_patch16_224:0`; `path` is not read.

    The same name, seed and geometry give the same weights, whatever was drawn before. Without a geometry in
    the request it is 16 frames of the size that the encoder's name says. Its query and value biases start at
    zero, as those of any new encoder do. Raises `ConfigError` for a name that does not read like this.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"a random teacher is random:<encoder>[:seed], as {PREFIX}vit_tiny_patch16_224:0, not "
            f"{name[:80]!r}"
        )
    geometry = request.geometry or ClipGeometry(
        image_size=int(match["image"] or 224), patch_size=int(match["patch"] or 16)
    )
    require_geometry(geometry, None, name)
    config = EncoderConfig(name=match["encoder"], geometry=geometry)
    seed = match["seed"] or "0"
    if len(seed) > 18:
        raise ConfigError(f"teacher {name[:80]}: a seed has at most 18 digits, not {len(seed)}")
    with torch.device("meta"):  # Counted before any memory is taken.
        parameters = sum(parameter.numel() for parameter in build_encoder(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"teacher {name} would have {parameters:.1e} parameters; a random one has at most "
            f"{MAX_PARAMETERS:.0e}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        encoder = build_encoder(config)
    return EncoderTeacher(encoder, f"{PREFIX}{match['encoder']}:{int(seed)}", request)
