"""Attentive training from features on disk, beside features in memory and extracting them anew each epoch.

    python benchmarks/attentive.py

Synthetic clips; every row one seed, the three ways in turn, the fastest of `--repeats`. A clip/s is one clip
seen once by all heads of the grid.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from salt_vla.config import EncoderConfig
from salt_vla.evaluation.attentive_head import AttentiveHead
from salt_vla.evaluation.attentive_training import Goal, Recipe, Tokens, Trained, train
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder
from salt_vla.teachers.pixel import EncoderTeacher

GEOMETRY = ClipGeometry(num_frames=8, image_size=96, tubelet_size=2, patch_size=16)  # the demo's
CLASSES = 12


class Anew(Tokens):
    """Tokens that the encoder computes at every reading: what an epoch costs without a store."""

    def __init__(self, encoder: EncoderTeacher, clips: np.ndarray, shape: tuple[int, ...]) -> None:
        super().__init__("anew", np.broadcast_to(np.float16(0), shape))
        self.model, self.clips = encoder, clips

    def _read(self, rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model.latents(torch.from_numpy(self.clips[rows])).float().numpy()


def clips_a_second(tokens: Tokens, labels: torch.Tensor, depth: int, heads: int, clips: int) -> float:
    torch.manual_seed(0)
    dim = tokens.values.shape[2]
    grid = [
        Trained(AttentiveHead(dim, CLASSES, depth), Goal(labels, CLASSES), 1e-3, 0.01) for _ in range(heads)
    ]
    recipe = Recipe((1e-3,), (0.01,), batch=16, epochs=1)
    seen = recipe.steps(clips) * 16
    started = time.perf_counter()
    train("bench", grid, tokens, np.arange(clips), recipe, 0, lambda done, live: None)
    return seen / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = EncoderConfig(name="vit_micro", geometry=GEOMETRY)
    model = EncoderTeacher(build_encoder(config), "bench")
    random = np.random.default_rng(0)
    films = random.integers(0, 256, (options.clips, 8, 96, 96, 3), np.uint8)
    with torch.inference_mode():
        parts = [model.latents(torch.from_numpy(films[i : i + 32])) for i in range(0, len(films), 32)]
    values = torch.cat(parts).half().numpy()
    labels = torch.from_numpy(random.integers(0, CLASSES, options.clips))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.rows"
        values.tofile(file)
        ways = {
            "in memory": Tokens("memory", values),
            "mapped": Tokens("mapped", np.memmap(file, np.float16, "r", shape=values.shape)),
            "extracted anew": Anew(model, films, values.shape),
        }
        for name, depth, heads in (("attentive-small", 0, 6), ("attentive", 3, 1)):
            best = dict.fromkeys(ways, 0.0)
            for _ in range(options.repeats):
                for way, tokens in ways.items():
                    best[way] = max(best[way], clips_a_second(tokens, labels, depth, heads, options.clips))
            rows.append({"probe": name, "heads": heads} | {way: round(rate, 1) for way, rate in best.items()})
    print(
        json.dumps({"tokens": list(values.shape), "threads": options.threads, "clips_per_s": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
