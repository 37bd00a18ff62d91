"""`cache build`: real latents of a real teacher, whole after any kill, and never another teacher's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import salt_vla.jobs.build_cache as job
from salt_vla.cache import open_cache
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.teachers import load_teacher

# Builds in shards of four records, so that there is a middle to be killed in; says so after each shard.
SLOW_BUILD = """
import sys, time
import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter
job.RECORDS_PER_SHARD = 4
write = CacheWriter.write_shard
def slow(self, shard, records):
    is_ours = write(self, shard, records)
    if self.manifest.kind == "latents":
        print("shard", flush=True)
        time.sleep(0.05)
    return is_ours
CacheWriter.write_shard = slow
from salt_vla.cli import main
sys.exit(main())
"""


def build(
    workshop: Any, out: Path, *more: object, teacher: object = None, split: str = "train"
) -> list[object]:
    source = ("--teacher", teacher or workshop.teacher, "--split", split)
    return ["cache", "build", *source, "--data", workshop.table, "--out", out, *more]


@pytest.fixture
def other_teacher(salt: Any, pixels: Callable[..., list[object]]) -> Path:
    """Like the workshop's, but of another seed."""
    salt.ok(*pixels("other", "--seed", 5, "--max-steps", 1))
    return salt.at("other").path


def test_a_cached_latent_is_the_teachers_of_the_very_pixels(workshop: Any) -> None:
    teacher = load_teacher(workshop.teacher)
    cache = open_cache(workshop.cache)
    view = ViewConfig(frame_stride=2, num_views=2, crop_scale=_crop_scale(workshop), max_shift=2)
    table = ClipTable.read(workshop.table).select(split="train")
    views = ViewReader(table, view, teacher.geometry)
    assert cache.clip_ids == table.clip_ids and cache.num_views == 2
    for clip_id in (cache.clip_ids[0], cache.clip_ids[-1]):
        for number in (0, 1):
            frames = torch.from_numpy(views.read_many([(clip_id, number)]))
            wanted = teacher.latents(frames)[0].numpy()
            np.testing.assert_allclose(
                cache.read(clip_id, view=number), wanted, rtol=2e-3, atol=2e-3, err_msg=clip_id
            )


def _crop_scale(workshop: Any) -> tuple[float, float]:
    low, high = json.loads((workshop.teacher / "config.json").read_text())["data"]["view"]["crop_scale"]
    return low, high


def test_its_manifest_says_what_it_was_made_from(workshop: Any) -> None:
    manifest = workshop.salt.json("cache", "show", workshop.cache)
    made_from = manifest["provenance"]
    assert made_from["teacher"] == "teacher/block1/norm" and made_from["split"] == "train"
    assert made_from["fingerprint"] == load_teacher(workshop.teacher).fingerprint
    table = ClipTable.read(workshop.table).select(split="train")
    assert made_from["clip_table"] == table.hash
    assert manifest["complete"] is True and manifest["num_views"] == 2
    assert manifest["num_records"] == 2 * len(table) and manifest["num_quarantined"] == 0
    assert manifest["token_order"] == "time,row,column"
    assert manifest["shape"] == [32, 128]
    assert not [word for word in ("time_", "date", "created") if word in json.dumps(manifest)]


def test_two_builds_are_byte_equal(workshop: Any, salt: Any, tmp_path: Path, tree: Any) -> None:
    salt.ok(*build(workshop, tmp_path / "again"))
    built = {
        name: content for name, content in tree(workshop.cache).items() if not name.startswith("validation")
    }
    assert tree(tmp_path / "again") == built


def test_a_finished_cache_is_not_built_again(workshop: Any, salt: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in workshop.cache.rglob("*")}
    answer = salt.ok(*build(workshop, workshop.cache))
    assert answer.out == f"{workshop.cache}: complete\n"
    assert {path: path.stat().st_mtime_ns for path in workshop.cache.rglob("*")} == before


def test_killed_again_and_again_it_ends_byte_equal(
    workshop: Any, salt: Any, tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 records of 18 clips in nine shards."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    made: dict[Path, int] = {}
    for shards in (2, 3):
        process = salt.start_python(SLOW_BUILD, *build(workshop, killed))
        for _ in range(shards):
            assert process.stdout.readline() == "shard\n"
        process.kill()
        process.communicate()
        assert "the cache is unfinished" in salt.ok("cache", "verify", killed).err
        now = {path: path.stat().st_ino for path in (killed / "shards").glob("[0-9]*")}
        assert len(now) >= len(made) + shards and made.items() <= now.items()
        made = now
    monkeypatch.setattr(job, "RECORDS_PER_SHARD", 4)
    for folder in (killed, whole):
        salt.ok(*build(workshop, folder))
    assert {path: path.stat().st_ino for path in made} == made and len(made) < 9
    assert tree(whole) == tree(killed)
    assert salt.json("cache", "verify", killed) == {"records": 36, "bad": []}


def test_int8_holds_the_same_latents_in_fewer_bytes(workshop: Any, salt: Any, tmp_path: Path) -> None:
    salt.ok(*build(workshop, tmp_path / "int8", "--encoding", "int8", "--num-views", 1))
    exact, coarse = open_cache(workshop.cache), open_cache(tmp_path / "int8")
    assert coarse.num_views == 1 and coarse.encoding.record_bytes < 0.6 * exact.encoding.record_bytes
    clip_id = exact.clip_ids[3]
    error = coarse.read(clip_id) - exact.read(clip_id)
    assert np.square(error).sum() < 1e-3 * np.square(exact.read(clip_id)).sum()


def test_a_student_of_int8_latents_trains(
    workshop: Any, salt: Any, tmp_path: Path, student: Callable[..., list[object]]
) -> None:
    salt.ok(*build(workshop, tmp_path / "int8", "--encoding", "int8"))
    salt.ok(*student("run", "--cache", tmp_path / "int8", "--max-steps", 2))
    assert salt.at("run").status().state == "finished"


def test_an_earlier_layer_is_another_target(workshop: Any, salt: Any, tmp_path: Path) -> None:
    said = salt(*build(workshop, tmp_path / "layer", "--layer", 2)).sentence
    assert "layer 2 does not exist; it has layers 1 … 1" in said
    assert not (tmp_path / "layer").exists()


def test_another_teachers_latents_do_not_go_into_the_same_folder(
    workshop: Any, salt: Any, other_teacher: Path, tmp_path: Path, tree: Any
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(workshop.cache, mine)
    before = tree(mine)
    said = salt(*build(workshop, mine, teacher=other_teacher)).sentence
    assert "provenance.fingerprint" in said and "choose another folder or remove it" in said
    assert tree(mine) == before


def test_training_and_held_out_latents_must_be_of_one_teacher(
    workshop: Any, salt: Any, other_teacher: Path, tmp_path: Path, student: Callable[..., list[object]]
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(workshop.cache, mixed, ignore=shutil.ignore_patterns("validation"))
    salt.ok(*build(workshop, mixed, teacher=other_teacher, split="validation"))
    said = salt(*student("run", "--cache", mixed)).sentence
    assert "different teachers" in said
    assert not salt.at("run").path.exists()


def test_a_run_does_not_resume_on_another_teachers_latents(
    workshop: Any, salt: Any, other_teacher: Path, tmp_path: Path, student: Callable[..., list[object]]
) -> None:
    """Built anew in the very folder that the run began with."""
    cache = tmp_path / "latents"
    shutil.copytree(workshop.cache, cache)
    salt.ok(*student("run", "--cache", cache, "--max-steps", 2))
    shutil.rmtree(cache)
    for split in ("train", "validation"):
        salt.ok(*build(workshop, cache, teacher=other_teacher, split=split))
    said = salt(*student("run", "--cache", cache, "--max-steps", 4)).sentence
    assert "began with another cache" in said and "fingerprint" in said
    assert salt.at("run").status().step == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data__view__num_views": 3}, "differ in num_views; build"),
        ({"data__view__max_shift": 1}, "differ in view.max_shift; build"),
        ({"encoder__geometry__image_size": 64}, "differ in geometry.image_size, tokens; build"),
    ],
)
def test_latents_of_other_pixels_are_refused(
    salt: Any, student: Callable[..., list[object]], settings: dict[str, Any], named: str
) -> None:
    said = salt(*student("run", **settings)).sentence
    assert named in said
    assert not salt.at("run").path.exists()


def test_latents_of_other_clips_are_refused(workshop: Any, salt: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    index = ("data", "index", workshop.dataset, "--num-frames", 4, "--frame-stride", 2, "--hop", 8)
    salt.ok(*index, "--out", other)
    command = salt.train("demo_student", "run", "--data", other, "--cache", workshop.cache)
    assert "clip_table" in salt(*command).sentence
    assert not salt.at("run").path.exists()


def test_a_flipped_byte_is_located_and_exits_with_1(workshop: Any, salt: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(workshop.cache, damaged)
    cache = open_cache(damaged)
    clip_id, view = list(cache.keys())[5]
    size = cache.encoding.record_bytes
    shard = damaged / "shards" / "000000.bin"
    content = bytearray(shard.read_bytes())
    content[5 * size + 17] ^= 1
    shard.write_bytes(bytes(content))
    answer = salt("cache", "verify", damaged, "--json")
    assert answer.code == 1
    found = json.loads(answer.out)
    assert found["records"] == 36 and len(found["bad"]) == 1
    bad = found["bad"][0]
    assert bad.keys() == {"clip_id", "view", "file", "offset", "reason"}
    assert (bad["clip_id"], bad["view"], bad["file"]) == (clip_id, view, "shards/000000.bin")
    assert bad["offset"] == 5 * size and "checksum" in bad["reason"]
    in_words = salt("cache", "verify", damaged)
    assert in_words.code == 1 and "36 records, 1 damaged" in in_words.out


def test_as_many_clips_pass_the_teacher_as_memory_holds(workshop: Any, salt: Any, tmp_path: Path) -> None:
    """A cache that has begun keeps its number: other batches may round otherwise."""
    build = (
        "cache",
        "build",
        "--teacher",
        workshop.teacher,
        "--data",
        workshop.table,
        "--out",
        tmp_path / "c",
    )
    said = salt.ok(*build, "--memory-limit", "2GB").out
    assert "64 clips pass the teacher at once" in said
    assert salt.json("cache", "show", tmp_path / "c")["provenance"]["batch_size"] == 64
    assert "64 clips pass" in salt.ok(*build, "--memory-limit", "1kB").out
    other = (*build[:-1], tmp_path / "d")
    assert "one clip of" in salt(*other, "--memory-limit", "1B").sentence
    assert "is no amount of memory" in salt(*other, "--memory-limit", "lots").sentence
    assert not (tmp_path / "d").exists()
