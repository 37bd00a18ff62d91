"""Whether a cache is what a run asks for, field by field."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cache import ArrayCache, CacheWriter, Manifest, Record, open_cache
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash, view_settings
from salt_vla.errors import CacheError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.cache_diff import FieldDifference
from salt_vla.jobs.cache_fit import as_table, require_as_before, require_fit, require_same_teacher

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
VIEW = ViewConfig(frame_stride=2, num_views=2, crop_scale=(0.5, 1.0))


def write(
    folder: Path, clips: ClipTable, fields: dict[str, Any] | None = None, **provenance: Any
) -> ArrayCache:
    """A cache without records, whose manifest says that it fits `clips`; but for what is changed."""
    facts = {
        "teacher": "t",
        "fingerprint": "f",
        "layer": 3,
        "dtype": "float32",
        "clip_table": clips.hash,
        "files": clips.files_hash,
        "view_hash": view_hash(VIEW, GEOMETRY),
        "view": view_settings(VIEW),
        "geometry": asdict(GEOMETRY),
    }
    manifest = Manifest("latents", "float16", (GEOMETRY.num_tokens, 3), 2, 64, facts | provenance)
    with CacheWriter(folder, replace(manifest, **(fields or {})), clips.clip_ids) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, [Record(key, None, "none") for key in shard.keys])
        writer.finish()
    return open_cache(folder)


def refusal(
    cache: ArrayCache, clips: ClipTable, view: ViewConfig = VIEW, num_views: int = 2
) -> tuple[str, str]:
    with pytest.raises(CacheError) as refused:
        require_fit(cache, clips, view, GEOMETRY, num_views)
    sentence, _, table = str(refused.value).partition("\n")
    return sentence, table


def test_a_cache_of_these_clips_and_views_fits_however_many_views_a_run_draws(tmp_path, tiny_table):
    cache = write(tmp_path / "c", tiny_table)
    for num_views in (1, 2):
        require_fit(cache, tiny_table, VIEW, GEOMETRY, num_views)
    sentence, table = refusal(cache, tiny_table, num_views=3)
    assert sentence.endswith("they differ in num_views; build one from the run's clip table and views")
    assert table.splitlines()[-1].split() == ["num_views", "2", "3"]


@pytest.mark.parametrize(
    ("fields", "provenance", "named"),
    [
        ({"kind": "views", "encoding": "uint8"}, {}, "kind"),
        ({"token_order": "row,column,time"}, {}, "token_order"),
        ({"shape": (7, 3)}, {}, "tokens"),
        ({}, {"files": "x"}, "files"),
        ({}, {"clip_table": "x"}, "clip_table"),
        ({}, {"geometry": asdict(GEOMETRY) | {"patch_size": 16}}, "geometry.patch_size"),
        ({}, {"view": view_settings(VIEW) | {"frame_stride": 4}, "view_hash": "x"}, "view.frame_stride"),
        ({}, {"view_hash": "x"}, "view_hash"),
    ],
)
def test_each_field_that_differs_is_named_alone(tmp_path, tiny_table, fields, provenance, named):
    cache = write(tmp_path / "c", tiny_table, fields, **provenance)
    sentence, table = refusal(cache, tiny_table)
    assert f"they differ in {named}; build one" in sentence
    assert [line.split()[0] for line in table.splitlines()[2:]] == [named]


def test_other_clips_differ_in_their_number_too(tmp_path, tiny_table):
    cache = write(tmp_path / "c", tiny_table.only(tiny_table.clip_ids[:5]))
    sentence, table = refusal(cache, tiny_table)
    assert "clip_table" in sentence and "num_clips" in sentence
    assert ["num_clips", "5", str(len(tiny_table))] in [line.split() for line in table.splitlines()]


def test_what_nobody_knows_must_be_stated_and_not_compared(tmp_path, tiny_table):
    cache = write(tmp_path / "c", tiny_table, clip_table=None, view=None)
    sentence, table = refusal(cache, tiny_table, VIEW, 5)
    assert "nobody has stated its clip_table, view; import it again with --data TABLE" in sentence
    assert table == ""


def test_one_runs_caches_are_of_one_teacher_layer_and_encoding(tmp_path, tiny_table):
    a = write(tmp_path / "a", tiny_table)
    require_same_teacher(a, write(tmp_path / "same", tiny_table))
    require_same_teacher(a, write(tmp_path / "renamed", tiny_table, teacher="runs/t"))
    others = {
        "fingerprint": write(tmp_path / "b", tiny_table, fingerprint="g"),
        "layer": write(tmp_path / "c", tiny_table, layer=2),
        "dtype": write(tmp_path / "d", tiny_table, dtype="bfloat16"),
        "encoding": write(tmp_path / "e", tiny_table, {"encoding": "int8"}),
        "shape": write(tmp_path / "f", tiny_table, {"shape": (GEOMETRY.num_tokens, 4)}),
    }
    for named, other in others.items():
        with pytest.raises(CacheError, match=rf"differ in {named}; build both alike\nfield +") as refused:
            require_same_teacher(a, other)
        assert str(a.folder) in str(refused.value) and str(other.folder) in str(refused.value)


def test_imported_caches_without_fingerprints_go_by_their_teachers_name(tmp_path, tiny_table):
    a = write(tmp_path / "a", tiny_table, fingerprint=None)
    require_same_teacher(a, write(tmp_path / "b", tiny_table, fingerprint=None))
    with pytest.raises(CacheError, match="differ in teacher; build both"):
        require_same_teacher(a, write(tmp_path / "c", tiny_table, fingerprint=None, teacher="u"))


def test_a_run_goes_on_with_what_it_began_with(tmp_path):
    before = {"clip_table": "x", "view": {"frame_stride": 2}}
    require_as_before("cache", "r", {"view": {"frame_stride": 2}, "clip_table": "x"}, before, tmp_path / "p")
    now = {"clip_table": "x", "view": {"frame_stride": 4}, "weights": {"a": 0.5}}
    with pytest.raises(CacheError, match="run 'r' began with another cache: they differ in") as said:
        require_as_before("cache", "r", now, before, tmp_path / "p")
    rows = [line.split() for line in str(said.value).splitlines()[3:]]
    assert rows == [["view.frame_stride", "4", "2"], ["weights.a", "0.5", "–"]]


def test_a_table_lines_up_and_shows_what_is_unknown():
    rows = [FieldDifference("a", None, 12345), FieldDifference("longer.name", "x", "y")]
    assert as_table(rows, "cache", "run").splitlines() == [
        "field        cache    run",
        "-----------  -------  -----",
        "a            unknown  12345",
        "longer.name  x        y",
    ]
