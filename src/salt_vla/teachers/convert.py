"""A pickled checkpoint → a folder with safetensors, once and on request, so that nothing else opens pickles.

Knows containers of tensors, not the families' names: those are the loaders' business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_vla.errors import RunError
from salt_vla.models.loading import write_tensors
from salt_vla.rundir import write_atomically, write_bytes
from salt_vla.teachers.weights import CONFIG, FLOATS, LFS, PROCESSORS, WEIGHTS, read_config

ITSELF = "."  # As a key: tensors that the file holds outside of any container.
SHARED = 16  # Tied weights are written once for each name.
PLAIN = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


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
    "target_encoder", …; ".": the file itself). `config`: config.json; default: the one beside `file`, if
    there is one. Settings that `out` already holds are kept, and others than those to be written there are
    refused; the weights come last, so that a conversion that was cut short can be run again. Raises
    `RunError`, `ResourceError`.
    """
    if not file.is_file():
        raise RunError(f"there is no file {file} to convert")
    if (out / WEIGHTS).exists():
        raise RunError(f"{out / WEIGHTS} exists already; choose another folder")
    settings = _settings(file.parent, out, config)  # Before the long work: are they what they should be?
    container, tensors, left_out = _tensors(_open(file), file, key)
    _require_plain(tensors, file)
    # Copies: tied weights share memory, which safetensors cannot say.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    for name, source in settings.items():
        write_bytes(out / name, source.read_bytes())
    write_atomically(out / WEIGHTS, lambda temporary: write_tensors(copies, temporary))
    return Converted(out, len(copies), container, left_out, (out / CONFIG).is_file())


def _settings(beside: Path, out: Path, config: Path | None) -> dict[str, Path]:
    """Name → source of the settings that `out` does not hold yet; `RunError` where it holds others."""
    sources = {name: beside / name for name in PROCESSORS}
    sources[CONFIG] = config or beside / CONFIG
    wanted = {name: path for name, path in sources.items() if path.is_file() or path == config}
    for name, path in wanted.items():
        read_config(path.parent, path.name)
        if (out / name).exists() and (out / name).read_bytes() != path.read_bytes():
            raise RunError(f"{out / name} exists already and is not {path}; choose another folder")
    return {name: path for name, path in wanted.items() if not (out / name).exists()}


def _open(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no set of errors for files that it cannot or will not read.
        raise RunError(f"{file} {_why_not(file, str(error))}") from error


def _why_not(file: Path, said: str) -> str:
    """Why torch did not open a file, in our words: its own advise to open it without care."""
    with file.open("rb") as handle:
        head = handle.read(64)
    if not head:
        return "is empty; fetch it again"
    if head.startswith(LFS):
        return "is a Git LFS pointer, not the checkpoint; run: git lfs pull"
    if head[8:9] == b"{":
        return f"is a safetensors file, which needs no conversion: put it beside its {CONFIG} as {WEIGHTS}"
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        return "is no checkpoint of torch"
    if wants := _GLOBAL.search(said):
        return (
            f"would run code when it is opened (it asks for {wants[1][:80]}); open it where you trust it and "
            "save its state_dict alone"
        )
    return (
        "is damaged, or holds more than tensors in plain containers; fetch it again, or open it where you "
        "trust it and save its state_dict alone"
    )


def _tensors(value: object, file: Path, key: str | None) -> tuple[str, Mapping[str, Tensor], tuple[str, ...]]:
    """(container's name, its tensors, names left out): of the file itself, or of one container in it."""
    if not isinstance(value, Mapping):
        raise RunError(f"{file} holds a {type(value).__name__}, not a dictionary of tensors")
    containers = {str(name): part for name, part in value.items() if _is_container(part)}
    if _is_container(value):
        containers[ITSELF] = value
    if not containers:
        raise RunError(f"{file} holds no tensors, neither by name nor in a container")
    if key is None and len(containers) == 1:
        key = next(iter(containers))
    if key is None or key not in containers:
        wanted = f"no container {key!r}" if key else "several containers"
        itself = f" ({ITSELF}: the tensors outside of any)" if ITSELF in containers else ""
        raise RunError(
            f"{file} holds {wanted}; choose with --key one of: {', '.join(sorted(containers))}{itself}"
        )
    tensors = _named_tensors(containers[key])
    others = [name for name in value if str(name) != key] if key != ITSELF else []
    inside = [name for name in containers[key] if name not in tensors]
    return "" if key == ITSELF else key, tensors, tuple(sorted(map(str, others + inside)))


def _require_plain(tensors: Mapping[str, Tensor], file: Path) -> None:
    """`RunError` for tensors that a safetensors file cannot hold, and for more numbers than the file has."""
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in PLAIN
    ]
    if odd:
        raise RunError(
            f"{file} holds {odd[0][:80]!r}, which is no plain tensor (sparse, quantised, complex, nested or "
            "without values); save its state_dict as plain tensors where you trust it"
        )
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > SHARED * file.stat().st_size:
        raise RunError(
            f"{file} would become {needed:.1e} bytes, more than {SHARED} times its size: its tensors repeat "
            "a few numbers; save them as they are meant"
        )


def _named_tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: part for name, part in value.items() if isinstance(name, str) and isinstance(part, Tensor)}


def _is_container(value: object) -> bool:
    return isinstance(value, Mapping) and bool(_named_tensors(value))
