"""Files that several processes write together: each its rows of the optimizer's state; who waits for whom.

Used in the threads that write checkpoints, so what is told goes through the store, never through the group
that training talks over. Knows tensors by their names.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salt_vla.errors import ResourceError, RunError
from salt_vla.models.loading import DamagedWeightsError
from salt_vla.training.distributed import LostProcess, World

OPTIMIZER = "optimizer.safetensors"
_PART = re.compile(r"optimizer-(\d+)-of-(\d+)\.safetensors")
_WRITTEN = "written"
_LOOK = 0.02  # seconds between two looks for another's word
_numbers = count()  # All processes write the same checkpoints in the same order.


@dataclass(frozen=True)
class Joint:
    """One folder that all processes of a world write into: the first makes it and waits for the others."""

    world: World
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def file(self) -> str:
        """The name of this process' rows."""
        return f"optimizer-{self.world.rank + 1:05d}-of-{self.world.size:05d}.safetensors"

    def invite(self, folder: Path) -> None:
        """Tell the others the folder."""
        self._say("folder", folder.name)

    def invited_to(self, parent: Path) -> Path:
        return parent / self._hear("folder")

    def report(self, failure: str = "") -> None:
        """This process' rows are on disk, or why not."""
        self._say(f"process {self.world.rank}", failure or _WRITTEN)

    def wait_for_others(self) -> None:
        """Raises `ResourceError` with what another process could not write."""
        for rank in range(1, self.world.size):
            said = self._hear(f"process {rank}")
            if said != _WRITTEN:
                raise ResourceError(said)

    def _say(self, what: str, text: str) -> None:
        assert self.world.store is not None
        self.world.store.set(f"checkpoint {self.number}: {what}", text)

    def _hear(self, what: str) -> str:
        """Wait for another's word, but not longer than for its process or ours."""
        store, key = self.world.store, f"checkpoint {self.number}: {what}"
        assert store is not None
        while not store.check([key]):
            if self.world.has_ended() or not threading.main_thread().is_alive():
                raise LostProcess(f"another process has ended while a checkpoint was written ({what})")
            time.sleep(_LOOK)
        said = store.get(key).decode()
        store.delete_key(key)
        return said


def read_optimizer(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) one by one, whether one process wrote them or several their rows.

    Raises `RunError` where a file is missing or damaged.
    """
    files = _files(folder)
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name in opened[0].keys():  # noqa: SIM118 - no dictionary
                first = opened[0].get_tensor(name).clone()
                whole = not first.ndim or len(opened) == 1
                yield name, first if whole else torch.cat([file.get_tensor(name) for file in opened])
    except (OSError, SafetensorError) as error:
        raise DamagedWeightsError(f"weights {files[0]} are missing or damaged: {error}") from error


def _files(folder: Path) -> list[Path]:
    parts = {path: match for path in folder.iterdir() if (match := _PART.fullmatch(path.name))}
    if not parts:
        return [folder / OPTIMIZER]
    wanted = int(next(iter(parts.values()))[2])
    if {int(match[1]) for match in parts.values()} != set(range(1, wanted + 1)):
        raise RunError(f"{folder} holds {len(parts)} of the optimizer's {wanted} files; remove this folder")
    return sorted(parts)
