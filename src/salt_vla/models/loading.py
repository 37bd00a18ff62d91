"""Encoders on disk: the files that make one, and how a directory becomes a network again."""

from __future__ import annotations

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


def step_directories(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, in order of step."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), path) for path in checkpoints.iterdir() if (m := _STEP.match(path.name))]
    return sorted(found)


def save_encoder(encoder_state: dict[str, Tensor], config: EncoderConfig, folder: Path) -> None:
    save_file(encoder_state, folder / WEIGHTS)
    (folder / CONFIG).write_text(to_json(config))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU; a missing or damaged one is a sentence."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise RunError(f"weights {path} are missing or damaged: {error}") from error


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
    folder = encoder_directory(Path(path))
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} lacks {CONFIG}, which says what the weights are")
    encoder = build_encoder(from_json(EncoderConfig, (folder / CONFIG).read_text(), CONFIG))
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
