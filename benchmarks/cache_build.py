"""Building a cache against the bare teacher's forward of the same batches, decoding included.

A VideoMAE of ViT-B's size with random weights, 16 frames at 224², VP9 films of 240 lines as in SSv2. Each
pair times the teacher on batches that are decoded already, and a build of the same clips; pairs alternate
their order, and the ratio is bare ÷ build (1: no cost; the promise is 0.90). "steady" leaves out the first
batch, whose films nobody could decode ahead; "whole" counts the start of the decoders too. Run it on an
otherwise idle machine: `python benchmarks/cache_build.py [--pairs 5] [--clips 32] [--batch 8] [--workers 1]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from decode import KINDS, make_table
from rich.console import Console
from rich.table import Table
from transformers import VideoMAEConfig, VideoMAEModel

from salt_vla.cache import CacheWriter
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.jobs.build_cache import latents_manifest, latents_of
from salt_vla.jobs.pipeline import Pipeline
from salt_vla.teachers import Teacher, videomae
from salt_vla.teachers.base import TeacherRequest

FILMS = KINDS["vp9"]
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # Width, blocks, heads.


def table_of(folder: Path, count: int) -> ClipTable:
    """`count` clips, each with a file of its own: a dozen films under many names."""
    made = make_table(FILMS, folder).clips()
    clips = []
    for number in range(count):
        film = made[number % len(made)]
        name = f"{number:06d}.{FILMS.suffix}"
        if not (folder / name).exists():
            os.link(folder / film.file, folder / name)
        clips.append(dataclasses.replace(film, clip_id=f"bench/{number:06d}", file=name, episode=number))
    return ClipTable.from_clips(clips, folder)


def teacher_of(size: str, folder: Path, device: str) -> Teacher:
    width, depth, heads = SIZES[size]
    config = VideoMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width
    )
    torch.manual_seed(0)
    VideoMAEModel(config).save_pretrained(folder)
    return videomae.load(folder, size, TeacherRequest(device=device))


def build(
    teacher: Teacher, table: ClipTable, place: Path, batch: int, workers: int
) -> tuple[float, float, str]:
    """(seconds of the whole build, seconds after its first batch, what was waited for)."""
    manifest = latents_manifest(teacher, table, "train", FILMS.view, "float16", batch)
    times: list[float] = []
    with CacheWriter(place, manifest, table.clip_ids) as writer:
        began = time.perf_counter()
        views = ViewReader(table, FILMS.view, teacher.geometry)
        pipeline = Pipeline(writer, views, latents_of(teacher), batch, workers, work="teacher")
        pipeline.run(lambda amount=1, note="": times.append(time.perf_counter()))
        ended = time.perf_counter()
        writer.finish()
    return ended - began, ended - times[0], str(pipeline.shares)


def bare(teacher: Teacher, batches: list[torch.Tensor]) -> tuple[float, float]:
    """(seconds of all batches, seconds after the first one)."""
    began = time.perf_counter()
    teacher.latents(batches[0]).cpu()
    first = time.perf_counter()
    for batch in batches[1:]:
        teacher.latents(batch).cpu()
    ended = time.perf_counter()
    return ended - began, ended - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("pairs", 5), ("clips", 32), ("batch", 8), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "films").mkdir()
        table = table_of(place / "films", chosen.clips)
        teacher = teacher_of(chosen.size, place / "teacher", chosen.device)
        frames = ViewReader(table, FILMS.view, teacher.geometry).read_many([(c, 0) for c in table.clip_ids])
        batches = list(torch.from_numpy(frames).split(chosen.batch))
        bare(teacher, batches[:1])
        for pair in range(chosen.pairs):
            arguments = (teacher, table, place / f"cache-{pair}", chosen.batch, chosen.workers)
            if pair % 2:
                whole, steady, shares = build(*arguments)
                alone = bare(teacher, batches)
            else:
                alone = bare(teacher, batches)
                whole, steady, shares = build(*arguments)
            rows.append((alone[0] / whole, alone[1] / steady))
            ratios = f"{rows[-1][0]:.3f}, steady {rows[-1][1]:.3f}"
            print(f"bare {alone[0]:.2f} s, build {whole:.2f} s: {ratios}; {shares}", flush=True)
    shown = Table("", "bare ÷ build", "quartiles", title=f"{chosen}, {torch.get_num_threads()} threads")
    for name, ratios in zip(("whole", "steady"), np.array(rows).T, strict=True):
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        shown.add_row(name, f"{middle:.3f}", f"{low:.3f} – {high:.3f}")
    Console().print(shown)


if __name__ == "__main__":
    main()
