"""Encoders on disk: the files that make one, and how a directory becomes a network again."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salt_vla.config import EncoderConfig, from_json, to_json
from salt_vla.errors import RunError
from salt_vla.models.encoder import VideoEncoder, build_encoder

WEIGHTS = "encoder.safetensors"
CONFIG = "encoder.json"
_STEP = re.compile(r"^step_(\d+)$")
_OS_ERROR = re.compile(r"os error (\d+)")  # How safetensors words what the system refused.


class DamagedWeightsError(RunError):
    """A file of tensors is missing, or is none."""


def step_directories(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, in order of step."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), path) for path in checkpoints.iterdir() if (m := _STEP.match(path.name))]
    return sorted(found)


def save_encoder(encoder_state: dict[str, Tensor], config: EncoderConfig, folder: Path) -> None:
    """The files of an encoder: its weights, and the configuration that says what they are."""
    write_tensors(encoder_state, folder / WEIGHTS)
    (folder / CONFIG).write_text(to_json(config))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file. What the operating system refuses is an `OSError`, as from any other write."""
    try:
        save_file(tensors, path)
        path.chmod(0o644)  # It is written for its owner alone otherwise.
    except SafetensorError as error:
        refusal = _OS_ERROR.search(str(error))
        if refusal is None:
            raise
        raise OSError(int(refusal[1]), os.strerror(int(refusal[1])), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file in memory of its own, on the CPU; a missing or damaged one is a sentence."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DamagedWeightsError(f"weights {path} are missing or damaged: {error}") from error


def encoder_directory(path: Path) -> Path:
    """The folder with the weights for a run directory, a checkpoint or an export."""
    if (path / WEIGHTS).is_file():
        return path
    steps = step_directories(path / "checkpoints")
    if not steps:
        raise RunError(f"{path} holds no encoder: neither {WEIGHTS} nor a checkpoint below checkpoints/")
    return steps[-1][1]


def load_encoder(path: str | Path) -> VideoEncoder:
    """An eval-mode encoder from a run directory (its last checkpoint), a checkpoint or an export.

    Raises `RunError` when there is none, or when weights and configuration do not match.
    """
    if not Path(path).is_dir():
        raise RunError(f"there is no folder {Path(path).absolute()} to load an encoder from")
    folder = encoder_directory(Path(path))
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} lacks {CONFIG}, which says what the weights are")
    encoder = build_encoder(from_json(EncoderConfig, (folder / CONFIG).read_bytes(), str(folder / CONFIG)))
    try:
        encoder.load_state_dict(read_tensors(folder / WEIGHTS))
    except RuntimeError as error:
        raise RunError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return encoder.eval().requires_grad_(False)


def fingerprint(model: nn.Module, config: str) -> str:
    """Hash of every parameter's name and float32 bytes, and of the configuration's text."""
    digest = xxhash.xxh3_128(config.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
