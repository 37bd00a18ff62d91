"""`batches[step]` is the step's batch: pixels, cached records and masks, joined by clip id.

Order, views, masks and jitter are pure functions of (seed, step), so one integer is the loader's whole state;
what takes the place of a damaged record is one of (seed, step, damage). Knows no loader processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from salt_vla.cache import ArrayCache, CorruptRecord, Key
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError, ConfigError, DataError
from salt_vla.masks import MaskGroup, MaskStrategy
from salt_vla.view_store import ViewSource

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

PATIENCE = 8  # steps to look ahead for clips, when no record of a step's own can be read
JITTERS = 3  # numbers a clip that photometric augmentation draws: brightness, contrast, saturation
JITTER_STREAM = 0x70686F74  # so that they are not those that masks or orders are drawn with


@dataclass(frozen=True)
class Memory:
    """Tensors of a batch that is no longer needed, to read the next one into."""

    frames: UInt8[Tensor, "batch frames height width 3"]
    records: UInt8[Tensor, "batch bytes"] | None


@dataclass(frozen=True)
class Batch:
    """One step's clips. Pixels and records cross process borders as uint8; floats are made on the device.

    `corrupt`: records that were asked for and are damaged, once for each time; their clips are not in `keys`.
    A part of a batch (a rank's, a micro-batch) begins at `first_row` of the `global_size` clips of the step.
    `jitter`: what photometric augmentation does to each clip, None where there is none.
    """

    keys: list[Key]
    frames: UInt8[Tensor, "batch frames height width 3"]
    records: UInt8[Tensor, "batch bytes"] | None
    masks: list[MaskGroup]
    corrupt: tuple[CorruptRecord, ...] = ()
    first_row: int = 0
    global_size: int = 0
    jitter: Float[Tensor, "batch changes"] | None = None

    def __post_init__(self) -> None:
        if not self.global_size:
            object.__setattr__(self, "global_size", len(self.keys))

    def large_tensors(self) -> list[Tensor]:
        """Frames, and records if there are any."""
        return [self.frames] if self.records is None else [self.frames, self.records]

    def tensors(self) -> Iterator[Tensor]:
        of_masks = (t for g in self.masks for t in (g.context_ids, g.target_ids, g.context_valid))
        for tensor in (self.frames, self.records, self.jitter, *of_masks):
            if tensor is not None:
                yield tensor

    def pin_memory(self) -> Batch:
        """The large tensors in memory that a GPU copies from by itself; as it is where there is no GPU."""
        if not torch.cuda.is_available():
            return self
        records = None if self.records is None else self.records.pin_memory()
        return replace(self, frames=self.frames.pin_memory(), records=records)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            frames=self.frames.to(device, non_blocking=True),
            records=None if self.records is None else self.records.to(device, non_blocking=True),
            masks=[group.to(device) for group in self.masks],
            jitter=None if self.jitter is None else self.jitter.to(device, non_blocking=True),
        )

    def micro_batches(self, count: int) -> Iterator[Batch]:
        """`count` equal parts; masks were drawn for the whole, so the parts add up to the same step."""
        size = len(self.keys) // count
        for start in range(0, len(self.keys), size):
            stop = start + size
            yield Batch(
                keys=self.keys[start:stop],
                frames=self.frames[start:stop],
                records=None if self.records is None else self.records[start:stop],
                masks=[group.rows(start, stop) for group in self.masks],
                first_row=self.first_row + start,
                global_size=self.global_size,
                jitter=None if self.jitter is None else self.jitter[start:stop],
            )


@dataclass(frozen=True)
class Part:
    """The clips of one data set, and its share of the clips drawn."""

    clip_ids: tuple[str, ...]
    share: float = 1.0


def parts_of(table: ClipTable, clip_ids: Sequence[str]) -> tuple[Part, ...]:
    """`clip_ids` (of `table`) by data set, with the table's weights; one part where it has none."""
    if not table.weights:
        return (Part(tuple(clip_ids)),)
    dataset_of = dict(zip(table.clip_ids, table.rows["dataset"].to_pylist(), strict=True))
    total = sum(table.weights.values())
    parts = []
    for name, weight in table.weights.items():
        chosen = tuple(clip for clip in clip_ids if dataset_of[clip] == name)
        if not chosen:
            raise DataError(f"no clip of the data set {name!r} can be used; leave it out of the mixture")
        parts.append(Part(chosen, weight / total))
    return tuple(parts)


@lru_cache(maxsize=16)
def _epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, num_clips]).permutation(num_clips)


@lru_cache(maxsize=16)
def _first_views(num_clips: int, num_views: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, num_clips, num_views]).integers(0, num_views, num_clips)


@lru_cache(maxsize=4)
def _block_of_parts(shares: tuple[float, ...], length: int, seed: int, block: int) -> np.ndarray:
    """(length, 2): which part each position of a block draws from, and its how-manieth draw of the block.

    Every part has its exact share of each block (largest remainders round it), in a random order.
    """
    exact = np.array(shares) * length
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: length - counts.sum()]] += 1
    labels = np.random.default_rng([seed, block, length, len(shares)]).permutation(
        np.repeat(np.arange(len(shares)), counts)
    )
    draws = np.empty((length, 2), dtype=np.int64)
    draws[:, 0] = labels
    for part, count in enumerate(counts):
        draws[labels == part, 1] = np.arange(count) + block * count
    return draws


def keys_of_step(parts: Sequence[Part], num_views: int, batch_size: int, seed: int, step: int) -> list[Key]:
    """Which (clip, view) a step sees: a part's clips once in each of its epochs, their views in turn.

    A mixture draws each part's share from every block of as many clips as there are in all.
    """
    length = sum(len(part.clip_ids) for part in parts)
    keys = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        which, draw = 0, position
        if len(parts) > 1:
            block, at = divmod(position, length)
            shares = tuple(part.share for part in parts)
            which, draw = (int(value) for value in _block_of_parts(shares, length, seed, block)[at])
        clip_ids = parts[which].clip_ids
        epoch, at = divmod(draw, len(clip_ids))
        clip = int(_epoch_order(len(clip_ids), seed + which, epoch)[at])
        view = (int(_first_views(len(clip_ids), num_views, seed + which)[clip]) + epoch) % num_views
        keys.append((clip_ids[clip], view))
    return keys


def rows_of(length: int, part: tuple[int, int]) -> slice:
    """Of that many rows, those of `part` = (rank, size); the first has one more where there are too few."""
    first, end = (-(-number * length // part[1]) for number in (part[0], part[0] + 1))
    return slice(first, end)


class Batches(Dataset[Batch]):
    """Map-style data set whose item `step` (from 0) is that step's whole batch, or one process' part of it.

    `part` = (rank, size): only the rank's rows are read; keys, masks and jitter are drawn for the global
    batch of `batch_size` clips and cut. `jitter`: draw numbers for photometric augmentation.
    `on_corrupt_record`, of the latent cache or of a store of views: `skip` lets another clip of the same
    batch (of the same rank's rows) take the place of a damaged one, and `stop` raises its `CorruptRecord`.
    Raises `ConfigError` when `batch_size` cannot be shared out evenly.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        views: ViewSource,
        masks: MaskStrategy,
        *,
        batch_size: int,
        num_views: int,
        seed: int,
        steps: int,
        cache: ArrayCache | None = None,
        on_corrupt_record: Literal["skip", "stop"] = "skip",
        part: tuple[int, int] = (0, 1),
        jitter: bool = False,
    ) -> None:
        if batch_size % part[1]:
            raise ConfigError(
                f"batch_size={batch_size} cannot be shared out evenly among {part[1]} processes; "
                f"choose a multiple of {part[1]}"
            )
        clip_ids = [clip for part in parts for clip in part.clip_ids]
        if not clip_ids:
            raise DataError("there are no clips to train on")
        if cache is not None:
            lacking = np.flatnonzero(~cache.with_views(clip_ids, num_views))
            if len(lacking):
                raise CacheError(
                    f"cache {cache.folder} lacks views of {len(lacking)} of the run's clips, the first: "
                    f"{clip_ids[lacking[0]]!r}; build it from the same clip table and number of views"
                )
        self.parts = tuple(parts)
        self.clip_ids = clip_ids
        self.views = views
        self.masks = masks
        self.batch_size = batch_size
        self.num_views = num_views
        self.seed = seed
        self.steps = steps
        self.cache = cache
        self.on_corrupt_record = on_corrupt_record
        self.part = part
        self.jitter = jitter

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.with_masks(self.read(step), step)

    def read(self, step: int, into: Memory | None = None) -> Batch:
        """The step's batch without its masks, in fresh memory or in that of another batch of this size."""
        asked = self.keys(step)
        batch = self._read(asked, [], lambda bad: self._with_stand_ins(asked, bad, step), into)
        rows = self._rows
        jitter = None
        if self.jitter:
            rng = np.random.default_rng([self.seed, step, JITTER_STREAM])
            drawn = rng.uniform(-1, 1, (self.batch_size, JITTERS)).astype(np.float32)
            jitter = torch.from_numpy(drawn[rows])
        return replace(batch, first_row=rows.start, global_size=self.batch_size, jitter=jitter)

    def with_masks(self, batch: Batch, step: int) -> Batch:
        """`batch` of that step with its masks: the same ones, wherever this is called."""
        masks = self.masks.sample(self.batch_size, self.seed, step)
        return replace(batch, masks=[group.rows(self._rows.start, self._rows.stop) for group in masks])

    def keys(self, step: int) -> list[Key]:
        """What is asked for at a step, by this process."""
        return keys_of_step(self.parts, self.num_views, self.batch_size, self.seed, step)[self._rows]

    @property
    def _rows(self) -> slice:
        """Of the global batch, those that this process has."""
        return rows_of(self.batch_size, self.part)

    def canonical(self, count: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """View 0 of up to `count` clips spread over the data set, in batches with masks of their own, never
        jittered. Of each batch the rows of `part` = (rank, size), where it has any; masks are drawn for all.

        Nothing stands in for a damaged record here: its clip is left out, and the others keep their masks.
        """
        chosen = np.unique(np.linspace(0, len(self.clip_ids) - 1, min(count, len(self.clip_ids))).astype(int))
        for number, start in enumerate(range(0, len(chosen), batch_size)):
            whole = [(self.clip_ids[i], 0) for i in chosen[start : start + batch_size]]
            rows = rows_of(len(whole), part)
            asked = whole[rows]
            if not asked:
                continue
            masks = [
                group.rows(rows.start, rows.stop)
                for group in self.masks.sample(len(whole), self.seed, number)
            ]
            batch = self._read(asked, masks, partial(_without, asked))
            if batch.corrupt:
                places = [asked.index(key) for key in batch.keys]
                batch = replace(batch, masks=[group.at(places) for group in masks])
            yield replace(batch, first_row=rows.start, global_size=len(whole))

    def _with_stand_ins(self, asked: list[Key], bad: Mapping[Key, CorruptRecord], step: int) -> list[Key]:
        """The batch's other clips, in turn, in the places of bad ones; a later step's where it has none."""
        if not bad:
            return asked
        later = (_without(self.keys(step + ahead), bad) for ahead in range(PATIENCE))
        good = next(filter(None, later), None)
        if good is None:
            raise next(iter(bad.values()))
        stand_ins = cycle(good)
        return [next(stand_ins) if key in bad else key for key in asked]

    def _read(
        self,
        asked: list[Key],
        masks: list[MaskGroup],
        choose: Callable[[Mapping[Key, CorruptRecord]], list[Key]],
        into: Memory | None = None,
    ) -> Batch:
        """The batch of the keys that `choose` takes, asked again for each record that proves to be bad."""
        bad: dict[Key, CorruptRecord] = {}
        of_frames = None if into is None else into.frames.numpy()
        of_records = None if into is None or into.records is None else into.records.numpy()
        while True:
            keys = choose(bad)
            try:
                # Records first: where one is damaged, no video need be decoded to find out.
                records = None
                if self.cache is not None:
                    raw = self.cache.read_many(keys, of_records)
                    records = torch.from_numpy(raw.data) if into is None else into.records
                pixels = self.views.read_many(keys, of_frames)
                frames = torch.from_numpy(pixels) if into is None else into.frames
                return Batch(keys, frames, records, masks, tuple(bad[key] for key in asked if key in bad))
            except CorruptRecord as error:
                if self.on_corrupt_record == "stop":
                    raise
                bad[error.clip_id, error.view] = error


def _without(keys: list[Key], bad: Mapping[Key, CorruptRecord]) -> list[Key]:
    return [key for key in keys if key not in bad]
