"""What every frozen teacher shares: how one is asked for, and uint8 clips → pixels → float32 latents.

Knows neither families nor files: those hand over a module that holds its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from salt_vla.config import to_json
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.loading import fingerprint
from salt_vla.models.pixels import MEAN, STD, normalise_pixels

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

DTYPES = ("float32", "bfloat16", "float16")
FINAL_NORMS = ("model", "none")
MAX_TOKENS = 2**16  # Three times the largest published; who claims more has a wrong config.


@dataclass(frozen=True)
class TeacherRequest:
    """How a caller wants a teacher; a family refuses what it cannot do with a `ConfigError`.

    `geometry`: what the caller's clips have; None: what the teacher was made for.
    `layer`: the tokens after that block, 1 … depth, or counted from the end: −1 is the last block.
    `final_norm`: after the last block, "model" gives what the published class's forward gives (its own final
    norm where it has one), "none" the raw residual stream. The tokens of an inner block are always raw, also
    where a family's own helper would norm them (DINOv2's `get_intermediate_layers`).
    """

    geometry: ClipGeometry | None = None
    device: str = "cpu"
    dtype: str = "float32"
    layer: int = -1
    final_norm: Literal["model", "none"] = "model"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"a teacher's dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.final_norm not in FINAL_NORMS:
            raise ConfigError(f"a teacher's final_norm is model or none, not {self.final_norm!r}")


def block_number(layer: int, depth: int, name: str) -> int:
    """`layer` of a request as 1 … depth; `ConfigError` where there is no such block."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"teacher {name}: a layer is a whole number, not {layer!r}")
    block = layer if layer > 0 else depth + 1 + layer
    if not 1 <= block <= depth:
        raise ConfigError(
            f"teacher {name}: layer {layer} does not exist; it has layers 1 … {depth} "
            f"(or, from the end, -1 … -{depth})"
        )
    return block


def require_geometry(own: ClipGeometry, wanted: ClipGeometry | None, name: str) -> None:
    """`ConfigError` where a caller's clips are not those that the teacher takes."""
    if own.num_tokens > MAX_TOKENS:
        raise ConfigError(
            f"teacher {name} claims {own.num_tokens} tokens a clip; at most {MAX_TOKENS} can be"
        )
    if wanted is not None and wanted != own:
        raise ConfigError(f"teacher {name} takes clips of {own}, not {wanted}")


class FrozenTeacher(ABC):
    """A network with its weights, in eval mode, behind one method: `latents`.

    `name` is "<base>/block<k>/<norm|raw>", so that what is stored says which block was read and whether the
    final norm was applied. `num_parameters` counts the whole encoder that was loaded, also the blocks behind
    the one read. `own_rows`: rows of patches that the network itself sees; fewer or more than those of
    `geometry` where it is resampled. `fingerprint` hashes those parameters, `facts` and what a request can
    change about the numbers; neither device nor path is in it.
    """

    def __init__(
        self,
        base: str,
        module: nn.Module,
        request: TeacherRequest,
        *,
        geometry: ClipGeometry,
        dim: int,
        depth: int,
        heads: int = 0,
        has_final_norm: bool,
        facts: Mapping[str, object] | str,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ) -> None:
        """`module`: the whole encoder, on the CPU; what lies behind the block read is the subclass's to cut.

        `heads`: of attention, which published names are held to; 0: it has none to be held to.
        `facts`: what is not a parameter and yet decides the numbers (heads, epsilon, geometry …).
        Raises `ConfigError` for a layer or device that is not there.
        """
        self.block = block_number(request.layer, depth, base)
        self.normed = has_final_norm and self.block == depth and request.final_norm == "model"
        self.name = f"{base}/block{self.block}/{'norm' if self.normed else 'raw'}"
        self.geometry, self.dim, self.depth, self.heads = geometry, dim, depth, heads
        self.device = request.device
        self.own_rows = geometry.token_grid[1]
        self.mean, self.std = mean, std
        self.dtype: torch.dtype = getattr(torch, request.dtype)
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        module = module.eval().requires_grad_(False).to(self.dtype)
        said = facts if isinstance(facts, str) else repr(sorted(facts.items()))
        said += to_json(geometry) + f"{self.block} {self.normed} {request.dtype} {mean} {std}"
        self.fingerprint = fingerprint(module, said)
        try:
            if torch.device(request.device).type == "meta":
                raise RuntimeError("nothing is computed there")
            self.module = module.to(request.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without that device.
            raise ConfigError(
                f"teacher {base} cannot go to device {request.device!r}: {str(error).splitlines()[0]}"
            ) from error

    @abstractmethod
    def encode(
        self, pixels: Float[Tensor, "batch 3 frames height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised pixels, in the teacher's dtype and on its device → the tokens of its block."""

    @torch.inference_mode()
    def latents(
        self, frames: UInt8[Tensor, "batch frames height width 3"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Raw float32 latents, in `geometry`'s token order; normalising them is the objective's business.

        The numbers do not depend on an autocast around the call. Raises `ConfigError` for other clips than
        uint8 ones of `geometry`.
        """
        side = self.geometry.image_size
        wanted = (self.geometry.num_frames, side, side, 3)
        if not isinstance(frames, Tensor):
            raise ConfigError(
                f"teacher {self.name} takes clips of shape (batch, {str(wanted)[1:]} as a tensor, not "
                f"{type(frames).__name__}"
            )
        if frames.shape[1:] != wanted or frames.dtype != torch.uint8:
            raise ConfigError(
                f"teacher {self.name} takes clips of shape (batch, {str(wanted)[1:]} as torch.uint8, "
                f"not {tuple(frames.shape)} as {frames.dtype}"
            )
        if not len(frames):
            raise ConfigError(f"teacher {self.name} takes clips of shape {wanted}, at least one of them")
        frames = frames.to(self.device)
        with torch.autocast(frames.device.type, enabled=False):
            pixels = normalise_pixels(frames, self.mean, self.std).to(self.dtype)
            return self.encode(pixels).float()
