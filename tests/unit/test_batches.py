"""`batches[step]` is a pure function of the step: in any process and order, with any number of workers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.batches import Batch, Batches, Part, keys_of_step, parts_of
from salt_vla.cache import ArrayCache, CacheWriter, Encoding, Manifest, open_cache
from salt_vla.cache.shards import Record
from salt_vla.config import BlockSpec, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data_index import index_data
from salt_vla.loader import Loading, load_from
from salt_vla.masks import MultiBlockMasks

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
VIEW = ViewConfig(frame_stride=2, num_views=2, crop_scale=(0.5, 1.0), max_shift=4)
MASKS = MultiBlockMasks(GEOMETRY, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
LATENTS = Encoding("int8", (GEOMETRY.num_tokens, 5))


def latent_of(key: tuple[str, int]) -> np.ndarray:
    seed = int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).normal(size=LATENTS.shape)


@pytest.fixture(scope="module")
def cache(tiny_table, tmp_path_factory) -> ArrayCache:
    folder = tmp_path_factory.mktemp("latents") / "cache"
    manifest = Manifest("latents", "int8", LATENTS.shape, 2, 16)
    with CacheWriter(folder, manifest, tiny_table.clip_ids) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, latent_of(key)) for key in shard.keys))
        writer.finish()
    return open_cache(folder)


def make(table, cache: ArrayCache | None = None, **changes) -> Batches:
    options = {"batch_size": 6, "num_views": 2, "seed": 3, "steps": 12, "cache": cache} | changes
    return Batches(parts_of(table, table.clip_ids), ViewReader(table, VIEW, GEOMETRY), MASKS, **options)


def digest(batch: Batch) -> str:
    parts = [batch.frames, *(ids for group in batch.masks for ids in (group.context_ids, group.target_ids))]
    if batch.records is not None:
        parts.append(batch.records)
    state = hashlib.sha256(repr(batch.keys).encode())
    for part in parts:
        state.update(repr((part.dtype, tuple(part.shape))).encode() + part.numpy().tobytes())
    return state.hexdigest()


def test_a_batch_joins_pixels_records_and_masks_by_clip(tiny_table, cache):
    batch = make(tiny_table, cache)[4]
    views = ViewReader(tiny_table, VIEW, GEOMETRY)
    assert batch.frames.dtype == torch.uint8 and batch.frames.shape == (6, 8, 32, 32, 3)
    assert batch.records is not None and batch.records.shape == (6, LATENTS.record_bytes)
    for row, key in enumerate(batch.keys):
        assert np.array_equal(batch.frames[row].numpy(), views.read(*key))
        assert batch.records[row].numpy().tobytes() == LATENTS.encode(latent_of(key))
    expected = MASKS.sample(6, seed=3, step=4)
    for group, other in zip(batch.masks, expected, strict=True):
        assert torch.equal(group.context_ids, other.context_ids)
        assert torch.equal(group.target_ids, other.target_ids)
    assert make(tiny_table)[4].records is None


def test_a_step_is_the_same_batch_in_any_order_and_however_often(tiny_table, cache):
    once = [digest(make(tiny_table, cache)[step]) for step in (7, 0, 3)]
    batches = make(tiny_table, cache)
    for _ in range(2):
        np.random.seed(1)
        torch.manual_seed(1)
        assert [digest(batches[step]) for step in (7, 0, 3)] == once
    assert len(set(once)) == 3 and len(batches) == 12


def test_seed_decides_order_views_and_masks(tiny_table):
    ours, theirs = make(tiny_table)[0], make(tiny_table, seed=4)[0]
    assert ours.keys != theirs.keys
    assert any(
        a.target_ids.shape != b.target_ids.shape or not torch.equal(a.target_ids, b.target_ids)
        for a, b in zip(ours.masks, theirs.masks, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_batches_from_any_step(tiny_table, cache, workers):
    batches = make(tiny_table, cache, steps=8)
    expected = [digest(batches[step]) for step in range(5, 8)]
    assert [digest(batch) for batch in load_from(batches, 5, Loading(workers))] == expected
    assert list(load_from(batches, 8)) == []


def test_another_process_has_the_same_batches(tiny_dataset, tiny_table):
    code = f"""
from pathlib import Path
from salt_vla.batches import Batches, Part
from salt_vla.config import BlockSpec, ViewConfig
from salt_vla.data.segments import Cutting
from salt_vla.jobs.data_index import index_data
from salt_vla.data.view_lock import ViewReader
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MultiBlockMasks
import hashlib
table = index_data(Path({str(tiny_dataset)!r}), Cutting(ViewConfig(frame_stride=2), 8))[0]
masks = MultiBlockMasks({GEOMETRY!r}, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
views = ViewReader(table, {VIEW!r}, {GEOMETRY!r})
batches = Batches([Part(tuple(table.clip_ids))], views, masks, batch_size=6, num_views=2, seed=3, steps=12)
for step in (11, 5):
    batch = batches[step]
    ids = [part.numpy().tobytes() for g in batch.masks for part in (g.context_ids, g.target_ids)]
    print(batch.keys, hashlib.sha256(b"".join([batch.frames.numpy().tobytes(), *ids])).hexdigest())
"""
    environment = os.environ | {"PYTHONHASHSEED": "9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    for step, line in zip((11, 5), done.stdout.splitlines(), strict=True):
        batch = make(index_data(tiny_dataset, Cutting(ViewConfig(frame_stride=2), 8))[0])[step]
        ids = [part.numpy().tobytes() for g in batch.masks for part in (g.context_ids, g.target_ids)]
        pixels = batch.frames.numpy().tobytes()
        assert line == f"{batch.keys} {hashlib.sha256(b''.join([pixels, *ids])).hexdigest()}"


@settings(max_examples=60, deadline=None)
@given(
    clips=st.integers(1, 40),
    views=st.integers(1, 5),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    first_epoch=st.integers(0, 3),
)
def test_every_clip_comes_once_an_epoch_and_every_view_in_turn(clips, views, batch_size, seed, first_epoch):
    ids = [f"c{number}" for number in range(clips)]
    epochs = first_epoch + views
    steps = -(-clips * epochs // batch_size)
    keys = [
        key
        for step in range(steps)
        for key in keys_of_step([Part(tuple(ids))], views, batch_size, seed, step)
    ]
    cut = [keys[epoch * clips : (epoch + 1) * clips] for epoch in range(first_epoch, epochs)]
    for epoch in cut:
        assert sorted(clip for clip, _ in epoch) == sorted(ids)
    seen = Counter(key for epoch in cut for key in epoch)
    assert seen == Counter((clip, view) for clip in ids for view in range(views))


def test_epochs_differ_in_order_and_clips_in_their_first_view():
    ids = [f"c{number}" for number in range(50)]
    first, second = (keys_of_step([Part(tuple(ids))], 4, 50, 0, step) for step in (0, 1))
    assert [clip for clip, _ in first] != [clip for clip, _ in second]
    assert {view for _, view in first} == {0, 1, 2, 3}
    before = dict(first)
    assert all(view == (before[clip] + 1) % 4 for clip, view in second)


def test_batches_do_not_depend_on_the_number_of_steps(tiny_table):
    assert digest(make(tiny_table, steps=12)[2]) == digest(make(tiny_table, steps=10**9)[2])


def test_a_batch_may_be_larger_than_the_data_set(tiny_table):
    batch = make(tiny_table, batch_size=50)[0]
    assert Counter(clip for clip, _ in batch.keys).most_common()[-1][1] == 2


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_micro_batches_add_up_to_the_batch(tiny_table, cache, count):
    batch = make(tiny_table, cache)[1]
    parts = list(batch.micro_batches(count))
    assert [len(part.keys) for part in parts] == [6 // count] * count
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.frames for part in parts]), batch.frames)
    assert batch.records is not None
    assert torch.equal(torch.cat([p.records for p in parts if p.records is not None]), batch.records)
    for number, group in enumerate(batch.masks):
        for name in ("context_ids", "target_ids"):
            whole = torch.cat([getattr(part.masks[number], name) for part in parts])
            assert torch.equal(whole, getattr(group, name))


def test_micro_batches_of_a_batch_without_records_have_none(tiny_table):
    parts = list(make(tiny_table)[0].micro_batches(2))
    assert [part.records for part in parts] == [None, None]


def test_moving_to_a_device_moves_everything(tiny_table, cache):
    batch = make(tiny_table, cache)[0]
    assert digest(batch.to("cpu")) == digest(batch)
    moved = batch.to("meta")
    assert moved.frames.is_meta and moved.records is not None and moved.records.is_meta
    assert all(group.context_ids.is_meta and group.target_ids.is_meta for group in moved.masks)


def test_canonical_batches_are_view_0_of_clips_spread_over_the_data_set(tiny_table, cache):
    batches = make(tiny_table, cache)
    parts = list(batches.canonical(10, batch_size=4))
    assert [len(part.keys) for part in parts] == [4, 4, 2]
    keys = [key for part in parts for key in part.keys]
    assert {view for _, view in keys} == {0} and len(set(keys)) == 10
    places = [tiny_table.clip_ids.index(clip) for clip, _ in keys]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(tiny_table) - 1
    again = [digest(part) for part in batches.canonical(10, batch_size=4)]
    assert again == [digest(part) for part in parts]
    everything = [key for part in batches.canonical(10**6, batch_size=7) for key in part.keys]
    assert everything == [(clip, 0) for clip in tiny_table.clip_ids]


def test_a_clip_the_cache_lacks_is_refused_before_training(tiny_table, cache):
    with pytest.raises(CacheError, match=r"lacks views of 24 of the run's clips, the first: 'tiny/000000/"):
        make(tiny_table, cache, num_views=3)
    strangers = [*tiny_table.clip_ids, "tiny/stranger"]
    with pytest.raises(
        CacheError, match=r"lacks views of 1 .* the first: 'tiny/stranger'; build it from the same"
    ):
        Batches(
            [Part(tuple(strangers))], ViewReader(tiny_table, VIEW, GEOMETRY), MASKS, **OPTIONS, cache=cache
        )
    fewer = Batches(
        [Part(tuple(tiny_table.clip_ids[:5]))],
        ViewReader(tiny_table, VIEW, GEOMETRY),
        MASKS,
        **OPTIONS,
        cache=cache,
    )
    assert {clip for clip, _ in fewer[0].keys} <= set(tiny_table.clip_ids[:5])


OPTIONS = {"batch_size": 4, "num_views": 2, "seed": 0, "steps": 3}


def test_no_clips_are_refused(tiny_table):
    with pytest.raises(DataError, match="there are no clips to train on"):
        Batches([], ViewReader(tiny_table, VIEW, GEOMETRY), MASKS, **OPTIONS)


def test_an_unreadable_clip_fails_its_own_step_by_name(tiny_table, tmp_path):
    """In a worker too: the sentence crosses the process border."""
    table = ClipTable(tiny_table.rows, {"tiny": tmp_path})
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"clip 'tiny/.*', view \d: video .* is missing"):
            next(load_from(make(table), 0, Loading(workers)))


def mixed_parts(sizes: tuple[int, ...], shares: tuple[float, ...]) -> list[Part]:
    return [
        Part(tuple(f"{name}{n}" for n in range(size)), share)
        for name, size, share in zip("abc", sizes, shares, strict=False)
    ]


def test_a_mixture_draws_every_part_in_its_share_of_every_block():
    parts = mixed_parts((60, 30, 10), (0.2, 0.3, 0.5))
    keys = [key for step in range(100) for key in keys_of_step(parts, 2, 10, 7, step)]
    for block in range(10):
        drawn = Counter(clip[0] for clip, _ in keys[block * 100 : (block + 1) * 100])
        assert drawn == {"a": 20, "b": 30, "c": 50}
    assert len({clip for clip, _ in keys[:300] if clip[0] == "a"}) == 60  # all of it before any again
    c = [clip for clip, _ in keys if clip[0] == "c"]
    assert all(len(set(c[i : i + 10])) == 10 for i in range(0, 500, 10))


def test_a_mixtures_order_is_a_function_of_seed_and_step():
    parts = mixed_parts((7, 5), (0.5, 0.5))
    before = keys_of_step(parts, 3, 4, 1, 50)
    _ = keys_of_step(parts, 3, 4, 2, 9)
    assert keys_of_step(parts, 3, 4, 1, 50) == before
    assert keys_of_step(parts, 3, 4, 2, 50) != before


def test_parts_follow_the_tables_weights(tiny_table):
    clips = [
        replace(clip, clip_id=f"other/{n}", dataset="other") for n, clip in enumerate(tiny_table.clips())
    ]
    mixed = ClipTable.mix([(tiny_table, 1), (ClipTable.from_clips(clips, tiny_table.root), 3)])
    tiny, other = parts_of(mixed, mixed.clip_ids[:-2])
    assert (tiny.share, other.share) == (0.25, 0.75)
    assert tiny.clip_ids == tuple(tiny_table.clip_ids)
    assert other.clip_ids == tuple(clip.clip_id for clip in clips[:-2])
    with pytest.raises(DataError, match="no clip of the data set 'other' can be used; leave it out"):
        parts_of(mixed, tiny_table.clip_ids)
    assert parts_of(tiny_table, tiny_table.clip_ids) == (Part(tuple(tiny_table.clip_ids)),)
