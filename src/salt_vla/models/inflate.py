"""Weights that an encoder begins with: an image ViT's, inflated over time, or another encoder of ours.

Knows files and shapes, not when a run begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import RunError
from salt_vla.models.encoder import VideoEncoder, build_encoder, vit_size
from salt_vla.models.loading import WEIGHTS, encoder_directory, load_encoder, read_tensors

# What an image ViT of timm's has and a video encoder of ours has not: its class token and registers, the
# positions of its one picture, and whatever stands behind its last norm.
LEFT_OUT = re.compile(r"^(cls_token|reg_token|dist_token|pos_embed|(head|head_dist|fc_norm|attn_pool)\..*)$")
PATCHES = "patch_embed.proj"


@dataclass(frozen=True)
class StartingWeights:
    """Tensors under the encoder's own names, of its own shapes, and a sentence about where they came from."""

    tensors: dict[str, Tensor]
    note: str


def initial_weights(path: Path, encoder: VideoEncoder) -> None:
    """Put the weights at `path` into a fresh encoder, on whatever device it is. Raises as
    `starting_weights`."""
    encoder.load_state_dict(starting_weights(path, encoder.config).tensors)


def starting_weights(path: Path, config: EncoderConfig) -> StartingWeights:
    """What an encoder of `config` can begin with.

    `path`: a safetensors file in timm's layout (the patch embedding of an image ViT is repeated over the
    frames of a tubelet and divided by their number, as in I3D: arXiv 1705.07750, section 2.4), or a run, a
    checkpoint or an export of ours. An image ViT's table of positions is left out: the encoder has positions
    of its own, rotary or sin-cos over (time, row, column).

    Raises `RunError` naming the tensor that is missing, has no place or has another shape.
    """
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in build_encoder(config).state_dict().items()}
    if path.is_dir():
        theirs = load_encoder(path)
        note = f"the encoder starts from {path}"
        if theirs.config.positions != config.positions:
            note += f", whose positions were {theirs.config.positions} and are {config.positions} now"
        tensors = dict(theirs.state_dict())
    else:
        held = read_tensors(path)
        left_out = [name for name in held if LEFT_OUT.match(name)]
        tensors = _inflated({n: t for n, t in held.items() if n not in left_out}, config, path)
        note = f"the encoder starts from {path}; left out: {', '.join(_kinds(left_out)) or 'nothing'}"
    difference = next(_differences(tensors, wanted), "")
    if difference:
        raise RunError(f"{config.name} cannot start from {path}: {difference}")
    return StartingWeights({name: tensor.float() for name, tensor in tensors.items()}, note)


def provenance_of_start(path: Path) -> dict[str, str]:
    """The hash of the file that `starting_weights` reads, for the run's records."""
    file = encoder_directory(path) / WEIGHTS if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            digest = xxhash.xxh3_128()
            while block := stream.read(2**24):
                digest.update(block)
    except OSError as error:
        raise RunError(f"start_from: {file} cannot be read: {error.strerror}") from error
    return {"weights": digest.hexdigest()}


def _inflated(tensors: dict[str, Tensor], config: EncoderConfig, path: Path) -> dict[str, Tensor]:
    """timm's names → ours; they differ in the patch embedding alone, a convolution there.

    A kernel over pictures (dim, 3, patch, patch) is spread over a tubelet; one over tubelets (dim, 3, time,
    patch, patch) is taken as it is. Both come to lie in the order of `patchify`.
    """
    ours = {name.replace(f"{PATCHES}.", "patch_embed."): tensor for name, tensor in tensors.items()}
    kernel, geometry = tensors.get(f"{PATCHES}.weight"), config.geometry
    if kernel is not None:
        tubelet, patch = geometry.tubelet_size, geometry.patch_size
        sides = (3, patch, patch) if kernel.dim() == 4 else (3, tubelet, patch, patch)
        if tuple(kernel.shape[1:]) != sides:
            asked = (vit_size(config).dim, *sides)
            raise RunError(
                f"{config.name} cannot start from {path}: tensor {PATCHES}.weight is {tuple(kernel.shape)} "
                f"and has to be {asked}; choose the encoder.geometry that the weights were trained with"
            )
        if kernel.dim() == 4:
            kernel = (kernel.float() / tubelet).unsqueeze(2).repeat(1, 1, tubelet, 1, 1)
        ours["patch_embed.weight"] = kernel.flatten(1)
    return ours


def _differences(tensors: dict[str, Tensor], wanted: dict[str, torch.Size]) -> Iterator[str]:
    for name, shape in wanted.items():
        if name not in tensors:
            yield f"it has no tensor {name}; a file must be in timm's layout and have as many blocks"
        elif tensors[name].shape != shape:
            yield (
                f"tensor {name} is {tuple(tensors[name].shape)} and has to be {tuple(shape)}; choose the "
                "encoder.name and encoder.geometry that the weights were trained with"
            )
    for name in sorted(tensors.keys() - wanted.keys()):
        yield f"its tensor {name} has no place here; encoder.depth or the kind of network differs"


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names})
