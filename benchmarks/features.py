"""Reading features against the bare forward of the same encoder on the same clips.

The bare forward gets pixels that are normalised already and lie in memory; `eval` starts from films or a
view store, pools, checks and writes. Pairs alternate within one process; the ratio is the median over pairs
of bare / read (1: no cost; the promise is 0.95). Random weights in full-size networks, 16 frames of 224².
Run it on an otherwise idle machine: `python benchmarks/features.py [pairs] [clips] [sizes …]`; six minutes
on two cores. Lines appear as they are measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.view_lock import ViewReader
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore, _batch_size
from salt_vla.evaluation.features import Reading
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import build_view_store, open_table
from salt_vla.jobs.pipeline import num_decoders
from salt_vla.models.pixels import normalise_pixels
from salt_vla.teachers import Teacher, load_teacher
from salt_vla.view_store import StoredViews, ViewSource, store_manifest

COLUMNS = "{:<10} {:<20} {:<7} {:>12} {:>12} {:>7}   {}"


def seconds_bare(model: Teacher, pixels: Sequence[torch.Tensor]) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in pixels:
            model.encode(batch)
    return time.perf_counter() - began


def seconds_read(
    model: Teacher, clips: Sequence[str], views: ViewSource, workers: int, pooling: str
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), num_workers=workers)
        began = time.perf_counter()
        store.features({"m": model}, ClipViews(clips, views, "p"), [Reading(pooling)])
        return time.perf_counter() - began


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    titles = ("encoder", "pixels from", "kept", "clips/s bare", "clips/s read", "ratio", "of every pair")
    print(COLUMNS.format(*titles), flush=True)
    data, geometry = DataConfig(view=ViewConfig(frame_stride=2)), ClipGeometry()
    clips = open_table("metaworld-mini", data.view, geometry)
    clips = clips.only(clips.clip_ids[:count])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "views"
        build_view_store(clips, data.view, geometry, 1, place)
        stored = StoredViews(place, store_manifest(clips, data.view, geometry, 1))
        decoders = num_decoders(None, count, "cpu")
        rows: list[tuple[str, ViewSource, int, str]] = [
            ("view store", stored, 0, "grid"),
            ("view store", stored, 0, "tokens"),
            (f"films, {decoders} decoders", ViewReader(clips, data.view, geometry), decoders, "grid"),
        ]
        for size in sys.argv[3:] or ["tiny", "small"]:
            model = load_teacher(f"random:vit_{size}_patch16_224")
            frames = torch.from_numpy(stored.read_many([(clip, 0) for clip in clips.clip_ids]))
            batches = [normalise_pixels(part) for part in frames.split(_batch_size([model]))]
            seconds_bare(model, batches[:1])
            for name, views, workers, pooling in rows:
                bare_run = partial(seconds_bare, model, batches)
                read_run = partial(seconds_read, model, clips.clip_ids, views, workers, pooling)
                found = []
                for number in range(pairs):
                    first = bare_run() if number % 2 else None
                    read_one = read_run()
                    found.append((bare_run() if first is None else first, read_one))
                bare, read = (np.array(column) for column in zip(*found, strict=True))
                speeds = [f"{count / median(each):.2f}" for each in (bare, read)]
                ratios = " ".join(f"{ratio:.3f}" for ratio in bare / read)
                encoder = f"ViT-{size.capitalize()}"
                print(
                    COLUMNS.format(encoder, name, pooling, *speeds, f"{median(bare / read):.3f}", ratios),
                    flush=True,
                )


if __name__ == "__main__":
    main()
