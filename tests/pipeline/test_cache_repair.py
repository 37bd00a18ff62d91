"""`cache repair`: a damaged cache becomes, byte for byte, the one it was; what was sound is not touched; and
nothing is taken from a teacher that gives other numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter, Key, Manifest, Record, open_cache
from salt_vla.cache.format import INDEX, INDEX_PAGES, MANIFEST, PROBE, QUARANTINE, checksum
from salt_vla.cache.leases import Leases
from salt_vla.cache.mend import reindex, rewrite_shard
from salt_vla.cache.shards import read_footer
from salt_vla.config import ViewConfig, from_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError
from salt_vla.jobs.build_cache import build_cache
from salt_vla.jobs.cache_repair import repair_cache
from salt_vla.jobs.cache_source import source_of
from salt_vla.jobs.cache_verify import verify_cache
from salt_vla.teachers import load_teacher

PER_SHARD, BATCH = 8, 4


@pytest.fixture(scope="module")
def whole(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workshop's latents in five shards of eight, computed four at a time; nobody may write into it."""
    said = open_cache(workshop.cache).manifest
    view = from_json(ViewConfig, json.dumps({**said.provenance["view"], "num_views": 2}), "view")
    data = replace(job.DataConfig(), view=view)
    teacher, table = load_teacher(workshop.teacher), ClipTable.read(workshop.table).select(split="train")
    before, job.RECORDS_PER_SHARD = job.RECORDS_PER_SHARD, PER_SHARD
    try:
        folder = tmp_path_factory.mktemp("repair") / "whole"
        return build_cache(teacher, table, "train", folder, data, "int8", BATCH)
    finally:
        job.RECORDS_PER_SHARD = before


@pytest.fixture
def cache(whole: Path, place: Path) -> Path:
    return Path(shutil.copytree(whole, place / "cache"))


@pytest.fixture
def repair(workshop: Any, cache: Path) -> Callable[..., Any]:
    """`repair(*more)`: the command with teacher and data; its report."""

    def call(*more: object, code: int = 0) -> Any:
        made_of = ("--teacher", workshop.teacher, "--data", workshop.table)
        answer = workshop.salt("cache", "repair", cache, *made_of, "--json", *more)
        assert answer.code == code, answer.err
        return json.loads(answer.out)

    return call


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x21
    path.write_bytes(content)


def damage(cache: Path, number: int) -> Key:
    """Spoil a record by its number."""
    size = open_cache(cache).encoding.record_bytes
    shard, slot = divmod(number, PER_SHARD)
    file = cache / f"shards/{shard:06d}.bin"
    key = read_footer(file).keys[slot]
    flip(file, slot * size + 11)
    return key


def inodes(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}


def rows(keys: list[Key]) -> list[dict[str, Any]]:
    return [{"clip_id": clip_id, "view": view} for clip_id, view in keys]


def test_damaged_records_are_byte_equal_again_and_no_other_file_is_touched(
    cache: Path, whole: Path, repair: Any, tree: Any
) -> None:
    keys = [damage(cache, number) for number in (1, 2, 7, 35)]
    before = inodes(cache)
    report = repair()
    assert report["found"] == 4 and report["byte_equal"] == rows(keys)
    assert report["changed"] == report["recovered"] == report["failed"] == report["left"] == []
    assert report["files"] == ["shards/000000.bin", "shards/000004.bin"]
    assert tree(cache) == tree(whole)
    touched = {name for name, number in inodes(cache).items() if before[name] != number}
    assert touched == {"000000.bin", "000004.bin"}


def test_only_the_batches_around_damaged_records_pass_the_teacher(
    cache: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones, so that last digits do not change; and from each shard's first key on."""
    seen: list[int] = []
    find = source_of(str(workshop.teacher), str(workshop.table), "cpu")

    def watched(manifest: Manifest) -> Any:
        source = find(manifest)
        latents = source.teacher.latents

        def counted(frames: torch.Tensor) -> torch.Tensor:
            seen.append(len(frames))
            return latents(frames)

        monkeypatch.setattr(source.teacher, "latents", counted, raising=False)
        return source

    damage(cache, 5)
    damage(cache, 6)
    damage(cache, 17)
    assert len(repair_cache(cache, watched).byte_equal) == 3
    assert seen == [BATCH, BATCH]


def test_a_healthy_cache_is_not_written_to(cache: Path, repair: Any, workshop: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert repair()["files"] == []
    assert "nothing is damaged" in workshop.salt.ok("cache", "repair", cache).out
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "not a shard"])
def test_a_shard_that_is_lost_is_made_again(
    cache: Path, whole: Path, repair: Any, tree: Any, how: str
) -> None:
    shard = cache / "shards/000003.bin"
    size = open_cache(cache).encoding.record_bytes
    if how == "missing":
        shard.unlink()
    elif how == "not a shard":
        shard.write_bytes(b"rubbish" * 5000)
    else:
        os.truncate(shard, 0 if how == "empty" else 5 * size + 3)
    report = repair()
    assert len(report["byte_equal"]) == (3 if how == "truncated" else 8)
    assert report["files"] == ["shards/000003.bin"]
    assert tree(cache) == tree(whole)


@pytest.mark.parametrize(
    "damaged",
    [
        ["shards/000002.bin"],
        [INDEX],
        [INDEX_PAGES],
        [QUARANTINE],
        [MANIFEST],
        [MANIFEST, "shards/000000.bin", "shards/000004.bin"],
        [INDEX, INDEX_PAGES, MANIFEST, QUARANTINE],
    ],
    ids=" ".join,
)
def test_what_follows_from_the_rest_needs_no_teacher(
    cache: Path, whole: Path, workshop: Any, tree: Any, damaged: list[str]
) -> None:
    """Footers from the index; index, quarantine and manifest from the footers."""
    for name in damaged:
        flip(cache / name, -3)
    answer = workshop.salt.ok("cache", "repair", cache, "--json")
    assert {row["file"] for row in json.loads(answer.out)["left"]} == set()
    wanted = tree(whole)
    if set(damaged) >= {INDEX, MANIFEST}:
        # What int8 cost was in these two only; `cache build` measures it again.
        assert Manifest.read(cache).measured == {}
        assert verify_cache(cache).bad == () and open_cache(cache).manifest.num_records == 36
        del wanted[INDEX], wanted[INDEX_PAGES], wanted[MANIFEST]
    assert {name: content for name, content in tree(cache).items() if name in wanted} == wanted


def test_a_damaged_probe_is_made_again(cache: Path, whole: Path, repair: Any, tree: Any) -> None:
    flip(cache / PROBE, 200)
    assert repair()["files"][0] == PROBE
    assert tree(cache) == tree(whole)


def test_without_a_teacher_the_rest_is_mended_and_what_is_left_is_named(
    cache: Path, whole: Path, workshop: Any, repair: Any, tree: Any
) -> None:
    key = damage(cache, 9)
    flip(cache / "shards/000002.bin", -9)
    flip(cache / MANIFEST, 60)
    said = workshop.salt("cache", "repair", cache)
    assert said.code == 1 and "give --teacher and --data" in said.out and "1 left" in said.out
    (left,) = verify_cache(cache).bad
    assert (left.clip_id, left.view) == key
    open_cache(cache).read(_other(cache, key))
    assert repair()["byte_equal"] == rows([key])
    assert tree(cache) == tree(whole)


def _other(cache: Path, key: Key) -> str:
    """A clip that was not damaged."""
    return next(clip_id for clip_id in open_cache(cache).clip_ids if clip_id != key[0])


def test_a_footer_lost_together_with_a_record_keeps_the_sound_ones(
    cache: Path, whole: Path, workshop: Any, repair: Any, tree: Any
) -> None:
    key = damage(cache, 12)
    flip(cache / "shards/000001.bin", -9)
    assert workshop.salt("cache", "repair", cache).code == 1
    (left,) = verify_cache(cache).bad
    assert (left.clip_id, left.view) == key, "the footer is whole again and still says what the record was"
    repair()
    assert tree(cache) == tree(whole)


def test_index_and_a_footer_lost_together_are_left_to_the_build(
    cache: Path, whole: Path, workshop: Any, repair: Any, tree: Any
) -> None:
    flip(cache / INDEX, 900)
    flip(cache / "shards/000001.bin", -9)
    assert {row["file"] for row in repair(code=1)["left"]} == {INDEX, "shards/000001.bin"}
    find = source_of(str(workshop.teacher), str(workshop.table), "cpu")(Manifest.read(cache))
    data = replace(job.DataConfig(), view=find.view)
    before, job.RECORDS_PER_SHARD = job.RECORDS_PER_SHARD, PER_SHARD
    try:
        build_cache(find.teacher, find.table, "train", cache, data, "int8", BATCH)
    finally:
        job.RECORDS_PER_SHARD = before
    assert tree(cache) == tree(whole)


def put(cache: Path, number: int, latents: np.ndarray | None) -> Key:
    """Make a record another one, or a quarantined one, in a cache that is sound all the same."""
    opened = open_cache(cache)
    shard, slot = divmod(number, PER_SHARD)
    path = cache / f"shards/{shard:06d}.bin"
    footer = read_footer(path)
    blob = b"" if latents is None else opened.encoding.encode(latents)
    checksums, reasons = list(footer.checksums), list(footer.reasons)
    checksums[slot], reasons[slot] = (None, "out of order") if latents is None else (checksum(blob), "")
    footer = replace(footer, checksums=tuple(checksums), reasons=tuple(reasons))
    fresh = {} if latents is None else {slot: blob}
    rewrite_shard(path, footer, fresh, frozenset(), opened.encoding, lambda: None)
    reindex(cache, opened.manifest, opened.index.ids, lambda _: None)
    shutil.rmtree(cache / ".leases", ignore_errors=True)
    assert verify_cache(cache).bad == ()
    return footer.keys[slot]


def test_a_record_that_comes_out_in_other_digits_is_taken_if_the_probe_agrees(
    cache: Path, repair: Any, whole: Path
) -> None:
    """As on another machine than the one the cache was built on."""
    clip_id, view = read_footer(cache / "shards/000000.bin").keys[3]
    right = open_cache(whole).read(clip_id, view=view)
    put(cache, 3, right * 1.001)
    damage(cache, 3)
    report = repair()
    assert report["changed"] == rows([(clip_id, view)]) and report["byte_equal"] == []
    assert INDEX in report["files"] and report["left"] == []
    assert verify_cache(cache).bad == ()
    assert np.array_equal(open_cache(cache).read(clip_id, view=view), right)


def test_no_record_is_taken_when_the_probe_does_not_agree(cache: Path, repair: Any, tree: Any) -> None:
    """Equal weights that give other numbers: another precision, a broken library."""
    probe = load((cache / PROBE).read_bytes())["latents"]
    (cache / PROBE).write_bytes(save({"latents": probe * 1.5}))
    opened = open_cache(cache)
    reindex(cache, opened.manifest, opened.index.ids, lambda _: None)
    key = put(cache, 3, open_cache(cache).read(opened.clip_ids[0]) * 1.001)
    damage(cache, 3)
    before = tree(cache)
    report = repair(code=1)
    assert report["changed"] == [] and [row["clip_id"] for row in report["failed"]] == [key[0]]
    assert "apart (relative L2" in report["failed"][0]["reason"]
    assert tree(cache) == before


def test_equal_bytes_are_taken_whatever_the_probe_says(cache: Path, repair: Any) -> None:
    probe = load((cache / PROBE).read_bytes())["latents"]
    (cache / PROBE).write_bytes(save({"latents": probe * 1.5}))
    opened = open_cache(cache)
    reindex(cache, opened.manifest, opened.index.ids, lambda _: None)
    key = damage(cache, 3)
    assert repair()["byte_equal"] == rows([key])


def test_quarantined_clips_are_tried_again_only_when_that_is_asked_for(
    cache: Path, whole: Path, repair: Any, workshop: Any, tree: Any
) -> None:
    keys = [put(cache, 4, None), put(cache, 30, None)]
    assert Manifest.read(cache).num_quarantined == 2
    assert repair()["recovered"] == [] and Manifest.read(cache).num_quarantined == 2
    assert "give the cache's --teacher" in workshop.salt("cache", "repair", cache, "--quarantined").sentence
    assert repair("--quarantined")["recovered"] == rows(keys)
    assert tree(cache) == tree(whole)


def test_a_clip_that_still_cannot_be_read_stays_in_quarantine(
    cache: Path, workshop: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = put(cache, 4, None)
    before = (cache / QUARANTINE).read_bytes()
    find = source_of(str(workshop.teacher), str(workshop.table), "cpu")

    def without_films(manifest: Manifest) -> Any:
        source = find(manifest)
        source.table.files_hash  # noqa: B018 - known while the films were still there
        source.table.roots.update(dict.fromkeys(source.table.roots, place / "nowhere"))
        return source

    report = repair_cache(cache, without_films, quarantined=True)
    assert list(report.failed) == [key] and "nowhere" in report.failed[key]
    assert report.recovered == [] and report.left == []
    assert (cache / QUARANTINE).read_bytes() == before


def test_a_film_that_changes_while_it_is_repaired_from_gives_no_record(
    cache: Path, workshop: Any, place: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pixels were decoded from who knows which of the two."""
    clip_id, _ = put(cache, 4, None)
    films = Path(shutil.copytree(workshop.dataset, place / "films"))
    before = tree(cache)
    find = source_of(str(workshop.teacher), str(workshop.table), "cpu")

    def watched(manifest: Manifest) -> Any:
        source = find(manifest)
        source.table.roots.update(dict.fromkeys(source.table.roots, films))
        latents = source.teacher.latents

        def slow(frames: torch.Tensor) -> torch.Tensor:
            os.truncate(films / source.table.clip(clip_id).file, 100)
            return latents(frames)

        monkeypatch.setattr(source.teacher, "latents", slow, raising=False)
        return source

    with pytest.raises(CacheError, match=f"video {films}.* is another one than when this repair began"):
        repair_cache(cache, watched, quarantined=True)
    assert {name: content for name, content in tree(cache).items() if "lease" not in name} == before


def test_a_shard_that_was_taken_over_is_mended_all_the_same(
    cache: Path, whole: Path, workshop: Any, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this machine slept for a while, or its lease was swept away; each record counts once."""
    keys = [damage(cache, 1), damage(cache, 17)]
    find = source_of(str(workshop.teacher), str(workshop.table), "cpu")

    def watched(manifest: Manifest) -> Any:
        source = find(manifest)
        latents = source.teacher.latents
        lost: list[Path] = []

        def slow(frames: torch.Tensor) -> torch.Tensor:
            if not lost:
                lost.extend(cache.glob(".leases/000000.*"))
                for claim in lost:
                    claim.unlink()
            return latents(frames)

        monkeypatch.setattr(source.teacher, "latents", slow, raising=False)
        return source

    report = repair_cache(cache, watched)
    assert (
        report.byte_equal == keys
        and report.left == []
        and report.files[:2]
        == [
            "shards/000000.bin",
            "shards/000002.bin",
        ]
    )
    assert tree(cache) == tree(whole)


def test_another_teacher_or_other_clips_are_refused_field_by_field(
    cache: Path, workshop: Any, salt: Any, pixels: Any, tmp_path: Path, tree: Any
) -> None:
    damage(cache, 1)
    before = tree(cache)
    salt.ok(*pixels("other", "--seed", 5, "--max-steps", 1))
    other = salt.at("other").path
    said = salt("cache", "repair", cache, "--teacher", other, "--data", workshop.table).sentence
    assert "was made from something else (provenance.fingerprint: " in said and "clip_table" not in said
    table = tmp_path / "other.parquet"
    salt.ok(
        *("data", "index", workshop.dataset, "--num-frames", 4),
        "--frame-stride",
        2,
        "--hop",
        8,
        "--out",
        table,
    )
    said = salt("cache", "repair", cache, "--teacher", workshop.teacher, "--data", table).sentence
    assert "num_clips: 18 here" in said and "provenance.clip_table: " in said and "fingerprint" not in said
    said = salt("cache", "repair", cache, "--teacher", workshop.teacher).sentence
    assert "give --teacher and --data, or neither" in said
    assert tree(cache) == before


def test_a_cache_of_others_latents_is_not_computed_again(cache: Path, place: Path, workshop: Any) -> None:
    manifest, imported = Manifest.read(cache), place / "imported"
    others = replace(manifest, provenance=manifest.provenance | {"fingerprint": None})
    with CacheWriter(imported, others, ["clip"]) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, [Record(key, np.ones(manifest.shape)) for key in shard.keys])
        writer.finish()
    made_of = ("--teacher", workshop.teacher, "--data", workshop.table)
    said = workshop.salt("cache", "repair", imported, *made_of).sentence
    assert "no latents that this program has computed" in said


def test_a_whole_shard_in_anothers_place_is_written_over_only_if_it_is_a_copy(
    cache: Path, whole: Path, place: Path, workshop: Any, repair: Any, tree: Any
) -> None:
    """Another cache's is left to a person, whatever the teacher could compute in its place."""
    first, second = cache / "shards/000000.bin", cache / "shards/000001.bin"
    shutil.copy(second, first)
    before = tree(cache)
    assert workshop.salt("cache", "repair", cache).code == 1 and tree(cache) == before
    assert len(repair()["byte_equal"]) == PER_SHARD and tree(cache) == tree(whole)
    footer = read_footer(first)
    said = json.loads(footer.identity)
    said["provenance"]["fingerprint"] = "another"
    only_one = replace(footer, identity=json.dumps(said, sort_keys=True))
    rewrite_shard(first, only_one, {}, frozenset(), open_cache(cache).encoding, lambda: None)
    before = tree(cache)
    report = repair(code=1)
    assert "another cache (provenance.fingerprint: 'another' here" in report["left"][0]["reason"]
    assert report["byte_equal"] == report["files"] == [] and tree(cache) == before
    first.rename(place / "moved-away.bin")
    repair()
    assert tree(cache) == tree(whole)


def test_a_cache_that_its_build_did_not_finish_is_finished_with_its_source_and_few_enough_in_quarantine(
    cache: Path, whole: Path, workshop: Any, repair: Any, tree: Any
) -> None:
    """Two of 36 are more than 5 %; who repairs without a source knows nothing of the films."""
    keys = [put(cache, 4, None), put(cache, 30, None)]
    manifest = Manifest.read(cache)
    replace(manifest.without_results(), measured=manifest.measured).write(cache)
    for name in (INDEX, INDEX_PAGES, QUARANTINE):
        (cache / name).unlink()
    before = tree(cache)
    assert "the cache is unfinished; run its `cache build`" in workshop.salt.ok("cache", "repair", cache).out
    (left,) = repair(code=1)["left"]
    assert "2 of 36 clip views are in quarantine, more than 5%" in left["reason"]
    assert "--quarantined" in left["reason"] and tree(cache) == before
    report = repair("--quarantined")
    assert report["recovered"] == rows(keys) and report["left"] == []
    assert tree(cache) == tree(whole)


def test_where_there_is_nothing_to_go_by_that_is_said(place: Path, workshop: Any, cache: Path) -> None:
    assert "there is no cache at" in workshop.salt("cache", "repair", place / "nowhere").sentence
    for path in (cache / "shards").iterdir():
        path.write_bytes(b"rubbish")
    (cache / INDEX).unlink()
    flip(cache / MANIFEST, 60)
    assert "says what this cache is" in workshop.salt("cache", "repair", cache).sentence


def test_a_shard_in_somebodys_hands_is_waited_for(cache: Path, whole: Path, workshop: Any, tree: Any) -> None:
    """Two repairs at once: one mends, the other finds it mended."""
    damage(cache, 1)
    made_of = ("--teacher", workshop.teacher, "--data", workshop.table)
    with Leases(cache / ".leases") as leases:
        lease = leases.take("000000")
        assert lease is not None
        waiting = [workshop.salt.start("cache", "repair", cache, *made_of) for _ in range(2)]
        with pytest.raises(subprocess.TimeoutExpired):
            waiting[0].wait(timeout=5)
        lease.release()
    said = [process.communicate(timeout=120) for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], said
    assert sorted("byte-equal" in out for out, _ in said) == [False, True], said
    assert tree(cache) == tree(whole)


# Repairs a copy of a damaged cache in a child that dies before its n-th touch of the cache's folder; then a
# second one, which has to end. Prints how many moments there were.
EVERY_MOMENT = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from salt_vla.cache import Manifest
from salt_vla.jobs.cache_repair import repair_cache
from salt_vla.jobs.cache_source import source_of

torch.set_num_threads(1)
place, broken, teacher, table, step = sys.argv[1:]
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "os.listdir"}
source = source_of(teacher, table, "cpu")(Manifest.read(Path(sys.argv[1]) / "whole"))

def repair_in_child(folder, moment):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def hook(event, arguments):
        nonlocal count
        paths = [str(argument) for argument in arguments if isinstance(argument, (str, Path))]
        if event in EVENTS and any(path.startswith(folder) for path in paths):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    left = repair_cache(Path(folder), lambda manifest: source).left
    os._exit(1 if left else 0)

moment = 1
while True:
    folder = f"{place}/moment{moment}"
    shutil.copytree(broken, folder)
    status = repair_in_child(folder, moment)
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    assert repair_in_child(folder, 0) == 0
    moment += int(step)
print(moment)
"""


def test_killed_between_any_two_touches_of_the_disk_the_same_repair_goes_on(
    cache: Path, whole: Path, workshop: Any, place: Path, tree: Any, times: Callable[[int, int], int]
) -> None:
    """Of a record, a footer, a lost shard, the probe and the index at once; all of it comes back."""
    shutil.copytree(whole, place / "whole")
    damage(cache, 1)
    damage(cache, 34)
    flip(cache / "shards/000002.bin", -9)
    (cache / "shards/000003.bin").unlink()
    flip(cache / PROBE, 200)
    flip(cache / QUARANTINE, 0)
    step = times(11, 1)
    command = [sys.executable, "-c", EVERY_MOMENT, str(place), str(cache), str(workshop.teacher)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(workshop.table), str(step)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    moments = sorted(place.glob("moment*"))
    assert int(done.stdout) > 100 and len(moments) > 100 // step
    for folder in moments:
        assert tree(folder) == tree(whole), folder
    print(f"killed at {len(moments)} moments of a repair: byte-equal to the unbroken cache every time")
