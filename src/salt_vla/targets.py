"""What the predictor must produce, from one of several providers, and the space it is compared in.

Stage 1, SALT and teacher-in-the-loop are the same training loop with another provider.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from salt_vla.cache import Encoding
from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, gather_tokens, patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import normalise
from salt_vla.teachers import Teacher

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, UInt8


class TargetProvider(Protocol):
    """`targets` gives raw targets for *all* tokens of a batch; `needs_records` asks for cached bytes.

    A provider that changes while a run goes on (a moving average of the student) says so in the rest.
    """

    dim: int
    needs_records: bool

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


@dataclass(frozen=True)
class TargetSpace:
    """How targets are compared.

    R² is always scored in the *scored* space: layer-normalised latents, or raw ones where the objective says
    `raw`. `centred` trains on scored targets minus `position_mean`, and adds it back to be scored.
    `position_mean` (tokens, dim) is the mean of scored training targets at each token place; its mean over
    places is the channel mean.
    """

    mode: Literal["normalised", "centred", "raw"]
    position_mean: Float[Tensor, "tokens dim"]

    @property
    def channel_mean(self) -> Float[Tensor, " dim"]:
        return self.position_mean.mean(dim=0)

    def scored(self, raw: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return scored_targets(raw, self.mode)

    def trained(
        self, scored: Tensor, ids: Int64[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target dim"]:
        """The objective's targets at token places `ids`."""
        targets = gather_tokens(scored, ids)
        return targets - self.position_mean[ids] if self.mode == "centred" else targets

    def to_scored(self, predicted: Tensor, ids: Int64[Tensor, "batch target"]) -> Tensor:
        """Undo the centring of predictions at `ids`."""
        predicted = predicted.float()
        return predicted + self.position_mean[ids] if self.mode == "centred" else predicted


@dataclass(frozen=True)
class Task:
    """What is being learned: where targets come from and the space in which they are compared."""

    provider: TargetProvider
    space: TargetSpace

    def after_step(self, encoder: VideoEncoder, step: int) -> None:
        self.provider.after_step(encoder, step)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it, by name; empty where nothing changes while a run goes on."""
        return {f"provider.{name}": tensor for name, tensor in self.provider.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.provider.restore({name.removeprefix("provider."): t for name, t in state.items()})


def scored_targets(raw: Tensor, mode: str) -> Tensor:
    return raw.float() if mode == "raw" else normalise(raw)


def mean_per_position(raw_batches: Iterable[Tensor], mode: str) -> Float[Tensor, "tokens dim"]:
    """Mean of scored targets at each token place over batches of raw targets (batch, tokens, dim)."""
    total: Tensor | None = None
    count = 0
    for raw in raw_batches:
        summed = scored_targets(raw, mode).double().sum(dim=0)
        total = summed if total is None else total + summed
        count += len(raw)
    if total is None:
        raise ValueError("no batch to take the mean over")
    return (total / count).float()


def nearest_context(
    context_ids: Int64[Tensor, "batch context"],
    target_ids: Int64[Tensor, "batch target"],
    geometry: ClipGeometry,
    context_valid: Bool[Tensor, "batch context"] | None = None,
) -> Int64[Tensor, "batch target"]:
    """For each target the visible token to copy: nearest in space first, then in time.

    So the same place at another time wins where it is visible at all (under blocks that span all time it
    never is; then the nearest visible place is copied). Padding, where `context_valid` is False, is not
    visible.
    """
    columns = geometry.token_grid[2]
    per_step = geometry.tokens_per_step

    def places(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ids // per_step, ids % per_step // columns, ids % columns

    time_c, row_c, column_c = (axis.unsqueeze(1) for axis in places(context_ids))
    time_t, row_t, column_t = (axis.unsqueeze(2) for axis in places(target_ids))
    space = (row_c - row_t) ** 2 + (column_c - column_t) ** 2
    distance = space * geometry.token_grid[0] + (time_c - time_t).abs()
    if context_valid is not None:
        distance = distance.masked_fill(~context_valid.unsqueeze(1), torch.iinfo(distance.dtype).max)
    return context_ids.gather(1, distance.argmin(dim=2))
