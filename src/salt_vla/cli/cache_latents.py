"""The flags that `cache build` and `cache plan` share: which latents of which clips, and how they are made.

Says them once, and loads what they name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from salt_vla.config import DataConfig, TrainConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from salt_vla.cache.format import EncodingName
    from salt_vla.data.clip_table import ClipTable
    from salt_vla.teachers import Teacher


@dataclass(frozen=True)
class Latents:
    """What is asked for.

    Attributes:
        overrides: fields to change, as field=value, for example data.view.frame_stride=2.
        teacher: a run's name, a directory, a published teacher's name or a hub id (docs/teachers.md).
        out: the cache's folder; a second split built there lies in a folder of its own below it.
        recipe: the student's recipe (`salt-vla recipes ls`).
        split: which clips of the table.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        encoding: float16, or int8 with scales per token and channel (half the bytes).
        layer: take the tokens after this block, 1 … depth, or from the end (-1: the last).
        final_norm: the network's own final norm (`model`), or the raw residual stream (`none`).
        num_views: views of a clip to cache; default: the recipe's, or as the teacher was trained.
        device: where the teacher runs; `auto` is CUDA where there is one.
        dtype: what it computes in.
        memory_limit: as 25GB: let as many clips pass the teacher at once as this holds (default: 32 clips).
        workers: processes that decode videos; default: the recipe's data.num_workers, or what suits here.
    """

    out: Path
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    teacher: str = ""
    recipe: str | None = None
    split: str = "train"
    data: str = "metaworld-mini"
    encoding: Literal["float16", "int8"] = "float16"
    layer: int = -1
    final_norm: Literal["model", "none"] = "model"
    num_views: int | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_limit: str = ""
    workers: int | None = None

    def open(self) -> OpenLatents:
        """Load the teacher and find the clips. Raises the errors of both."""
        from salt_vla.config import parse_bytes
        from salt_vla.freed_memory import keep_freed_memory
        from salt_vla.jobs.build_cache import BATCH_SIZE, fitting_batch
        from salt_vla.jobs.data import open_table
        from salt_vla.teachers import load_teacher

        if not self.teacher:
            raise ConfigError("whose latents? give --teacher a run's name, a directory or a published name")
        own = None
        if self.recipe is None and any(name.startswith("encoder.geometry") for name in self.overrides):
            # Overrides change the clips that the teacher takes by itself, not those of our defaults.
            own = load_teacher(self.teacher, layer=self.layer, final_norm=self.final_norm).geometry
        config, geometry = self._config(own)
        device = config.runtime.device
        teacher = load_teacher(self.teacher, geometry, device, self.dtype, self.layer, self.final_norm)
        data = config.data
        if self.num_views is not None:
            data = replace(data, view=replace(data.view, num_views=self.num_views))
        table = open_table(self.data, data.view, teacher.geometry).select(split=self.split)
        batch_size = BATCH_SIZE
        if self.memory_limit:
            batch_size = fitting_batch(teacher, self.out, self.split, parse_bytes(self.memory_limit))
        else:  # It takes more at the peak than a batch is measured to take.
            keep_freed_memory()
        return OpenLatents(teacher, table, self.split, self.out, data, self.encoding, batch_size)

    def num_workers(self, data: DataConfig) -> int | None:
        """None where neither flag nor recipe says how many."""
        return self.workers if self.workers is not None else data.num_workers or None

    def _config(self, own: ClipGeometry | None) -> tuple[TrainConfig, ClipGeometry | None]:
        """Which clips to cache: the recipe's, or those that the teacher was trained with (that the table was
        cut for, if no run of ours trained it); None: its geometry.

        `own`: that geometry, where overrides without a recipe change it.
        """
        from salt_vla.config import override
        from salt_vla.jobs.teacher import data_settings
        from salt_vla.recipes import get_recipe
        from salt_vla.training.runtime import resolve_device

        if self.recipe is None:
            base = TrainConfig(data=data_settings(self.teacher, self.data))
        else:
            base = get_recipe(self.recipe).config
        base = replace(base, runtime=replace(base.runtime, device=self.device))
        if own is not None:
            base = replace(base, encoder=replace(base.encoder, geometry=own))
        config = resolve_device(override(base, self.overrides))
        return config, None if self.recipe is None and own is None else config.geometry


@dataclass(frozen=True)
class OpenLatents:
    """The same with the teacher loaded and the split's clips at hand, in the order of `build_cache`."""

    teacher: Teacher
    table: ClipTable
    split: str
    out: Path
    data: DataConfig
    encoding: EncodingName
    batch_size: int

    def all(self) -> tuple[Teacher, ClipTable, str, Path, DataConfig, EncodingName, int]:
        return self.teacher, self.table, self.split, self.out, self.data, self.encoding, self.batch_size
