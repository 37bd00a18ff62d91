"""Runs on caches with flipped bytes: skipped, counted and named, or stopped; the same again on a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cache import ArrayCache, Key, open_cache

Command = Callable[..., list[object]]
Flip = Callable[[Path, Iterable[Key]], dict[Key, str]]


def offset_of(cache: ArrayCache, key: Key) -> tuple[str, int]:
    """The shard and the byte where a record begins: slots are fixed (docs/formats.md)."""
    row = list(cache.index.all_ids().to_pylist()).index(key[0])
    shard, slot = divmod(row * cache.num_views + key[1], cache.manifest.records_per_shard)
    return f"shards/{shard:06d}.bin", slot * cache.encoding.record_bytes


def flip_records(folder: Path, keys: Iterable[Key]) -> dict[Key, str]:
    """One bit of the middle of each record; where each lies, as a run's log names it."""
    cache = open_cache(folder)
    places = {}
    for key in keys:
        file, offset = offset_of(cache, key)
        with (folder / file).open("r+b") as shard:
            shard.seek(offset + cache.encoding.record_bytes // 2)
            byte = shard.read(1)[0]
            shard.seek(-1, 1)
            shard.write(bytes([byte ^ 0x10]))
        places[key] = f"{file}, offset {offset} (clip {key[0]!r}, view {key[1]})"
    return places


@pytest.fixture
def latents(workshop: Any, tmp_path: Path) -> Path:
    """The workshop's cache, to be damaged."""
    return Path(shutil.copytree(workshop.cache, tmp_path / "latents"))


def second_views(folder: Path, count: int) -> list[Key]:
    """Of clips that the statistics at the start look at in view 0 only."""
    return [(clip_id, 1) for clip_id in open_cache(folder).clip_ids[:count]]


def test_a_damaged_record_is_skipped_counted_and_named_once(
    salt: Any, student: Command, latents: Path
) -> None:
    places = flip_records(latents, second_views(latents, 2))
    salt.ok(*student("run", "--cache", latents, "--max-steps", 30))
    rows = salt.at("run").metrics("train")
    counts = [row.get("corrupt_records", 0) for row in rows]
    # 120 clips drawn from 36 views: each view three or four times.
    assert counts[0] == 0 and counts == sorted(counts) and 6 <= counts[-1] <= 8
    assert all("corrupt_records" not in row for row in rows if not row.get("corrupt_records"))
    log = salt.at("run").log_file.read_text()
    for place in places.values():
        assert log.count(place) == 1
    assert "the checksum does not match" in log


def test_a_resume_and_workers_skip_and_count_alike(
    salt: Any, student: Command, latents: Path, curve: Any, weights: Any
) -> None:
    places = flip_records(latents, second_views(latents, 3))
    salt.ok(*student("whole", "--cache", latents, "--max-steps", 12))
    salt.ok(*student("parts", "--cache", latents, "--max-steps", 5))
    salt.ok(*student("parts", "--cache", latents, "--max-steps", 12))
    workers = salt.run(*student("workers", "--cache", latents, "--max-steps", 12, data__num_workers=2))
    assert workers.code == 0, workers.err
    assert salt.at("whole").metrics("train")[-1]["corrupt_records"] > 1
    rows = {n: {(r["kind"], r["step"]): r for r in curve(salt.at(n))} for n in ("whole", "parts", "workers")}
    both = rows["whole"].keys() & rows["parts"].keys()
    assert {("train", step) for step in range(1, 13)} <= both
    assert all(rows["whole"][key] == rows["parts"][key] for key in both)
    assert rows["whole"] == rows["workers"]
    assert weights(salt.at("whole")) == weights(salt.at("parts")) == weights(salt.at("workers"))
    log = salt.at("parts").log_file.read_text()
    assert "resumed at step 5" in log
    assert all(log.count(place) <= 1 for place in places.values())


def test_intact_records_are_untouched_by_the_policy(
    salt: Any, student: Command, curve: Any, workshop: Any
) -> None:
    salt.ok(*student("skip", "--max-steps", 3))
    salt.ok(*student("stop", "--max-steps", 3, data__on_corrupt_record="stop"))
    assert curve(salt.at("skip")) == curve(salt.at("stop"))


def test_the_statistics_at_the_start_and_validation_leave_it_out(
    salt: Any, student: Command, latents: Path
) -> None:
    (learned,) = flip_records(latents, [(open_cache(latents).clip_ids[3], 0)]).values()
    held_out_keys = [(clip_id, 0) for clip_id in open_cache(latents / "validation").clip_ids[:2]]
    held_out = flip_records(latents / "validation", held_out_keys)
    salt.ok(*student("run", "--cache", latents, "--max-steps", 4, runtime__validation_clips=1000))
    run = salt.at("run")
    log = run.log_file.read_text()
    for place in (learned, *held_out.values()):
        assert log.count(place) == 1
    row = run.metrics("val")[-1]
    assert row["corrupt_records"] == 2
    assert row["clips"] == len(open_cache(latents / "validation").clip_ids) - 2


def test_stop_ends_the_run_at_the_record_by_name(salt: Any, student: Command, latents: Path) -> None:
    """In a worker too; then, the record being mended, the same command goes on."""
    intact = (latents / "shards" / "000000.bin").read_bytes()
    places = flip_records(latents, second_views(latents, 18))
    run = ("--cache", latents, "--max-steps", 6)
    alone = student("alone", *run, data__on_corrupt_record="stop")
    by_worker = student("by_worker", *run, data__on_corrupt_record="stop", data__num_workers=1)
    for answer in (salt(*alone), salt.run(*by_worker)):
        said = answer.sentence
        assert any(place in said for place in places.values()) and "`salt-vla cache repair`" in said
    assert salt.at("alone").status().state == salt.at("by_worker").status().state == "failed"
    (latents / "shards" / "000000.bin").write_bytes(intact)
    salt.ok(*alone)
    assert (salt.at("alone").status().state, salt.at("alone").status().step) == ("finished", 6)


def test_a_run_of_too_many_damaged_records_stops(salt: Any, student: Command, latents: Path) -> None:
    """Ten are met, which is more than one in a hundred."""
    flip_records(latents, second_views(latents, 12))
    said = salt(*student("run", "--cache", latents, "--max-steps", 40)).sentence
    assert "10 records were damaged" in said
    assert "`salt-vla cache verify`" in said and "`salt-vla cache repair`" in said
    assert salt.at("run").status().state == "failed"
    assert 0 < salt.at("run").status().step < 40


def test_nothing_readable_is_said_before_the_first_step(salt: Any, student: Command, latents: Path) -> None:
    (latents / "shards" / "000000.bin").unlink()
    said = salt(*student("run", "--cache", latents)).sentence
    assert "12 records were damaged while 0 clips were read" in said and "shards/000000.bin" in said
    assert "No such file" in salt.at("run").log_file.read_text()
    assert salt.at("run").metrics() == []


def test_a_truncated_shard_is_an_error_and_no_crash(salt: Any, student: Command, latents: Path) -> None:
    """preadv answers with fewer bytes; a mapping would have been SIGBUS."""
    cache = open_cache(latents)
    last = (cache.clip_ids[-1], 1)
    file, offset = offset_of(cache, last)
    with (latents / file).open("r+b") as shard:
        shard.truncate(offset + 10)
    salt.ok(*student("run", "--cache", latents, "--max-steps", 12))
    said = salt.at("run").log_file.read_text()
    assert "the shard is truncated" in said and f"offset {offset}" in said


def test_a_stored_views_damage_is_skipped_too(salt: Any, pixels: Command) -> None:
    command = pixels("run", "--max-steps", 12, data__store_views="true")
    salt.ok(*pixels("before", "--max-steps", 1, data__store_views="true"))
    (store,) = (
        folder
        for folder in (salt.root / "caches").glob("views-*")
        if json.loads((folder / "manifest.json").read_text())["num_views"] == 2
    )
    places = flip_records(store, second_views(store, 1))
    salt.ok(*command)
    assert salt.at("run").metrics("train")[-1]["corrupt_records"] == 1
    assert next(iter(places.values())) in salt.at("run").log_file.read_text()


def test_other_settings_are_refused_with_a_table_of_differences(
    salt: Any, student: Command, workshop: Any
) -> None:
    answer = salt(*student("run", data__view__max_shift=1, encoder__geometry__num_frames=8))
    assert answer.sentence.startswith(f"the cache {workshop.cache} does not fit this run: they differ in ")
    lines = answer.err.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.startswith("field"))
    assert lines[head].split() == ["field", "the", "cache", "the", "run"]
    table = {line.split()[0]: line.split()[1:] for line in lines[head + 2 : -2]}
    assert table == {
        "geometry.num_frames": ["4", "8"],
        "tokens": ["32", "64"],
        "view.max_shift": ["2", "1"],
    }
    assert not salt.at("run").path.exists()


def test_a_resume_on_another_cache_shows_what_the_run_began_with(
    salt: Any, student: Command, workshop: Any, latents: Path
) -> None:
    command = student("run", "--cache", latents, "--max-steps", 2)
    salt.ok(*command)
    shutil.rmtree(latents)
    for split in ("train", "validation"):
        build = ("cache", "build", "--teacher", workshop.teacher, "--split", split, "--data", workshop.table)
        salt.ok(*build, "--out", latents, "--encoding", "int8")
    answer = salt(*student("run", "--cache", latents, "--max-steps", 3))
    assert "run 'run' began with another cache: they differ in encoding (" in answer.sentence
    assert ["encoding", "int8", "float16"] in [line.split() for line in answer.err.splitlines()]


def test_caches_that_are_stored_differently_are_not_one_runs(
    salt: Any, student: Command, workshop: Any, latents: Path
) -> None:
    shutil.rmtree(latents / "validation")
    build = ("cache", "build", "--teacher", workshop.teacher, "--split", "validation")
    salt.ok(*build, "--data", workshop.table, "--out", latents, "--encoding", "int8")
    answer = salt(*student("run", "--cache", latents))
    assert "differ in encoding; build both alike" in answer.sentence
    assert ["encoding", "float16", "int8"] in [line.split() for line in answer.err.splitlines()]
