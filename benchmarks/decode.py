"""Clips a second: the bare decoder's loop against the view reader, in one process and in two.

The bare loop seeks, decodes forward and converts a clip's frames to RGB, and does nothing else; the view
reader also cuts, resizes and checks. Films are made here: 240 lines at 12 frames a second as in SSv2, and
480 lines at 30 with far key frames and overlapping clips, as in LeRobot data sets. One decoder thread.
Run it on an otherwise idle machine: `python benchmarks/decode.py [--decoder torchcodec]`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console
from rich.table import Table

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=16, image_size=224, tubelet_size=2, patch_size=16)


@dataclass(frozen=True)
class Films:
    """Several films of one kind, and the clips that are read from them."""

    name: str
    codec: str
    suffix: str
    height: int
    width: int
    rate: int
    frames: int
    count: int
    stride: int
    hop: int  # file frames between two clips' first frames; 0: one clip a film
    options: tuple[tuple[str, str], ...]

    @property
    def view(self) -> ViewConfig:
        return ViewConfig(frame_stride=self.stride)

    def starts(self) -> list[int]:
        span = 15 * self.stride + 1
        return list(range(0, self.frames - span + 1, self.hop)) if self.hop else [(self.frames - span) // 2]


KINDS = {
    "vp9": Films(
        "VP9 240 lines", "libvpx-vp9", "webm", 240, 426, 12, 60, 12, 2, 0,
        (("g", "128"), ("crf", "29"), ("b", "0"), ("cpu-used", "5"), ("deadline", "good")),
    ),
    "h264": Films(
        "H.264 480 lines", "libx264", "mp4", 480, 640, 30, 300, 2, 4, 32,
        (("g", "250"), ("crf", "23"), ("preset", "veryfast")),
    ),
    "av1": Films(
        "AV1 480 lines", "libsvtav1", "mp4", 480, 640, 30, 300, 2, 4, 32,
        (("g", "250"), ("crf", "30"), ("preset", "10")),
    ),
}  # fmt: skip


def film(films: Films, seed: int) -> np.ndarray:
    """uint8 (frames, height, width, 3): a camera that pans over a fine texture, and two things that move."""
    rng = np.random.default_rng(seed)
    height, width = films.height, films.width
    fine = rng.normal(0, 1, (height + 64, width + 64, 3))
    for _ in range(2):
        fine = (fine + np.roll(fine, 1, 0) + np.roll(fine, 1, 1) + np.roll(fine, -1, 0)) / 4
    coarse = np.kron(rng.uniform(40, 200, (height // 32 + 3, width // 32 + 3, 3)), np.ones((32, 32, 1)))
    scene = (coarse[: height + 64, : width + 64] + 40 * fine).clip(0, 255).astype(np.uint8)
    frames = np.empty((films.frames, height, width, 3), np.uint8)
    for number in range(films.frames):
        at = 32 + round(24 * np.sin(number / 40))
        frames[number] = scene[at : at + height, at : at + width]
        for thing in range(2):
            y = round(height * (0.4 + 0.25 * np.sin(number / 17 + 2 * thing)))
            x = round(width * (0.4 + 0.25 * np.cos(number / 23 + thing)))
            frames[number, y : y + height // 6, x : x + height // 6] = (
                220 - 90 * thing,
                60,
                40 + 120 * thing,
            )
    return frames


def write(path: Path, films: Films, seed: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(films.codec, rate=films.rate, options=dict(films.options))
        stream.height, stream.width, stream.pix_fmt = films.height, films.width, "yuv420p"
        for number, image in enumerate(film(films, seed)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, films.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    # SVT-AV1's encoder makes a root's thread a real-time one, which would be timed as no other.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def make_table(films: Films, folder: Path) -> ClipTable:
    clips = []
    for number in range(films.count):
        name = f"{films.name.replace(' ', '-')}-{number}.{films.suffix}"
        if not (folder / name).exists():
            write(folder / name, films, number)
        clips += [
            Clip(
                clip_id=f"{name}@{start}", dataset="bench", source="folder", file=name, first_frame=start,
                episode=number, episode_first_frame=0, episode_frames=films.frames, camera="", label="",
                fps=films.rate, variable_rate=False, split="train",
            )
            for start in films.starts()
        ]  # fmt: skip
    return ClipTable.from_clips(clips, folder)


def bare_loop(table: ClipTable, view: ViewConfig, start: Clip) -> list[np.ndarray]:
    """One clip's frames through PyAV and nothing else."""
    first, last = start.first_frame, start.first_frame + 15 * view.frame_stride
    wanted = set(range(first, last + 1, view.frame_stride))
    to_rgb, images = VideoReformatter(), []
    with av.open(str(table.video(start))) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        container.seek(round(first / start.fps / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * start.fps)
            if number in wanted:
                images.append(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            if number >= last:
                return images
    raise RuntimeError(f"{start.clip_id} ends too early")


def bare_torchcodec(table: ClipTable, view: ViewConfig, start: Clip) -> list[np.ndarray]:
    """One clip's frames through torchcodec and nothing else."""
    from torchcodec.decoders import VideoDecoder

    path = str(table.video(start))
    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    last = start.first_frame + 15 * view.frame_stride
    return list(decoder.get_frames_in_range(start.first_frame, last + 1, view.frame_stride).data.numpy())


def clips_a_second(read: Callable[[], int], repeats: int) -> float:
    """The best of several rounds, after one that is not counted."""
    read()
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        count = read()
        best = max(best, count / (time.perf_counter() - began))
    return best


def measure(films: Films, folder: Path, how: str, decoder: str, repeats: int) -> float:
    """Clips a second of one way of reading, in this process."""
    os.environ["SALT_VLA_DECODER"] = decoder
    import torch

    torch.set_num_threads(1)
    table = make_table(films, folder)
    clips = table.clips()
    reader = ViewReader(table, films.view, GEOMETRY)
    bare = bare_torchcodec if decoder == "torchcodec" else bare_loop
    ways: dict[str, Callable[[], int]] = {
        "bare": lambda: len([bare(table, films.view, clip) for clip in clips]),
        "reader": lambda: len([reader.read(clip.clip_id) for clip in clips]),
        "shared": lambda: len(list(reader.read_each([(clip.clip_id, 0) for clip in clips]))),
    }
    return clips_a_second(ways[how], repeats)


def in_processes(count: int, arguments: Sequence[object]) -> list[float]:
    """What `count` new processes measure at the same time."""
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        return pool.starmap(measure, [arguments] * count, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", choices=("pyav", "torchcodec"), default="pyav")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the films are kept for the next time")
    chosen = parser.parse_args()
    table = Table(
        "films", "bare loop", "view reader", "÷ bare", "2 processes", "÷ 1", "shared pass", "÷ bare",
        title=f"clips of 16 frames at 224² a second, {chosen.decoder}, decoder threads = 1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for films in KINDS.values():
            make_table(films, folder)
            rates = {}
            for how in ("bare", "reader", "shared"):
                (rates[how],) = in_processes(1, (films, folder, how, chosen.decoder, chosen.repeats))
            both = sum(in_processes(2, (films, folder, "reader", chosen.decoder, chosen.repeats)))
            table.add_row(
                films.name, f"{rates['bare']:.1f}", f"{rates['reader']:.1f}",
                f"{rates['reader'] / rates['bare']:.2f}", f"{both:.1f}", f"{both / rates['reader']:.2f}",
                f"{rates['shared']:.1f}", f"{rates['shared'] / rates['bare']:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
