"""Caches written when this version of the format was made: they are read, number by number, for good.

A difference here means that every cache on somebody's disk is read otherwise, or made otherwise, than before:
then `SCHEMA_VERSION` must be raised, new golden caches made (tools/make_golden_caches.py) and these kept.
"""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.cache import open_cache
from salt_vla.cache.format import MANIFEST, SCHEMA_VERSION
from salt_vla.cache.shards import read_footer
from salt_vla.errors import CacheError

GOLDEN = Path(__file__).parents[1] / "golden" / f"cache_v{SCHEMA_VERSION}"
NAMES = ("float16", "int8", "views")


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_golden_caches.py"))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def said(name: str) -> dict[str, Any]:
    """What is on record about that cache."""
    return dict(json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")))


def test_golden_caches_are_read_value_by_value(name, said):
    cache = open_cache(GOLDEN / name, check="always")
    keys = [(row["clip_id"], row["view"]) for row in said["records"]]
    values = [np.array(row["values"]).reshape(cache.encoding.shape) for row in said["records"]]
    assert list(cache.keys()) == keys and list(cache.clip_ids) == said["clip_ids"]
    for (clip_id, view), array in zip(keys, values, strict=True):
        assert np.array_equal(cache.read(clip_id, view=view), array)
    assert np.array_equal(cache.read_many(keys[::-1]).decode(), np.stack(values[::-1]))


def test_golden_manifests_say_what_they_said(name, said):
    manifest = open_cache(GOLDEN / name).manifest
    assert (
        json.loads(json.dumps(asdict(manifest))) | {"checksum": said["manifest"]["checksum"]}
        == said["manifest"]
    )
    assert said["manifest"] == json.loads((GOLDEN / name / MANIFEST).read_text())
    assert json.loads((GOLDEN / name / "quarantine.json").read_text()) == said["quarantine"]
    assert len(said["quarantine"]) == manifest.num_quarantined == manifest.num_keys - len(said["records"])
    for number in range(manifest.num_shards):
        assert read_footer(GOLDEN / name / f"shards/{number:06d}.bin").identity == manifest.identity


def test_what_is_quarantined_is_in_no_golden_cache(name, said):
    cache = open_cache(GOLDEN / name)
    for row in said["quarantine"]:
        assert (row["clip_id"], row["view"]) not in cache and row["reason"]


def test_the_writer_makes_the_golden_bytes_again(tmp_path, tree, tool, name):
    tool["build"](name, tmp_path / name)
    assert tree(tmp_path / name) == tree(GOLDEN / name)
    tool["check_values"](name, tmp_path / name)
    assert tool["contents"](tmp_path / name) == json.loads(
        (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
    )


def test_the_writer_finds_nothing_to_do_in_a_golden_cache(tmp_path, tree, tool, name):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    before = {path: path.stat().st_ino for path in sorted((tmp_path / name).rglob("*"))}
    tool["build"](name, tmp_path / name)
    assert {path: path.stat().st_ino for path in sorted((tmp_path / name).rglob("*"))} == before
    assert tree(tmp_path / name) == tree(GOLDEN / name)


def test_a_cache_of_the_first_version_is_refused_with_what_to_do(tmp_path):
    """Its shards are whole and its index is sound; but neither is where this version looks."""
    manifest = {
        "schema_version": 1,
        "kind": "latents",
        "encoding": "float16",
        "shape": [2, 3],
        "num_views": 1,
        "records_per_shard": 64,
        "provenance": {},
        "token_order": "time,row,column",
        "num_records": 1,
        "num_quarantined": 0,
        "index_checksum": "0123456789abcdef",
        "complete": True,
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    with pytest.raises(CacheError, match="schema version 1, older than this program's 2; remove that folder"):
        open_cache(tmp_path)
