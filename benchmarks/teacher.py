"""A teacher's `latents` against the bare forward of transformers' class, on the same clips.

The bare forward gets pixels that are normalised already; the teacher starts from uint8, so its ratio pays
for that too. Pairs alternate their order; the ratio is the median over pairs of bare / teacher (1: no cost;
the promise is 0.98). Random weights in full-size networks. Run it on an otherwise idle machine:
`python benchmarks/teacher.py [pairs] [batch] [device] [dtype]`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from salt_vla.models.pixels import normalise_pixels
from salt_vla.teachers import videomae, vjepa2
from salt_vla.teachers.base import FrozenTeacher, TeacherRequest

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # Width, blocks, heads.
FRAMES = 16
Forward = Callable[[Tensor], Tensor]


def build_videomae(size: str, folder: Path, request: TeacherRequest) -> tuple[FrozenTeacher, Forward]:
    width, depth, heads = SIZES[size]
    config = VideoMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width
    )
    model = VideoMAEModel(config).eval()
    model.save_pretrained(folder)
    model.to(device=request.device, dtype=getattr(torch, request.dtype))
    return videomae.load(folder, size, request), lambda pixels: model(pixels).last_hidden_state


def build_vjepa2(size: str, folder: Path, request: TeacherRequest) -> tuple[FrozenTeacher, Forward]:
    width, depth, heads = SIZES[size]
    config = VJEPA2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        frames_per_clip=FRAMES,
        pred_num_hidden_layers=1,
    )
    model = VJEPA2Model(config).eval()
    model.save_pretrained(folder)
    model.to(device=request.device, dtype=getattr(torch, request.dtype))
    return vjepa2.load(folder, size, request), lambda pixels: model.get_vision_features(pixels)


FAMILIES = {"videomae": build_videomae, "vjepa2": build_vjepa2}


def seconds(call: Callable[[], Tensor], device: str) -> float:
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(teacher: FrozenTeacher, forward: Forward, pairs: int, batch: int) -> tuple[np.ndarray, float]:
    """((pairs, 2) seconds of bare and teacher, after two pairs not counted; their largest difference)."""
    geometry, device = teacher.geometry, teacher.device
    shape = (batch, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    pixels = normalise_pixels(frames).transpose(1, 2).contiguous().to(teacher.dtype)
    times = np.empty((pairs + 2, 2))
    with torch.inference_mode():
        calls = (lambda: forward(pixels), lambda: teacher.latents(frames))
        difference = (calls[0]().float() - calls[1]()).abs().max().item()
        for pair in range(pairs + 2):
            for which in (0, 1) if pair % 2 else (1, 0):
                times[pair, which] = seconds(calls[which], device)
    return times[2:], difference


def main() -> None:
    pairs, batch = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 12), (2, 1)))
    device, dtype = (sys.argv[i] if len(sys.argv) > i else word for i, word in ((3, "cpu"), (4, "float32")))
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    table = Table(
        "family", "size", "bare ms", "teacher ms", "ratio", "quartiles", "max |Δ|",
        title=f"{threads}, {dtype}, batch {batch}, {pairs} pairs",
    )  # fmt: skip
    for family, build in FAMILIES.items():
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                teacher, forward = build(size, Path(folder), TeacherRequest(device=device, dtype=dtype))
            times, difference = measure(teacher, forward, pairs, batch)
            low, middle, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75))
            bare, wrapped = (f"{1000 * value:.1f}" for value in np.median(times, axis=0))
            spread = f"{low:.3f} – {high:.3f}"
            table.add_row(family, size, bare, wrapped, f"{middle:.3f}", spread, f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
