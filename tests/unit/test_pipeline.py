"""Shards are made of fixed batches, few at a time, and whatever breaks off leaves only whole ones."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.cache import ArrayCache, CacheWriter, Manifest
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs import pipeline as module
from salt_vla.jobs.pipeline import Pipeline, num_decoders

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
VIEW = ViewConfig(frame_stride=2)
PER_SHARD, BATCH = 5, 2  # 24 clips: five shards, each of batches of 2, 2 and 1 or, the last, 2 and 2.


def means(frames: np.ndarray) -> np.ndarray:
    """(clips, frames, 3) float32, in place of a teacher."""
    assert frames.dtype == np.uint8 and frames.shape[1:] == (8, 32, 32, 3)
    return frames.mean(axis=(2, 3), dtype=np.float32)


@pytest.fixture
def writer_of(tiny_table: ClipTable) -> Callable[..., CacheWriter]:
    manifest = Manifest("latents", "float16", (8, 3), 1, PER_SHARD, {"teacher": "means"})
    return lambda folder, **more: CacheWriter(folder, manifest, tiny_table.clip_ids, **more)


@pytest.fixture
def make(tiny_table: ClipTable) -> Callable[..., Pipeline]:
    """`make(writer, compute=…, workers=…, check=…)` makes what the writer lacks; the pipeline."""

    def run(
        writer: CacheWriter,
        compute: Callable[[np.ndarray], np.ndarray] = means,
        workers: int = 0,
        check: Callable[[], None] = module.nothing,
        advance: Any = lambda amount=1, note="": None,
    ) -> Pipeline:
        views = ViewReader(tiny_table, VIEW, GEOMETRY)
        pipeline = Pipeline(writer, views, compute, BATCH, workers, check, "teacher")
        pipeline.run(advance)
        return pipeline

    return run


@pytest.fixture
def whole(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> dict[str, bytes]:
    """What comes of an unbroken build."""
    with writer_of(tmp_path / "whole") as writer:
        make(writer)
        writer.finish()
    return tree(tmp_path / "whole")


def test_records_are_what_was_computed_of_their_own_views(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    tiny_table: ClipTable,
    tmp_path: Path,
) -> None:
    with writer_of(tmp_path / "cache") as writer:
        make(writer)
        assert writer.finish().num_records == 24
    cache, views = ArrayCache(tmp_path / "cache"), ViewReader(tiny_table, VIEW, GEOMETRY)
    for clip_id in tiny_table.clip_ids:
        np.testing.assert_allclose(
            cache.read(clip_id), means(views.read(clip_id)[None])[0], rtol=1e-3, err_msg=clip_id
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_begin_at_each_shards_first_key_whoever_decodes(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    whole: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    workers: int,
) -> None:
    sizes: list[int] = []

    def counting(frames: np.ndarray) -> np.ndarray:
        sizes.append(len(frames))
        return means(frames)

    with writer_of(tmp_path / "cache") as writer:
        pipeline = make(writer, counting, workers)
        writer.finish()
    assert sizes == [2, 2, 1] * 4 + [2, 2]
    assert tree(tmp_path / "cache") == whole
    assert set(pipeline.shares.seconds) == {"decode", "teacher", "disk"} and pipeline.computed == 24


def test_a_clip_that_cannot_be_decoded_is_quarantined_and_moves_no_other(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    tiny_table: ClipTable,
    tmp_path: Path,
) -> None:
    with writer_of(tmp_path / "good") as writer:
        make(writer)
        writer.finish()
    root = tiny_table.root
    for film in tiny_table.select(camera="observation.images.side").clips()[:1]:
        tiny_table.roots[film.dataset] = tmp_path / "copy"
        shutil.copytree(root, tmp_path / "copy")
        (tmp_path / "copy" / film.file).unlink()
    try:
        with writer_of(tmp_path / "bad") as writer:
            make(writer)
            manifest = writer.finish()
    finally:
        tiny_table.roots[film.dataset] = root
    good, bad = ArrayCache(tmp_path / "good"), ArrayCache(tmp_path / "bad")
    lost = [clip.clip_id for clip in tiny_table.clips() if clip.file == film.file]
    assert manifest.num_quarantined == len(lost) and 0 < len(lost) < 24
    for clip_id in tiny_table.clip_ids:
        if clip_id not in lost:
            np.testing.assert_array_equal(bad.read(clip_id), good.read(clip_id))
    assert "is missing" in (tmp_path / "bad" / "quarantine.json").read_text()


class Enough(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize(("batches", "workers"), [(0, 0), (1, 0), (3, 0), (7, 0), (7, 1), (13, 0)])
def test_broken_off_between_batches_whole_shards_stay_and_leases_are_given_back(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    whole: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    batches: int,
    workers: int,
) -> None:
    computed = []

    def check() -> None:
        if len(computed) == batches:
            raise Enough

    def counting(frames: np.ndarray) -> np.ndarray:
        computed.append(len(frames))
        return means(frames)

    with pytest.raises(Enough), writer_of(tmp_path / "cache") as writer:
        make(writer, counting, workers, check)
    names = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert names == {f"{number:06d}.bin" for number in range(batches // 3)}
    with writer_of(tmp_path / "cache") as writer:
        make(writer)
        assert writer.num_made == 5 - batches // 3
        writer.finish()
    assert tree(tmp_path / "cache") == whole


def test_an_error_in_computing_is_the_callers(
    writer_of: Callable[..., CacheWriter], make: Callable[..., Pipeline], tmp_path: Path
) -> None:
    def broken(frames: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("no such teacher")

    with pytest.raises(ZeroDivisionError, match="no such teacher"), writer_of(tmp_path / "cache") as writer:
        make(writer, broken, 1)
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_an_error_in_writing_stops_the_computing(
    writer_of: Callable[..., CacheWriter], make: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """Where nothing can be kept, nobody computes for another night."""
    computed = []

    def counting(frames: np.ndarray) -> np.ndarray:
        computed.append(len(frames))
        return np.full((len(frames), 8, 3), np.nan, np.float32)

    with pytest.raises(CacheError, match=r"nothing of this shard can be encoded; .*NaN"):  # noqa: SIM117
        with writer_of(tmp_path / "cache") as writer:
            make(writer, counting)
    assert sum(computed) <= PER_SHARD + BATCH * (module.BATCHES_TO_WRITE + 1)


def test_few_batches_wait_for_a_slow_disk(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = threading.Event()
    computed: list[int] = []
    stuck = threading.Event()
    write = CacheWriter.write_shard

    def slow(self: CacheWriter, *args: Any) -> bool:
        disk.wait(30)
        return write(self, *args)

    def counting(frames: np.ndarray) -> np.ndarray:
        computed.append(len(frames))
        if len(computed) == module.BATCHES_TO_WRITE + 2:
            stuck.set()
        return means(frames)

    monkeypatch.setattr(CacheWriter, "write_shard", slow)
    with writer_of(tmp_path / "cache") as writer:
        thread = threading.Thread(target=make, args=(writer, counting))
        thread.start()
        assert stuck.wait(30)  # One is in the writer's hands, two wait, and one has nowhere to go.
        thread.join(0.5)
        assert len(computed) == module.BATCHES_TO_WRITE + 2
        disk.set()
        thread.join()
        assert writer.num_keys_done == 24


def test_a_shard_that_was_taken_over_is_made_again_if_nobody_else_did(
    writer_of: Callable[..., CacheWriter],
    make: Callable[..., Pipeline],
    whole: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """The folder of the leases is removed while a shard is made: nobody can say any more whose it is."""
    removed = []

    def removing(frames: np.ndarray) -> np.ndarray:
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "cache" / ".leases"))
        return means(frames)

    shown: list[int] = []
    with writer_of(tmp_path / "cache") as writer:
        pipeline = make(writer, removing, advance=lambda amount=1, note="": shown.append(amount))
        assert writer.num_made == 5 and pipeline.computed > 24
        writer.finish()
    assert tree(tmp_path / "cache") == whole
    assert sum(shown) == 24


def build_half(folder: Path, table: ClipTable, index: int, made: Any) -> None:
    manifest = Manifest("latents", "float16", (8, 3), 1, 1, {"teacher": "means"})
    with CacheWriter(folder, manifest, table.clip_ids, stripe=(index, 2)) as writer:
        views = ViewReader(table, VIEW, GEOMETRY)
        Pipeline(writer, views, means, BATCH, index).run(lambda amount=1, note="": None)
        made.put(writer.num_made)
        writer.finish()


def test_two_that_wait_for_each_other_both_come_to_an_end(tiny_table: ClipTable, tmp_path: Path) -> None:
    """Each holds shards whose views it is still waiting for when it finds the rest in the other's hands."""
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    builders = [
        context.Process(target=build_half, args=(tmp_path / "cache", tiny_table, index, made))
        for index in (0, 1)
    ]
    for builder in builders:
        builder.start()
    counts = [made.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert sum(counts) == 24
    assert ArrayCache(tmp_path / "cache").manifest.num_records == 24


def test_progress_says_how_fast_and_what_is_waited_for(
    writer_of: Callable[..., CacheWriter], make: Callable[..., Pipeline], tmp_path: Path
) -> None:
    said: list[tuple[int, str]] = []
    with writer_of(tmp_path / "cache") as writer:
        make(writer, advance=lambda amount=1, note="": said.append((amount, note)))
    assert sum(amount for amount, _ in said) == 24
    for word in (" GB/s, ", "decode ", "teacher ", "disk "):
        assert word in said[-1][1]


@pytest.mark.parametrize(
    ("wanted", "views", "device", "cores", "count"),
    [
        (3, 1, "cpu", 2, 3),  # As asked.
        (0, 10**6, "cuda", 64, 0),
        (None, 63, "cuda", 64, 0),  # Not worth a process.
        (None, 10**6, "cpu", 2, 1),
        (None, 10**6, "cpu", 1, 1),
        (None, 10**6, "cuda:1", 16, 15),
        (None, 10**6, "", 4, 4),
        (None, 10**6, "cuda", 256, module.MAX_DECODERS),
    ],
)
def test_as_many_decoders_as_suit_the_machine(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, views: int, device: str, cores: int, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert num_decoders(wanted, views, device) == count


@pytest.fixture(autouse=True)
def no_decoder_is_left() -> Iterator[None]:
    yield
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
