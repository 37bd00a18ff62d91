"""Teachers trained by this package: the encoder of a stage-1 (or any other) run, checkpoint or export.

Knows our encoder and where its files lie, not how it was trained.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from salt_vla.config import to_json
from salt_vla.models.encoder import VideoEncoder, vit_size
from salt_vla.models.loading import load_encoder
from salt_vla.teachers.base import FrozenTeacher, TeacherRequest, require_geometry


class EncoderTeacher(FrozenTeacher):
    """A `VideoEncoder` behind the teacher interface; also how any encoder is evaluated.

    The encoder is taken over: frozen, cast to the request's dtype, and cut behind the block that is read.
    """

    def __init__(self, encoder: VideoEncoder, name: str, request: TeacherRequest | None = None) -> None:
        super().__init__(
            name,
            encoder,
            request or TeacherRequest(),
            geometry=encoder.geometry,
            dim=encoder.dim,
            depth=len(encoder.blocks),
            heads=vit_size(encoder.config).num_heads,
            has_final_norm=True,
            facts=to_json(encoder.config),
        )
        self.encoder = encoder
        encoder.blocks = encoder.blocks[: self.block]
        if not self.normed:
            encoder.norm = nn.Identity()  # type: ignore[assignment]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)


def load(path: Path, name: str, request: TeacherRequest) -> EncoderTeacher:
    """The encoder of a run directory (its last checkpoint), a checkpoint or an export.

    Raises `RunError` where there is none, `ConfigError` for clips of another geometry.
    """
    encoder = load_encoder(path)
    require_geometry(encoder.geometry, request.geometry, name)
    return EncoderTeacher(encoder, name, request)
