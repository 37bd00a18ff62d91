"""A pickled checkpoint → a folder with safetensors, once and on request, so that nothing else opens pickles.

Knows containers of tensors, not the families' names: those are the loaders' business.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_vla.errors import RunError
from salt_vla.models.loading import write_tensors
from salt_vla.rundir import write_atomically, writing_to
from salt_vla.teachers.weights import CONFIG, PROCESSORS, WEIGHTS, read_config


@dataclass(frozen=True)
class Converted:
    """What was written: how many tensors of which container, and what of the file was left out."""

    folder: Path
    num_tensors: int
    key: str
    left_out: tuple[str, ...]
    has_config: bool


def convert(file: Path, out: Path, config: Path | None = None, key: str | None = None) -> Converted:
    """Write the tensors of a torch checkpoint as `out/model.safetensors`, with its config.json.

    Opened with `weights_only=True`, which builds tensors and plain containers and runs no code; what needs
    more is refused. `key` names the container to take where the file holds several ("model",
    "target_encoder", …). `config`: config.json; default: the one beside `file`, if there is one. Raises
    `RunError`, `ResourceError`.
    """
    if not file.is_file():
        raise RunError(f"there is no file {file} to convert")
    if (out / WEIGHTS).exists():
        raise RunError(f"{out / WEIGHTS} exists already; choose another folder")
    settings = config or (file.parent / CONFIG if (file.parent / CONFIG).is_file() else None)
    if settings is not None:
        read_config(settings.parent, settings.name)  # Before the long work: is it a JSON object at all?
    container, tensors, left_out = _tensors(_open(file), file, key)
    # Copies: tied weights share memory, which safetensors cannot say.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(out / WEIGHTS, lambda temporary: write_tensors(copies, temporary))
    with writing_to(out):
        if settings is not None:
            shutil.copyfile(settings, out / CONFIG)
        for name in PROCESSORS:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, out / name)
    return Converted(out, len(copies), container, left_out, settings is not None)


def _open(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no set of errors for files that it cannot or will not read.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RunError(
            f"{file} is not opened: it is no torch checkpoint, is damaged, or would run code ({reason}); "
            "open it where you trust it and save its state_dict alone. A safetensors file needs no conversion"
        ) from error


def _tensors(value: object, file: Path, key: str | None) -> tuple[str, Mapping[str, Tensor], tuple[str, ...]]:
    """(container's name, its tensors, names left out): of the file itself, or of one container in it."""
    if not isinstance(value, Mapping):
        raise RunError(f"{file} holds a {type(value).__name__}, not a dictionary of tensors")
    containers = {str(name): part for name, part in value.items() if _is_container(part)}
    if key is None and _named_tensors(value) and not containers:
        key, containers = "", {"": value}
    if key is None and len(containers) == 1:
        key = next(iter(containers))
    if key is None or key not in containers:
        wanted = f"no container {key!r}" if key else "no tensors" if not containers else "several containers"
        raise RunError(
            f"{file} holds {wanted}; choose with --key one of: {', '.join(sorted(containers)) or 'none'}"
        )
    tensors = _named_tensors(containers[key])
    others = [name for name in value if str(name) != key] if key else []
    inside = [name for name in containers[key] if name not in tensors]
    return key, tensors, tuple(sorted(map(str, others + inside)))


def _named_tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: part for name, part in value.items() if isinstance(name, str) and isinstance(part, Tensor)}


def _is_container(value: object) -> bool:
    return isinstance(value, Mapping) and bool(_named_tensors(value))
