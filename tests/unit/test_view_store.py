"""Stored views are the decoded ones, byte for byte, and a store of other clips or views is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CacheWriter
from salt_vla.cache.shards import Record
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.view_store import StoredViews, store_manifest

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(frame_stride=2, num_views=3, crop_scale=(0.4, 1.0), max_shift=4)


def build(folder: Path, table: ClipTable, num_views: int = 3) -> None:
    views = ViewReader(table, VIEW, GEOMETRY)
    manifest = store_manifest(table, VIEW, GEOMETRY, num_views)
    with CacheWriter(folder, manifest, table.clip_ids) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, views.read(*key)) for key in shard.keys))
        writer.finish()


@pytest.fixture(scope="module")
def some(tiny_table) -> ClipTable:
    return tiny_table.select(split="train", camera="observation.images.front")


@pytest.fixture(scope="module")
def store(some, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "store"
    build(folder, some)
    return folder


def test_stored_views_are_the_decoded_ones(store, some):
    stored = StoredViews(store, store_manifest(some, VIEW, GEOMETRY, 3))
    views = ViewReader(some, VIEW, GEOMETRY)
    keys = [(clip, view) for clip in some.clip_ids for view in range(3)]
    order = [keys[at] for at in np.random.default_rng(0).permutation(len(keys))]
    for chosen in (keys, order, order[:1], [order[0], order[0]]):
        pixels = stored.read_many(chosen)
        assert pixels.dtype == np.uint8 and pixels.shape == (len(chosen), 8, 32, 32, 3)
        assert np.array_equal(pixels, views.read_many(chosen))
        assert pixels.flags.writeable


def test_a_store_is_byte_equal_wherever_it_is_built(store, some, tmp_path, tree):
    root = shutil.copytree(some.root, tmp_path / some.root.name)
    build(tmp_path / "again", ClipTable(some.rows, {"tiny": root}))
    assert tree(tmp_path / "again") == tree(store)


@pytest.mark.parametrize(
    ("view", "geometry", "num_views", "named"),
    [
        ({"max_shift": 5}, {}, 3, "provenance.view_hash: "),
        ({"crop_scale": (0.5, 1.0)}, {}, 3, "provenance.view_hash: "),
        ({}, {"image_size": 48}, 3, r"shape: \[8, 32, 32, 3\] here, \[8, 48, 48, 3\] wanted"),
        ({}, {}, 2, "num_views: 3 here, 2 wanted"),
    ],
)
def test_a_store_of_other_views_is_refused_with_the_difference(store, some, view, geometry, num_views, named):
    wanted = store_manifest(some, replace(VIEW, **view), replace(GEOMETRY, **geometry), num_views)
    with pytest.raises(CacheError, match=rf"the view store {store} was made from something else \(.*{named}"):
        StoredViews(store, wanted)


def test_a_store_of_other_clips_is_refused_with_the_difference(store, some, tiny_table):
    for table in (tiny_table, some.select(split="train"), some.filtered(some.rows.slice(1))):
        wanted = store_manifest(table, VIEW, GEOMETRY, 3)
        if table.hash == some.hash:
            StoredViews(store, wanted)
            continue
        with pytest.raises(CacheError, match=rf"provenance.clip_table: '{some.hash}' here, '{table.hash}'"):
            StoredViews(store, wanted)


def test_a_latent_cache_is_not_a_store(tmp_path, build_cache, some):
    build_cache(tmp_path / "cache")
    with pytest.raises(CacheError, match="kind: 'latents' here, 'views' wanted"):
        StoredViews(tmp_path / "cache", store_manifest(some, VIEW, GEOMETRY, 3))


def test_a_clip_the_store_does_not_hold_is_a_sentence(store, some, tiny_table):
    stored = StoredViews(store, store_manifest(some, VIEW, GEOMETRY, 3))
    stranger = next(clip for clip in tiny_table.clip_ids if clip not in some.clip_ids)
    with pytest.raises(CacheError, match=f"holds no view 0 of clip '{stranger}'"):
        stored.read_many([(stranger, 0)])
