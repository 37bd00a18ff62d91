"""Clips a second that training's loader brings: without processes, with 1 and with 2, and how it was before.

Batches of uint8 clips (16 frames at 224²) and records of float16 latents (1,568 × 768), both read from stores
that lie in the page cache. `fresh`: what torch's loader does by itself, new shared memory and a new mapping
for every batch. Ways take turns; medians, and the ratio of slots to fresh memory with its quartiles.
Run it on an otherwise idle machine: `python benchmarks/loader.py [--rounds 5] [--batch 16]`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from salt_vla.batches import Batch, Batches, Part
from salt_vla.cache import CacheWriter, Manifest, Record, open_cache
from salt_vla.config import MaskConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.loader import Loading, load_from
from salt_vla.masks import build_masks
from salt_vla.view_store import StoredViews

GEOMETRY = ClipGeometry()
LATENTS = (GEOMETRY.num_tokens, 768)
CLIPS = 64
WARM_UP = 10  # batches, in which slots are made


class Fresh(Dataset[Batch]):
    """The batches as torch's loader sends them by itself."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        return self.batches[step]


def stores(folder: Path) -> tuple[StoredViews, Path]:
    """A store of views and a cache of latents, of as many clips."""
    shape = (GEOMETRY.num_frames, GEOMETRY.image_size, GEOMETRY.image_size, 3)
    views = Manifest("views", "uint8", shape, 1, 16, num_clips=CLIPS)
    latents = Manifest("latents", "float16", LATENTS, 1, 16, num_clips=CLIPS)
    rng = np.random.default_rng(0)
    names = [f"clip/{number}" for number in range(CLIPS)]
    for place, manifest in (("views", views), ("latents", latents)):
        array = rng.integers(0, 255, shape, np.uint8) if place == "views" else rng.normal(size=LATENTS)
        with CacheWriter(folder / place, manifest, names) as writer:
            for shard in writer.pending():
                writer.write_shard(shard, (Record(key, array) for key in shard.keys))
            writer.finish()
    return StoredViews(folder / "views", open_cache(folder / "views").manifest), folder / "latents"


def clips_a_second(loaded: Iterator[Batch], batch: int, steps: int) -> float:
    """Every byte is read once, as a copy to a GPU would."""
    for _ in range(WARM_UP):
        next(loaded)
    began = time.perf_counter()
    for _ in range(steps):
        for tensor in next(loaded).large_tensors():
            tensor.view(-1).view(torch.int64).sum()
    return batch * steps / (time.perf_counter() - began)


def fresh(batches: Batches, workers: int) -> Iterator[Batch]:
    return iter(
        DataLoader(Fresh(batches), batch_size=None, num_workers=workers, multiprocessing_context="spawn")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        views, latents = stores(Path(folder))
        names = Part(tuple(f"clip/{number}" for number in range(CLIPS)))
        masks = build_masks(MaskConfig(), GEOMETRY)

        def batches() -> Batches:
            sizes = {"batch_size": chosen.batch, "num_views": 1, "seed": 0}
            steps = chosen.steps + WARM_UP
            return Batches([names], views, masks, **sizes, steps=steps, cache=open_cache(latents))

        ways = {
            "no process": lambda: load_from(batches(), 0),
            "1, fresh": lambda: fresh(batches(), 1),
            "1, slots": lambda: load_from(batches(), 0, Loading(1)),
            "1, slots, masks in step": lambda: load_from(batches(), 0, Loading(1, masks_in="step")),
            "2, fresh": lambda: fresh(batches(), 2),
            "2, slots": lambda: load_from(batches(), 0, Loading(2)),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(chosen.rounds):
            for name, make in ways.items():
                rates[name].append(clips_a_second(make(), chosen.batch, chosen.steps))
    table = Table("loader processes", "clips/s", "slots ÷ fresh", title=f"batches of {chosen.batch}")
    for name, found in rates.items():
        ratio = ""
        if "slots" in name:
            before = rates[f"{name[0]}, fresh"]
            low, middle, high = np.quantile(np.array(found) / before, (0.25, 0.5, 0.75))
            ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(name, f"{statistics.median(found):.0f}", ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
