"""Frozen teachers: each turns uint8 clips into raw latents, one file a family.

`load_teacher` is the way in; `salt_vla.registry.TEACHERS` names the families.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.registry import TEACHERS, resolve
from salt_vla.rundir import root, run_or_directory

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


class Teacher(Protocol):
    """`latents` are raw: normalising them is the objective's business. `fingerprint` is a hash of the loaded
    parameters and the configuration."""

    name: str
    dim: int
    num_parameters: int
    geometry: ClipGeometry
    fingerprint: str

    def latents(
        self, frames: UInt8[Tensor, "batch frames height width 3"]
    ) -> Float[Tensor, "batch tokens dim"]: ...


def load_teacher(
    name_or_directory: str | Path,
    geometry: ClipGeometry | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    layer: int | None = None,
) -> Teacher:
    """Load a teacher from a directory (a run, checkpoint or export of this package) or by run name.

    `geometry`: what the caller's clips have; a teacher made for another one is refused. `layer`: take the
    tokens after that block instead of the last.
    """
    path = run_or_directory(name_or_directory)
    if not path.is_dir():
        raise RunError(
            f"there is no teacher {str(name_or_directory)!r}: neither a directory nor a run in {root()}/runs"
        )
    load = resolve(TEACHERS, "salt")
    return cast(Teacher, load(path, geometry=geometry, device=device, dtype=dtype, layer=layer))
