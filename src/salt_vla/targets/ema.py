"""V-JEPA's own objective: targets are what a moving average of the student itself makes of a whole clip.

Knows the student as modules with the same parameters, not how it learns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import RunError
from salt_vla.models import VideoEncoder, build_encoder, patchify
from salt_vla.models.pixels import normalise_pixels

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


class EmaTargets:
    """Latents of all tokens from an encoder that keeps `momentum` of itself at each step and takes the rest
    from the student: θ̄ ← m·θ̄ + (1 − m)·θ after each update (Bardes et al., arXiv:2404.08471, section 3).

    `momentum` goes linearly from its first value at step 0 to its second at `steps`, as in V-JEPA's code.
    The copy is float32, in evaluation mode, without gradients; it computes in the precision of the student.
    """

    needs_records = False
    follows_precision = True

    def __init__(self, config: EncoderConfig, momentum: tuple[float, float], steps: int, device: str) -> None:
        with torch.random.fork_rng(devices=[]):
            self.encoder = build_encoder(config).to(device).requires_grad_(False).train(False)
        self.dim = self.encoder.dim
        self.momentum = momentum
        self.steps = steps

    def begin(self, encoder: VideoEncoder) -> None:
        """Be the student as it is now."""
        self._keep(0.0, encoder)

    def momentum_at(self, step: int) -> float:
        """The share of itself that the average keeps at update `step` (from 0)."""
        first, last = self.momentum
        return first + step * (last - first) / self.steps

    def after_step(self, encoder: VideoEncoder, step: int) -> None:
        self._keep(self.momentum_at(step), encoder)

    def targets(
        self, frames: UInt8[Tensor, "batch frames height width 3"], records: Tensor | None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.encoder.encode_tubelets(patchify(normalise_pixels(frames), self.encoder.geometry))

    def state(self) -> dict[str, Tensor]:
        return dict(self.encoder.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Raises `RunError` when `state` is not of such an encoder."""
        try:
            self.encoder.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(
                f"the checkpoint's moving average does not fit target.provider 'ema' here: {reason}"
            ) from error

    @torch.no_grad()
    def _keep(self, share: float, encoder: VideoEncoder) -> None:
        mine: list[Tensor] = list(self.encoder.parameters())
        theirs = [_whole(parameter).float() for parameter in encoder.parameters()]
        if share == 0.0:
            torch._foreach_copy_(mine, theirs)  # Exactly, whatever was there before.
        else:
            torch._foreach_lerp_(mine, theirs, 1 - share)


def _whole(parameter: Tensor) -> Tensor:
    """Of a parameter that several processes share out, all of it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
