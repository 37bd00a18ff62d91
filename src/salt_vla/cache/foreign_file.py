"""One file of latents that another program wrote: the array in it, or the reason why there is none.

Runs nothing that the file asks for, waits for nothing, and takes no more memory than the file has bytes.
Knows no folder and no list of clips.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np

from salt_vla.cache.foreign import IDS
from salt_vla.errors import CacheError

if TYPE_CHECKING:
    from jaxtyping import Float

TENSORS = ("latents", "features", "embeddings", "tokens", "last_hidden_state", "hidden_states")
MOST_VALUES = 2**27  # of one clip: 60 times the largest latents in use
MOST_BYTES = 2**31
_WANTS = re.compile(r"GLOBAL (\S+)")


def read_latents(
    path: Path, name: str, shape: tuple[int, ...] | None = None
) -> Float[np.ndarray, "tokens dim"]:
    """One clip's latents in float32 (float16 as it is). Raises `CacheError` with the reason: unreadable, a
    pickle that would run code, no single array in it, not of `shape`, or said to be of another clip."""
    try:
        _refuse_strange(path)
        value, said = _read_npy(path) if path.suffix == ".npy" else _read_torch(path)
    except OSError as error:
        raise CacheError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except CacheError:
        raise
    except Exception as error:  # Neither library names a set of errors for what it cannot or will not read.
        raise CacheError(f"{path.name} {_why_not(path, str(error))}") from error
    if said not in (None, name):
        raise CacheError(f"{path.name} says that it is of clip {said!r}, not {name!r}")
    found = tuple(value.shape)
    while len(found) > 2 and found[0] == 1:
        found = found[1:]
    if shape is not None and found != shape:
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not {shape}")
    if len(found) != 2 or value.size > MOST_VALUES:
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not (tokens, width) of one clip")
    return value.reshape(found)


def _refuse_strange(path: Path) -> None:
    about = path.stat()
    if not S_ISREG(about.st_mode):  # Opening a pipe would wait without end.
        raise CacheError(f"{path.name} is no file but a folder, a pipe or a device")
    if about.st_size > MOST_BYTES:
        raise CacheError(f"{path.name} is too large for one clip ({about.st_size:,} bytes)")
    if path.suffix != ".npy" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > about.st_size:  # torch packs nothing; a thousandfold may be hidden in there.
            raise CacheError(f"{path.name} is packed ({unpacked:,} bytes in {about.st_size:,}); unpack it")


def _read_npy(path: Path) -> tuple[np.ndarray, str | None]:
    with path.open("rb") as file:
        value = np.lib.format.read_array(file, allow_pickle=False)
    if value.dtype.kind != "f":
        raise CacheError(f"{path.name} holds {value.dtype}, not float16 or float32 (bfloat16 only in .pt)")
    return value if value.dtype == np.float16 else value.astype(np.float32), None


def _read_torch(path: Path) -> tuple[np.ndarray, str | None]:
    import torch  # Here, because the rest of the package does without.

    value = torch.load(path, map_location="cpu", weights_only=True)
    said = None
    if isinstance(value, Mapping):
        ids = [str(value[key]) for key in IDS if isinstance(value.get(key), str | int)]
        said = ids[0] if ids else None
        value = _only_tensor(path, value)
    is_plain = (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and not (value.is_meta or value.is_nested)
    )
    if not is_plain:
        raise CacheError(f"{path.name} holds no plain tensor of float32, float16 or bfloat16")
    if value.numel() > MOST_VALUES:  # Before it is copied: a stride of 0 makes much of little.
        raise CacheError(f"{path.name} holds {tuple(value.shape)} numbers, not (tokens, width) of one clip")
    value = value.detach().resolve_neg()
    return (value if value.dtype == torch.float16 else value.float()).numpy(), said


def _only_tensor(path: Path, value: Mapping[Any, Any]) -> Any:
    known = [key for key in TENSORS if key in value]
    others = [key for key, part in value.items() if hasattr(part, "layout") and part.ndim >= 2]
    if not known and len(others) != 1:
        keys = ", ".join(str(key) for key in value)[:80]
        raise CacheError(f"{path.name} holds no latents under a known name ({keys})")
    return value[(known or others)[0]]


def _why_not(path: Path, said: str) -> str:
    if path.suffix == ".npy":
        return f"is damaged, or no array of numbers ({said[:80]})"
    if wants := _WANTS.search(said):
        return f"would run code when it is opened (it asks for {wants[1][:80]})"
    return "is damaged, or no file of torch with tensors alone"
