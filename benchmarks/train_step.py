"""A training step of ViT-B beside V-JEPA's own: `python benchmarks/train_step.py` (6 minutes, idle machine).

Three contenders take turns in one process, on the same clips and masks (V-JEPA's two groups, drawn for a
batch of 24): ours with cached targets, ours with the moving average as target (V-JEPA's objective), and a
plain V-JEPA step of transformers' modules (`vjepa_step.py`); each in float32 and under bfloat16 autocast. A
ratio is the median over rounds of the reference's time ÷ ours in the same round. The matmul peak is the
fastest of the step's own products, timed between the steps.

`--profile` prints where the time goes, kernel by kernel; `--memory 2000` takes that many small steps and
prints the process's memory; `--linear` the time a clip at several batch sizes. `--device cuda` never ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from vjepa_step import VJepaStep, vit_base_config

from salt_vla.batches import Batch
from salt_vla.cache.format import Encoding
from salt_vla.config import EncoderConfig, PredictorConfig, RuntimeConfig, TargetConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MaskGroup, build_masks
from salt_vla.models.pixels import normalise_pixels
from salt_vla.targets import CachedTargets, EmaTargets, TargetProvider, TargetSpace, Task
from salt_vla.training.flops import block_flops, group_sizes, step_flops
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.step import train_step

DIM = 768
DRAWN_FOR = 24  # clips: contexts and targets are cut to the shortest of so many
PRECISIONS = ("float32", "bfloat16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
console = Console(width=130)


@dataclass
class Work:
    """One step's input: clips and masks, the same for all."""

    frames: Tensor
    records: Tensor
    groups: list[MaskGroup]
    step: int

    @property
    def clips(self) -> int:
        return len(self.frames)


@dataclass
class Contender:
    """Something that can take a training step, what it costs, and how long it took."""

    name: str
    precision: str
    take: Callable[[Work, str], object]
    flops: Callable[[Work], float]  # a clip
    seconds: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # FLOP/s
    cost: list[float] = field(default_factory=list)  # FLOP a clip

    def timed(self, work: Work) -> None:
        synchronise(work.frames.device)
        began = clock()
        self.take(work, self.precision)
        synchronise(work.frames.device)
        took = clock() - began
        self.seconds.append(took)
        self.cost.append(self.flops(work))
        self.speeds.append(self.cost[-1] * work.clips / took)


def clock() -> float:
    """Seconds; with one thread those of the process alone, which a busy machine hardly changes."""
    one = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if one else time.perf_counter()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_work(config: TrainConfig, clips: int, step: int, device: str) -> Work:
    """Masks as the recipe draws them at that step for a batch of 24; noise for pixels and latents."""
    generator = torch.Generator().manual_seed(step)
    geometry = config.geometry
    shape = (clips, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    latents = torch.randn((clips, geometry.num_tokens * DIM), generator=generator).half()
    masks = build_masks(config.masks, geometry)
    groups = [group.rows(0, clips).to(device) for group in masks.sample(max(DRAWN_FOR, clips), 0, step)]
    return Work(frames.to(device), latents.view(torch.uint8).to(device), groups, step)


def ours(config: TrainConfig, device: str) -> tuple[Learner, Task]:
    """A learner and its task, with targets as `config.target.provider` says."""
    geometry = config.geometry
    learner = build_learner(config, DIM, device)
    provider: TargetProvider
    if config.target.provider == "ema":
        provider = EmaTargets(config.encoder, config.target.momentum, config.steps, device)
    else:
        provider = CachedTargets(Encoding("float16", (geometry.num_tokens, DIM)))
    provider.begin(learner.encoder)
    space = TargetSpace("normalised", torch.zeros(geometry.num_tokens, DIM, device=device))
    return learner, Task(provider, space)


def our_contenders(name: str, config: TrainConfig, device: str) -> list[Contender]:
    learner, task = ours(config, device)
    each = {name: replace(config, runtime=replace(config.runtime, precision=name)) for name in PRECISIONS}

    def take(work: Work, precision: str) -> None:
        batch = Batch([("clip", 0)] * work.clips, work.frames, work.records, work.groups)
        train_step(learner, batch, task, each[precision], work.step, scored=False)

    def flops(work: Work) -> float:
        return step_flops(config, DIM, group_sizes(work.groups)).total

    return [Contender(name, precision, take, flops) for precision in PRECISIONS]


def their_contenders(config: TrainConfig, device: str) -> list[Contender]:
    torch.manual_seed(0)
    reference = VJepaStep(vit_base_config(), device)

    def take(work: Work, precision: str) -> None:
        video = normalise_pixels(work.frames).transpose(1, 2)
        ids = [(group.context_ids, group.target_ids) for group in work.groups]
        reference.step(video, ids, precision == "bfloat16")

    def flops(work: Work) -> float:
        return reference_flops(config, group_sizes(work.groups))

    return [Contender("reference", precision, take, flops) for precision in PRECISIONS]


def reference_flops(config: TrainConfig, sizes: list[tuple[int, int]]) -> float:
    """Ours with the moving average, but all patches embedded once, and the predictor's last block whole."""
    ema = step_flops(replace(config, target=TargetConfig(provider="ema")), DIM, sizes)
    whole = 2 * config.geometry.num_tokens * config.geometry.patch_dim * DIM
    embedding = 2 * whole - 2 * ema.parts["encoder embedding"]
    narrow = config.predictor.dim
    last = 0.0
    for context, targets in sizes:
        shape = (narrow, 4 * narrow, context + targets)
        last += 3 * (sum(block_flops(*shape)) - sum(block_flops(*shape, targets)))
    return ema.total + embedding + last


@dataclass
class Peak:
    """Products of the step's own shapes: best time of each, in one precision."""

    products: list[tuple[Tensor, Tensor]]
    best: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, work: Work, precision: str) -> Peak:
        products = []
        device, dtype = work.frames.device, DTYPES[precision]
        context, targets = group_sizes(work.groups)[0]
        for tokens, width in ((context, DIM), (context + targets, DIM // 2)):
            for inner, outer in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
                x = torch.randn(work.clips * tokens, inner, device=device, dtype=dtype)
                products.append((x, torch.randn(outer, inner, device=device, dtype=dtype)))
        return cls(products, [float("inf")] * len(products))

    def measure(self, times: int = 3) -> None:
        for number, (x, weight) in enumerate(self.products):
            for _ in range(times):
                synchronise(x.device)
                began = clock()
                F.linear(x, weight)
                synchronise(x.device)
                self.best[number] = min(self.best[number], clock() - began)

    def _flops(self) -> list[float]:
        return [2.0 * x.numel() * len(weight) for x, weight in self.products]

    @property
    def fastest(self) -> float:
        return max(flops / best for flops, best in zip(self._flops(), self.best, strict=True))

    @property
    def mean(self) -> float:
        """All products, one after the other."""
        return sum(self._flops()) / sum(self.best)


def compare(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Rounds of one step each, until the time is up; at least two."""
    ema = replace(config, target=TargetConfig(provider="ema"))
    contenders = [
        *their_contenders(config, args.device),
        *our_contenders("cached", config, args.device),
        *our_contenders("ema", ema, args.device),
    ]
    contenders = [c for c in contenders if args.precision in ("both", c.precision)]
    first = make_work(config, args.batch, 0, args.device)
    peaks = {c.precision: Peak.of(first, c.precision) for c in contenders}
    began = time.perf_counter()
    for contender in contenders:
        contender.take(make_work(config, 1, 0, args.device), contender.precision)
    warm_up = time.perf_counter() - began
    rounds = 0
    while rounds < 2 or (time.perf_counter() - began) * (rounds + 1) / rounds < args.seconds:
        rounds += 1
        work = make_work(config, args.batch, rounds, args.device)
        # Who goes first changes, so that nobody always follows the same one.
        shift = rounds % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            contender.timed(work)
            peaks[contender.precision].measure()
    return {
        "machine": describe(args),
        "rounds": rounds,
        "batch": args.batch,
        "warm_up_s": round(warm_up, 1),
        "peak_gflops": {name: round(peak.fastest / 1e9, 1) for name, peak in peaks.items()},
        "peak_mean_gflops": {name: round(peak.mean / 1e9, 1) for name, peak in peaks.items()},
        "rows": [row(c, contenders, peaks[c.precision], args.batch) for c in contenders],
    }


def describe(args: argparse.Namespace) -> str:
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    compiled = ", compiled blocks" if args.compile else ""
    return f"{where}, torch {torch.__version__}, masks cut at: {args.truncate}{compiled}"


def row(contender: Contender, everybody: list[Contender], peak: Peak, batch: int) -> dict[str, Any]:
    against = {c.precision: c for c in everybody if c.name == "reference"}
    ratios = {}
    for precision, reference in against.items():
        each = [a / b for a, b in zip(reference.seconds, contender.seconds, strict=True)]
        ratios[precision] = round(statistics.median(each), 3)
    return {
        "contender": contender.name,
        "precision": contender.precision,
        "gflop_per_clip": round(statistics.mean(contender.cost) / 1e9, 3),
        "seconds": [round(s, 3) for s in contender.seconds],
        "clips_per_s": round(batch / statistics.median(contender.seconds), 4),
        "best_clips_per_s": round(batch / min(contender.seconds), 4),
        "share_of_peak": round(max(contender.speeds) / peak.fastest, 3),
        "share_of_mean_product": round(max(contender.speeds) / peak.mean, 3),
        "times_reference": ratios,
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['machine']}; batch {result['batch']}, {result['rounds']} rounds"
    columns = ("step", "precision", "GFLOP/clip", "clips/s", "best", "of peak", "of mean product")
    table = Table(*columns, "× reference float32", "× same precision", title=title)
    for r in result["rows"]:
        own, f32 = r["times_reference"].get(r["precision"]), r["times_reference"].get("float32")
        cells = [f"{r['gflop_per_clip']:.0f}", r["clips_per_s"], r["best_clips_per_s"]]
        cells += [f"{r['share_of_peak']:.1%}", f"{r['share_of_mean_product']:.1%}", f32 or "–", own or "–"]
        table.add_row(r["contender"], r["precision"], *map(str, cells))
    console.print(table)
    console.print("fastest product, GFLOP/s:", result["peak_gflops"])
    console.print("all of the step's products, GFLOP/s:", result["peak_mean_gflops"])


def kernels(args: argparse.Namespace, config: TrainConfig) -> None:
    """Where a step's time goes: the kernels that took the most of it, for each of ours."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    for contender in our_contenders("cached", config, args.device):
        if args.precision not in ("both", contender.precision):
            continue
        for step in range(2):
            contender.take(make_work(config, args.batch, step, args.device), contender.precision)
        work = make_work(config, args.batch, 2, args.device)
        with profile(activities=activities) as seen:
            contender.take(work, contender.precision)
        events = seen.key_averages()
        times = {e.key: (e.self_device_time_total or e.self_cpu_time_total, e.count) for e in events}
        whole = sum(took for took, _ in times.values())
        table = Table("kernel", "share", "ms", "calls", title=f"cached, {contender.precision}")
        for key, (took, count) in sorted(times.items(), key=lambda item: -item[1][0])[:22]:
            table.add_row(key, f"{took / whole:.1%}", f"{took / 1e3:.1f}", str(count))
        console.print(table)


def memory(args: argparse.Namespace) -> None:
    """Resident memory over many small steps, whose masks have other sizes each time."""
    geometry = ClipGeometry(num_frames=4, image_size=64, tubelet_size=2, patch_size=8)
    config = TrainConfig(
        encoder=EncoderConfig(name="vit_micro", geometry=geometry, depth=2),
        predictor=PredictorConfig(dim=48, depth=2, num_heads=2),
        runtime=RuntimeConfig(compile=args.compile),
    )
    contender = our_contenders("cached", config, args.device)[0]
    table = Table("steps", "resident MB", "ms a step", title="memory over steps")
    process, began, every = psutil.Process(os.getpid()), time.perf_counter(), max(args.memory // 10, 1)
    for step in range(args.memory):
        contender.take(make_work(config, 4, step, args.device), contender.precision)
        if (step + 1) % every == 0:
            ms = 1000 * (time.perf_counter() - began) / every
            table.add_row(str(step + 1), f"{process.memory_info().rss / 1e6:.0f}", f"{ms:.1f}")
            began = time.perf_counter()
    console.print(table)


def linear(args: argparse.Namespace, config: TrainConfig) -> None:
    """Seconds a clip at growing batches, best of three interleaved."""
    contender = our_contenders("cached", config, args.device)[0]
    sizes = (1, 2, 4)
    best = dict.fromkeys(sizes, float("inf"))
    for step in range(3):
        for size in sizes:
            contender.timed(make_work(config, size, 0, args.device))
            if step:
                best[size] = min(best[size], contender.seconds[-1])
    table = Table("clips", "seconds", "seconds a clip", title="cached, float32")
    for size in sizes:
        table.add_row(str(size), f"{best[size]:.2f}", f"{best[size] / size:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="both", choices=("both", *PRECISIONS))
    parser.add_argument("--truncate", default="end", choices=("end", "random", "pad", "even"))
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--memory", type=int, default=0, metavar="STEPS")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig()
    config = replace(config, masks=replace(config.masks, truncate=args.truncate))
    config = replace(config, runtime=replace(config.runtime, compile=args.compile))
    if args.memory:
        return memory(args)
    if args.linear:
        return linear(args, config)
    if args.profile:
        return kernels(args, config)
    result = compare(args, config)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
