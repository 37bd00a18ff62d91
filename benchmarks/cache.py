"""Reading the latent cache against reading its bytes: `python benchmarks/cache.py` (4 minutes, 2 GB of disk).

Each ratio is the median over repetitions, with its quartiles, of bare `preadv` ÷ `read_many`: the same
records in the same random order, one after the other, who goes first in turn. The bare reader calls
`os.preadv` once a record into rows of a (16, record bytes) array, as `read_many` does: fresh memory for
each batch, or one buffer that is kept (`out=`). "first" passes check every record, "steady" ones have that
behind them.
Cold: the shards are dropped from the page cache (`posix_fadvise`), and `mincore` must say that they are.
Opening is timed at several sizes, on indexes that the writer's own functions made, each with one real shard.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from salt_vla.cache import ArrayCache, CacheWriter, Key, Manifest, Record, open_cache
from salt_vla.cache.format import EncodingName, checksum, hexadecimal, shard_name
from salt_vla.cache.index import PAGE, as_clip_ids, write_index
from salt_vla.cache.shards import write_shard

TOKENS, DIM = 1568, 768
BATCH = 16
PER_SHARD = 64
SIZES = (10**3, 10**5, 10**7)
GOALS = {"steady": 0.95, "first, warm": 0.60, "first, cold": 0.95}


def manifest_of(encoding: EncodingName, clips: int = 0) -> Manifest:
    return Manifest("latents", encoding, (TOKENS, DIM), 1, PER_SHARD, {"teacher": "noise"}, clips)


def build(folder: Path, encoding: EncodingName, clips: int) -> None:
    """A cache of noise, through the writer."""
    noise = np.random.default_rng(0).normal(size=(TOKENS, DIM)).astype(np.float32)
    with CacheWriter(folder, manifest_of(encoding), [f"noise/{n}" for n in range(clips)]) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, np.roll(noise, n, 0)) for n, key in enumerate(shard.keys)))
        writer.finish()


class Bare:
    """The same bytes, and nothing else: descriptors and offsets are known."""

    def __init__(self, cache: ArrayCache, keys: Sequence[Key]) -> None:
        self.size = cache.encoding.record_bytes
        self.files = [
            os.open(cache.folder / shard_name(number), os.O_RDONLY)
            for number in range(cache.manifest.num_shards)
        ]
        rows = {clip_id: row for row, clip_id in enumerate(cache.clip_ids)}
        self.places = {key: divmod(rows[key[0]], PER_SHARD) for key in keys}

    def read_many(self, keys: Sequence[Key], out: np.ndarray | None) -> None:
        data = np.empty((len(keys), self.size), np.uint8) if out is None else out
        for row, key in zip(data, keys, strict=True):
            shard, slot = self.places[key]
            os.preadv(self.files[shard], [row], slot * self.size)


def resident_share(folder: Path) -> float:
    """Of the shards' pages, those that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = total = 0
    for path in (folder / "shards").iterdir():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            address = ctypes.c_void_p(view.ctypes.data)
            if libc.mincore(address, ctypes.c_size_t(len(view)), ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore")
            held, total = held + int((pages & 1).sum()), total + len(pages)
            del view
    return held / total


def drop(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_cold(folder: Path) -> None:
    drop((folder / "shards").iterdir())
    if (share := resident_share(folder)) > 0.01:
        raise SystemExit(f"{share:.0%} of {folder} stay in the page cache; choose a --folder on a real disk")


def seconds(
    read: Callable[[Sequence[Key], np.ndarray | None], object], keys: Sequence[Key], out: np.ndarray | None
) -> float:
    began = time.perf_counter()
    for start in range(0, len(keys), BATCH):
        read(keys[start : start + BATCH], out)
    return time.perf_counter() - began


def compare(folder: Path, is_first: bool, is_cold: bool, keeps: bool, repeats: int) -> list[list[float]]:
    """Repetitions of (seconds of the bare reader, seconds of ours)."""
    cache = open_cache(folder)
    keys = [(clip_id, 0) for clip_id in cache.clip_ids]
    bare = Bare(cache, keys)
    out = np.empty((BATCH, bare.size), np.uint8) if keeps else None
    order = np.random.default_rng(0)
    seconds(cache.read_many, keys, out)
    pairs = []
    for repeat in range(repeats + 1):
        shuffled = [keys[n] for n in order.permutation(len(keys))]
        reader = open_cache(folder) if is_first else cache
        took = [0.0, 0.0]
        for who in (0, 1) if repeat % 2 else (1, 0):
            if is_cold:
                make_cold(folder)
            took[who] = seconds((bare.read_many, reader.read_many)[who], shuffled, out)
        pairs.append(took)
    for descriptor in bare.files:
        os.close(descriptor)
    return pairs[1:]


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def reading(folder: Path, records: int, repeats: int) -> Table:
    table = Table(
        "encoding", "page cache", "memory", "pass", "bare GB/s", "ours GB/s", "bare ÷ ours", "goal",
        title=f"read_many against preadv, {records} records of {TOKENS} × {DIM}, batches of {BATCH}",
    )  # fmt: skip
    encodings: tuple[EncodingName, ...] = ("float16", "int8")
    for encoding in encodings:
        place = folder / encoding
        if not place.exists():
            build(place, encoding, records)
        size = manifest_of(encoding).record.record_bytes * records
        for is_cold in (False, True):
            for is_first in (False, True):
                for keeps in (False, True):
                    pairs = compare(place, is_first, is_cold, keeps, repeats)
                    rates = [size / statistics.median(took) / 1e9 for took in zip(*pairs, strict=True)]
                    state, when = "cold" if is_cold else "warm", "first" if is_first else "steady"
                    table.add_row(
                        encoding, state, "kept" if keeps else "fresh", when,
                        f"{rates[0]:.2f}", f"{rates[1]:.2f}", quartiles([a / b for a, b in pairs]),
                        f"≥ {GOALS[f'first, {state}' if is_first else 'steady']:.2f}",
                    )  # fmt: skip
    return table


def bytes_a_clip(folder: Path) -> Table:
    table = Table("encoding", "record", "on disk, a clip", "goal", title="bytes a clip of one view")
    for encoding, goal in (("float16", "2.41 MB"), ("int8", "≤ 1.22 MB")):
        cache = open_cache(folder / encoding)
        files = [path for path in cache.folder.rglob("*") if path.is_file()]
        whole = sum(path.stat().st_size for path in files) / cache.manifest.num_records
        table.add_row(encoding, f"{cache.encoding.record_bytes:,}", f"{whole:,.0f}", goal)
    return table


def synthetic(folder: Path, clips: int) -> list[Key]:
    """A finished cache of so many clips whose one real shard is the middle one; that shard's keys."""
    manifest = manifest_of("float16", clips)
    number = manifest.num_shards // 2
    first = number * PER_SHARD
    keys = [(f"noise/{n}", 0) for n in range(first, min(first + PER_SHARD, clips))]
    if (folder / "manifest.json").exists():
        return keys
    noise = np.random.default_rng(0).normal(size=(TOKENS, DIM)).astype(np.float32)
    path = folder / shard_name(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    footer = write_shard(
        path, number, manifest.identity, keys, (Record(key, noise) for key in keys), manifest.record
    )
    checksums = np.random.default_rng(1).integers(0, 2**64, (clips, 1), np.uint64)
    checksums[first : first + len(keys), 0] = footer.checksums
    ids = as_clip_ids([f"noise/{n}" for n in range(clips)])
    size, pages = write_index(folder, ids, checksums, np.ones((clips, 1), np.uint8))
    quarantine = "[]\n"
    (folder / "quarantine.json").write_text(quarantine)
    replace(
        manifest, num_records=clips, index_bytes=size, index_checksum=pages,
        quarantine_checksum=hexadecimal(checksum(quarantine.encode())), complete=True,
    ).write(folder)  # fmt: skip
    return keys


def open_and_read(folder: Path, key: Key) -> tuple[float, float, float, int]:
    """Seconds to open, for the first read, and to read and check just as many bytes of the index; these."""
    began = time.perf_counter()
    cache = open_cache(folder)
    opened = time.perf_counter()
    cache.read_many([key])
    read = time.perf_counter()
    pages = np.flatnonzero(np.frombuffer(cache.index._is_sound, np.uint8))
    began_index = time.perf_counter()
    digests = (folder / "index.pages").read_bytes()
    checksum(digests)
    with (folder / "index.arrow").open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for page in pages:
        checksum(mapped[int(page) * PAGE : (int(page) + 1) * PAGE])
    ended = time.perf_counter()
    return opened - began, read - opened, ended - began_index, len(digests) + len(pages) * PAGE


def peak_memory(folder: Path, key: Key) -> int:
    """Bytes that a process holds at most which opens the cache and reads a record."""
    said = subprocess.run(
        [sys.executable, __file__, "--peak", str(folder), key[0]], capture_output=True, text=True, check=True
    )
    return int(said.stdout)


def opening(folder: Path, sizes: Sequence[int], repeats: int) -> Table:
    table = Table(
        "clips", "index", "open ms", "first read ms", "index read", "the same, bare ms", "the rest ms",
        "rest ÷ smallest's", "peak memory", "cold: open ms", "first read ms",
        title="opening, then one record; goals: < 1 s, < 1 GB, and the rest grows ≤ 1.2",
    )  # fmt: skip
    keys = {clips: synthetic(folder / f"index-{clips}", clips) for clips in sizes}
    times: dict[int, list[tuple[float, float, float, int]]] = {clips: [] for clips in sizes}
    draw = np.random.default_rng(0)
    for repeat in range(repeats + 1):
        for clips in sizes if repeat % 2 else sizes[::-1]:
            key = keys[clips][int(draw.integers(len(keys[clips])))]
            times[clips].append(open_and_read(folder / f"index-{clips}", key))
    cold: dict[int, list[tuple[float, float, float, int]]] = {clips: [] for clips in sizes}
    for _ in range(5):
        for clips in sizes:
            drop([folder / f"index-{clips}/index.arrow", folder / f"index-{clips}/index.pages"])
            cold[clips].append(open_and_read(folder / f"index-{clips}", keys[clips][0]))
    rests = {clips: [a + b - c for a, b, c, _ in times[clips][1:]] for clips in sizes}
    for clips in sizes:
        opened, read, bare, size = (statistics.median(of) for of in zip(*times[clips][1:], strict=True))
        growth = [ours / least for ours, least in zip(rests[clips], rests[sizes[0]], strict=True)]
        place = folder / f"index-{clips}"
        table.add_row(
            f"{clips:,}", f"{(place / 'index.arrow').stat().st_size / 1e6:,.1f} MB", f"{1e3 * opened:.2f}",
            f"{1e3 * read:.2f}", f"{size / 1e3:,.0f} kB", f"{1e3 * bare:.2f}",
            f"{1e3 * statistics.median(rests[clips]):.2f}", quartiles(growth),
            f"{peak_memory(place, keys[clips][0]) / 1e6:,.0f} MB",
            *(f"{1e3 * statistics.median(row[part] for row in cold[clips]):.2f}" for part in (0, 1)),
        )  # fmt: skip
    return table


class Grey:
    """Views that cost no more than their memory: what a loader does beside them is what is timed."""

    def read_many(self, keys: Sequence[Key], out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((len(keys), 16, 224, 224, 3), np.uint8) if out is None else out
        out.fill(128)
        return out

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        return ((key, self.read_many([key])[0]) for key in keys)


def clips_a_second(cache: ArrayCache | None, clip_ids: Sequence[str], workers: int, steps: int) -> float:
    """Of the training's own loader, from its third batch on."""
    from salt_vla.batches import Batches, Part
    from salt_vla.config import MaskConfig
    from salt_vla.geometry import ClipGeometry
    from salt_vla.loader import Loading, load_from
    from salt_vla.masks import build_masks

    masks = build_masks(MaskConfig(), ClipGeometry())
    part = Part(tuple(clip_ids))
    batches = Batches(
        [part], Grey(), masks, batch_size=BATCH, num_views=1, seed=0, steps=steps + 2, cache=cache
    )
    loaded = load_from(batches, 0, Loading(workers))
    for _ in range(2):
        next(loaded)
    began = time.perf_counter()
    count = sum(len(batch.keys) for batch in loaded)
    return count / (time.perf_counter() - began)


def loading(folder: Path, steps: int) -> Table:
    table = Table(
        "loader processes", "pixels and masks", "and float16", "and int8",
        title=f"clips a second through the training's loader, batches of {BATCH}, grey pixels, warm",
    )  # fmt: skip
    names = ("float16", "int8")
    clip_ids = list(open_cache(folder / names[0]).clip_ids)
    for workers in (0, 1, 2):
        rates = [clips_a_second(None, clip_ids, workers, steps)]
        rates += [clips_a_second(open_cache(folder / name), clip_ids, workers, steps) for name in names]
        table.add_row(str(workers), *(f"{rate:.0f}" for rate in rates))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32, help="batches that the loader is timed over")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--folder", type=Path, help="where the caches are kept for the next time")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        open_cache(chosen.peak[0]).read_many([(chosen.peak[1], 0)])
        # Not `ru_maxrss`, which a process inherits from the one that started it.
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        print(int(peak.split()[1]) * 1024)
        return
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="salt-cache-"))
    console = Console(width=170)
    try:
        console.print(reading(folder, chosen.records, chosen.repeats))
        console.print(bytes_a_clip(folder))
        console.print(loading(folder, chosen.steps))
        console.print(opening(folder, chosen.sizes, 20 * chosen.repeats))
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
