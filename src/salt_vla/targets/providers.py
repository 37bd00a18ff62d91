"""Where targets come from: pixels, a cache, or a teacher in the loop; and what is asked of any provider.

Knows nothing of how targets are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from salt_vla.cache import Encoding
from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.teachers import Teacher

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


class TargetProvider(Protocol):
    """`targets` gives raw targets for *all* tokens of a batch; `needs_records` asks for cached bytes;
    `follows_precision` lets the step compute them under its own autocast.

    A provider that changes while a run goes on (a moving average of the student) says so in the rest.
    """

    dim: int
    needs_records: bool
    follows_precision: bool

    def begin(self, encoder: VideoEncoder) -> None:
        """Before the first step: the encoder that is going to learn."""
        ...

    def after_step(self, encoder: VideoEncoder, step: int) -> None:
        """After update number `step` (from 0)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; empty for what never changes."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def targets(
        self,
        frames: UInt8[Tensor, "batch frames height width 3"],
        records: UInt8[Tensor, "batch bytes"] | None,
    ) -> Float[Tensor, "batch tokens dim"]: ...


class FrozenTargets:
    """The part of `TargetProvider` that says: nothing here ever changes."""

    follows_precision = False

    def begin(self, encoder: VideoEncoder) -> None:
        """Nothing to copy."""

    def after_step(self, encoder: VideoEncoder, step: int) -> None:
        """Nothing to follow."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            raise RunError(f"targets that never change have no state, but the checkpoint holds {list(state)}")


class PixelTargets(FrozenTargets):
    """Stage 1: the tubelets themselves. Layer-normalised by the objective, they are VideoMAE's normalised
    patches (here over all colours of a tubelet together)."""

    needs_records = False

    def __init__(self, geometry: ClipGeometry) -> None:
        self.geometry = geometry
        self.dim = geometry.patch_dim

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        return patchify(normalise_pixels(frames), self.geometry)


class CachedTargets(FrozenTargets):
    """SALT: a frozen teacher's latents, read from the cache and dequantised on the device."""

    needs_records = True

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.dim = encoding.shape[-1]

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        if records is None:
            raise TypeError("CachedTargets needs the batch's cached records")
        return dequantise(records, self.encoding)


class TeacherTargets(FrozenTargets):
    """The same latents computed in the loop: slower, without a cache."""

    needs_records = False

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.dim = teacher.dim

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        return self.teacher.latents(frames).clone()


def dequantise(
    records: UInt8[Tensor, "batch bytes"], encoding: Encoding
) -> Float[Tensor, "batch tokens dim"]:
    """`Encoding.decode` on whatever device holds the bytes."""
    shape = (len(records), *encoding.shape)
    if encoding.name == "float16":
        return records.view(torch.float16).float().reshape(shape)
    split = 4 * (encoding.rows + encoding.shape[-1])
    # Copied, since a view as float32 has to start at a multiple of four bytes.
    scales = records[:, :split].clone(memory_format=torch.contiguous_format).view(torch.float32)
    values = records[:, split:].contiguous().view(torch.int8).float()
    rows, channels = scales[:, : encoding.rows, None], scales[:, None, encoding.rows :]
    return (values.reshape(len(records), encoding.rows, -1) * rows * channels).reshape(shape)
