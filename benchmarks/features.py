"""Reading features against the bare forward of the same encoder on the same clips.

The bare forward gets pixels that are normalised already and lie in memory; `eval` starts from films or a
view store, normalises, pools, checks and writes. The two alternate batch by batch within one reading (the
order changes from one batch to the next), so that a machine whose speed drifts slows both alike. The ratio is
bare / read (1: no cost; the promise is 0.95), of all seconds together, with a 95 % interval by bootstrap over
readings; `outside` is the share of the reading's seconds that were not the forward's own. Random weights in
full-size networks, 16 frames of 224².
Run it on an otherwise idle machine: `python benchmarks/features.py [readings] [clips] [sizes …]`. Lines
appear as they are measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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

COLUMNS = "{:<10} {:<20} {:<7} {:>12} {:>12} {:>22} {:>9}"
LEFT = 0.025  # of the bootstrap, at either end


class Alternating:
    """The encoder as `eval` reads it; beside every batch it runs the bare forward of the same clips."""

    def __init__(self, model: Teacher, pixels: Sequence[torch.Tensor]) -> None:
        self.model, self.pixels = model, pixels
        self.geometry, self.dim, self.fingerprint = model.geometry, model.dim, model.fingerprint
        self.batch, self.bare, self.forward = 0, 0.0, 0.0

    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        is_bare_first = self.batch % 2 == 1
        if is_bare_first:
            self._run_bare()
        began = time.perf_counter()
        found = self.model.latents(frames)
        self.forward += time.perf_counter() - began
        if not is_bare_first:
            self._run_bare()
        self.batch += 1
        return found

    def _run_bare(self) -> None:
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.encode(self.pixels[self.batch % len(self.pixels)])
        self.bare += time.perf_counter() - began


def seconds_of_reading(
    alternating: Alternating, clips: Sequence[str], views: ViewSource, workers: int, pooling: str
) -> tuple[float, float, float]:
    """(bare, read, of the reading within the encoder) of one reading."""
    alternating.bare = alternating.forward = 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), num_workers=workers)
        began = time.perf_counter()
        store.features({"m": alternating}, ClipViews(clips, views, "p"), [Reading(pooling)])
        whole = time.perf_counter() - began
    return alternating.bare, whole - alternating.bare, alternating.forward


def ratio_of(seconds: np.ndarray) -> str:
    """Of (readings, 3) seconds, with its interval."""
    draws = np.random.default_rng(0).integers(0, len(seconds), (10_000, len(seconds)))
    bare, read, _ = seconds[draws].sum(1).T
    low, high = np.quantile(bare / read, [LEFT, 1 - LEFT])
    return f"{seconds[:, 0].sum() / seconds[:, 1].sum():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    readings = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    titles = ("encoder", "pixels from", "kept", "clips/s bare", "clips/s read", "bare / read", "outside")
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
            alternating = Alternating(
                model, [normalise_pixels(part) for part in frames.split(_batch_size([model]))]
            )
            alternating.latents(frames[:1])
            for name, views, workers, pooling in rows:
                alternating.batch = 0
                read = partial(seconds_of_reading, alternating, clips.clip_ids, views, workers, pooling)
                seconds = np.array([read() for _ in range(readings)])
                speeds = [f"{count * readings / each:.2f}" for each in seconds.sum(0)[:2]]
                outside = f"{1 - seconds[:, 2].sum() / seconds[:, 1].sum():.1%}"
                encoder = f"ViT-{size.capitalize()}"
                line = COLUMNS.format(encoder, name, pooling, *speeds, ratio_of(seconds), outside)
                print(line, flush=True)


if __name__ == "__main__":
    main()
