"""A cache being built: nothing half-written counts, nothing finished is made again, nothing is mixed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salt_vla.cache import CacheWriter, Manifest, open_cache
from salt_vla.cache import writer as writer_module
from salt_vla.cache.format import INDEX, INDEX_PAGES, LEASES, MANIFEST, PROBE, QUARANTINE
from salt_vla.cache.leases import Leases, living
from salt_vla.cache.shards import Key, Record
from salt_vla.cache.writer import FINISH, Shard
from salt_vla.errors import CacheError

SHAPE = (3, 4)
CLIPS = [f"clip/{clip}" for clip in range(5)]
KEYS = [(clip, view) for clip in CLIPS for view in range(2)]
MANIFEST_5 = Manifest("latents", "float16", SHAPE, 2, 4, {"teacher": "t", "clip_table": "c"})
PROBE_BYTES = b"latents of a fixed clip"
Tree = Callable[[Path], dict[str, bytes]]


def array_of(key: Key) -> np.ndarray:
    return np.full(SHAPE, KEYS.index(key), np.float32)


def records_of(keys: tuple[Key, ...]) -> list[Record]:
    return [Record(key, array_of(key)) for key in keys]


def write(folder: Path, shards: int | None = None, manifest: Manifest = MANIFEST_5) -> list[int]:
    """Go on building for at most `shards` shards, and finish where none is missing; the numbers written."""
    written: list[int] = []
    with CacheWriter(folder, manifest, CLIPS) as writer:
        for shard in writer.pending():
            if len(written) == shards:
                break
            assert writer.write_shard(shard, records_of(shard.keys))
            written.append(shard.number)
        if writer.num_keys_done == writer.num_keys:
            writer.finish()
    return written


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tree) -> dict[str, bytes]:
    """What an unbroken build leaves."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert write(folder) == [0, 1, 2]
    return tree(folder)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def inodes(folder: Path) -> dict[int, int]:
    return {int(path.stem): path.stat().st_ino for path in (folder / "shards").glob("*.bin")}


def test_finished_cache_is_these_files_and_no_others(tmp_path, tree):
    assert write(tmp_path / "cache") == [0, 1, 2]
    shards = [f"shards/{number:06d}.bin" for number in range(3)]
    assert sorted(tree(tmp_path / "cache")) == sorted([INDEX, INDEX_PAGES, MANIFEST, QUARANTINE, *shards])
    manifest = Manifest.read(tmp_path / "cache")
    assert manifest.complete and manifest.num_records == 10 and manifest.num_quarantined == 0
    assert json.loads((tmp_path / "cache" / QUARANTINE).read_text()) == []
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_building_again_does_nothing_and_resuming_skips_what_is_done(tmp_path, tree, whole):
    folder = tmp_path / "cache"
    for number in range(3):
        assert write(folder, shards=1) == [number]
    made = inodes(folder)
    assert write(folder) == [] and inodes(folder) == made
    assert tree(folder) == whole


@pytest.mark.parametrize(("views", "per_shard"), [(1, 3), (3, 2), (2, 7), (5, 4), (3, 100)])
def test_shards_divide_the_keys_in_order(tmp_path, views, per_shard):
    manifest = replace(MANIFEST_5, num_views=views, records_per_shard=per_shard)
    keys = [(clip, view) for clip in CLIPS for view in range(views)]
    with CacheWriter(tmp_path, manifest, CLIPS) as writer:
        shards = list(writer.pending())
        assert [shard.number for shard in shards] == list(range(-(-len(keys) // per_shard)))
        assert [key for shard in shards for key in shard.keys] == keys
        assert {len(shard.keys) for shard in shards[:-1]} <= {per_shard}
        done = 0
        for shard in reversed(shards):
            assert (writer.num_keys, writer.num_keys_done) == (len(keys), done)
            writer.write_shard(shard, [Record(key, np.zeros(SHAPE)) for key in shard.keys])
            done += len(shard.keys)
        assert writer.num_keys_done == len(keys) == writer.finish().num_records


def test_unfinished_cache_cannot_be_read(tmp_path):
    write(tmp_path / "cache", shards=2)
    with pytest.raises(CacheError, match="is unfinished; run its `cache build` again"):
        open_cache(tmp_path / "cache")


def test_cache_with_a_shard_missing_cannot_be_finished(tmp_path):
    with CacheWriter(tmp_path / "cache", MANIFEST_5, CLIPS) as writer:
        first = next(writer.pending())
        writer.write_shard(first, records_of(first.keys))
        with pytest.raises(CacheError, match=r"lacks shard 1; run its `cache build` again"):
            writer.finish()
    assert not Manifest.read(tmp_path / "cache").complete


def cut(path: Path) -> None:
    os.truncate(path, 5)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if len(content) < 30 else -30] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, spoil])
@pytest.mark.parametrize("is_finished", [True, False])
def test_shard_that_vanished_shrank_or_lost_its_footer_is_made_again(
    tmp_path, tree, whole, damage, is_finished
):
    write(tmp_path, shards=None if is_finished else 2)
    damage(tmp_path / "shards/000000.bin")
    made = inodes(tmp_path)
    assert write(tmp_path) == ([0] if is_finished else [0, 2])
    assert inodes(tmp_path)[1] == made[1] and tree(tmp_path) == whole


@pytest.mark.parametrize("name", [INDEX, INDEX_PAGES, QUARANTINE, MANIFEST])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1), spoil])
def test_a_finished_cache_that_lost_a_small_file_gets_it_from_its_shards(tmp_path, tree, whole, name, damage):
    write(tmp_path)
    if name == QUARANTINE:
        (tmp_path / name).write_bytes(b"[" + b" " * 60)
    damage(tmp_path / name)
    assert write(tmp_path) == [] and tree(tmp_path) == whole


def test_an_error_of_the_disk_is_no_missing_shard(tmp_path):
    """What cannot be read now may be whole, and is not to be made again in its place."""
    write(tmp_path)
    (tmp_path / "shards/000001.bin").unlink()
    (tmp_path / "shards/000001.bin").mkdir()
    with pytest.raises(CacheError, match=r"000001.bin cannot be read: Is a directory"):
        write(tmp_path)


def build_with_probe(folder: Path) -> None:
    with CacheWriter(folder, MANIFEST_5, CLIPS) as writer:
        if not (folder / PROBE).exists():
            writer.write_probe(PROBE_BYTES)
        if not Manifest.read(folder).measured:
            writer.note({"cosine": 0.5})
        for shard in writer.pending():
            writer.write_shard(shard, records_of(shard.keys))
        writer.finish()


LEFT = (".manifest.json.abc.part", ".index.arrow.x.part", "shards/.000001.bin.q1.part")


@pytest.mark.parametrize("is_finished", [True, False])
def test_leftovers_of_a_killed_builder_are_swept_up(tmp_path, tree, whole, is_finished):
    write(tmp_path, shards=None if is_finished else 1)
    put(tmp_path, dict.fromkeys(LEFT, b"half"))
    (tmp_path / LEASES).mkdir(exist_ok=True)
    (tmp_path / LEASES / "000001.9").symlink_to("0123456789abcdef")
    write(tmp_path)
    assert tree(tmp_path) == whole and not (tmp_path / LEASES).exists()


def test_what_a_living_process_writes_is_not_swept_up(tmp_path, tree, whole):
    """Somebody mends a finished cache, or makes another shard of an unfinished one."""
    write(tmp_path / "finished")
    write(tmp_path / "begun", shards=1)
    for folder, expected in ((tmp_path / "finished", []), (tmp_path / "begun", [2])):
        with Leases(folder / LEASES) as leases:
            lease = leases.take("000001")
            put(folder, {LEFT[2]: b"half"})
            with CacheWriter(folder, MANIFEST_5, CLIPS) as writer:
                for shard in writer.offers():
                    if not isinstance(shard, Shard):
                        break
                    writer.write_shard(shard, records_of(shard.keys))
                    assert shard.number in expected
            assert lease is not None and lease.is_held() and (folder / LEFT[2]).exists()
        write(folder)
        assert tree(folder) == whole


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(MANIFEST_5, provenance={"teacher": "u", "clip_table": "c"}), "provenance.teacher: 't' here"),
        (replace(MANIFEST_5, provenance={"teacher": "t"}), "provenance.clip_table: 'c' here, None wanted"),
        (replace(MANIFEST_5, encoding="int8"), "encoding: 'float16' here, 'int8' wanted"),
        (replace(MANIFEST_5, shape=(4, 4)), r"shape: \[3, 4\] here, \[4, 4\] wanted"),
        (replace(MANIFEST_5, num_views=1), "num_views: 2 here, 1 wanted"),
        (replace(MANIFEST_5, records_per_shard=8), "records_per_shard: 4 here, 8 wanted"),
        (replace(MANIFEST_5, kind="views"), "kind: 'latents' here, 'views' wanted"),
        (replace(MANIFEST_5, token_order="row"), "token_order: 'time,row,column' here"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("shards", [1, None])
def test_cache_made_from_something_else_is_refused_by_the_field_and_left_alone(
    tmp_path, tree, other, named, has_manifest, shards
):
    """Without a manifest the shards say so, whose records may be of another size."""
    write(tmp_path, shards=shards)
    if not has_manifest:
        (tmp_path / MANIFEST).unlink()
    before = tree(tmp_path)
    with pytest.raises(CacheError, match=named), CacheWriter(tmp_path, other, CLIPS):
        pytest.fail("the folder was taken over")
    assert tree(tmp_path) == before


def test_shards_of_other_clips_are_refused_and_left_alone(tmp_path, tree):
    """A cache's provenance names the table; where it does not, the clips themselves tell."""
    write(tmp_path, shards=2)
    before = tree(tmp_path)
    for clips in (CLIPS[::-1], [*CLIPS[:1], *CLIPS[2:], "clip/9"]):
        with (
            pytest.raises(CacheError, match=r"than the one asked for \(the same, of other clips\)"),
            CacheWriter(tmp_path, MANIFEST_5, clips),
        ):
            pytest.fail("the folder was taken over")
    with (
        pytest.raises(CacheError, match="num_clips: 5 here, 4"),
        CacheWriter(tmp_path, MANIFEST_5, CLIPS[1:]),
    ):
        pytest.fail("the folder was taken over")
    assert tree(tmp_path) == before


def test_folder_with_other_things_is_refused_and_left_alone(tmp_path, tree):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds other files \(thesis.txt\) and no cache"):
        write(tmp_path)
    assert list(tree(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": b'{"name": "a web app", "icons": []}', "app.js": b"years of work"},
        {"manifest.json": b'{"schema_version": 2, "kind": "latents"}'},
        {"manifest.json": b"[]"},
        {"manifest.json": b"not even JSON"},
        {"shards/000000.bin": b"precious"},
        {"shards/weights.bin": b"precious"},
        {INDEX: b"another tool's"},
        {QUARANTINE: b"[]"},
    ],
    ids=str,
)
def test_anothers_files_of_our_names_are_refused_and_left_alone(tmp_path, tree, files):
    before = tree(put(tmp_path, files))
    with pytest.raises(CacheError, match=r"holds other files .* and no cache; choose another folder"):
        write(tmp_path)
    assert tree(tmp_path) == before


def test_a_builder_that_begins_at_the_same_moment_is_no_stranger(tmp_path, tree, whole, monkeypatch):
    glob = Path.glob

    def begin_meanwhile(path: Path, pattern: str) -> object:
        monkeypatch.setattr(Path, "glob", glob)
        write(tmp_path, shards=0)
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", begin_meanwhile)
    assert write(tmp_path) == [0, 1, 2] and tree(tmp_path) == whole


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "a web app"}'])
def test_a_cache_with_anothers_manifest_is_ours_by_its_shards_unless_that_is_whole(tmp_path, whole, content):
    put(tmp_path, whole | {MANIFEST: content})
    if len(content) > 1:
        with pytest.raises(CacheError, match=r"holds other files \(manifest.json\)"):
            write(tmp_path)
    else:
        assert write(tmp_path) == [] and open_cache(tmp_path).manifest.complete


def test_a_build_that_was_killed_at_once_or_whose_manifest_was_damaged_then_goes_on(tmp_path, tree, whole):
    with CacheWriter(tmp_path / "cache", MANIFEST_5, CLIPS):
        pass
    spoil(tmp_path / "cache" / MANIFEST)
    (tmp_path / "other/shards").mkdir(parents=True)
    for name in ("cache", "other"):
        assert write(tmp_path / name) == [0, 1, 2] and tree(tmp_path / name) == whole


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (["a", "b", "a"], "clip 'a' comes more than once; mend the clip table"),
        (["a", "\udcff"], "clip ids are texts, and one of these is not"),
        (["a", None], "1 clips have no id"),
    ],
)
def test_clip_ids_that_cannot_be_are_refused_before_anything_is_written(tmp_path, clips, message):
    with pytest.raises(CacheError, match=message):
        CacheWriter(tmp_path / "cache", MANIFEST_5, clips)
    assert not (tmp_path / "cache").exists()


def test_quarantined_records_have_reasons_and_move_no_other_id(tmp_path, build_cache):
    bad = (("clip/1", 0), ("clip/1", 1), ("clip/3", 1))
    expected = build_cache(tmp_path / "cache", bad=bad)
    cache = open_cache(tmp_path / "cache")
    assert cache.clip_ids == ["clip/0", "clip/2", "clip/3", "clip/4"]
    assert cache.manifest.num_records == 7 and cache.manifest.num_quarantined == 3
    assert list(cache.keys()) == list(expected)
    for key, array in expected.items():
        assert np.array_equal(cache.read(key[0], view=key[1]), array)
    listed = json.loads((tmp_path / "cache" / QUARANTINE).read_text())
    assert listed == [{"clip_id": clip, "view": view, "reason": "unreadable"} for clip, view in bad]
    for clip, view in bad:
        assert (clip, view) not in cache
        with pytest.raises(CacheError, match=f"holds no view {view} of clip '{clip}'"):
            cache.read(clip, view=view)


@pytest.mark.parametrize("clips", [0, 5])
def test_cache_may_hold_nothing(tmp_path, build_cache, clips):
    """Of no clips, or of none that can be read."""
    build_cache(tmp_path / "cache", clips=clips, bad=tuple(KEYS))
    cache = open_cache(tmp_path / "cache")
    assert cache.clip_ids == [] and list(cache.keys()) == [] and cache.manifest.num_records == 0
    assert cache.manifest.num_quarantined == 2 * clips and ("clip/0", 0) not in cache
    assert cache.with_views(CLIPS, 1).tolist() == [False] * 5
    build_cache(tmp_path / "cache", clips=clips, bad=tuple(KEYS))


def test_array_that_cannot_be_encoded_is_quarantined(tmp_path):
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as writer:
        for shard in writer.pending():
            records = records_of(shard.keys)
            if shard.number == 1:
                records[2] = Record(records[2].key, np.full(SHAPE, np.nan))
            writer.write_shard(shard, records)
        assert writer.finish().num_quarantined == 1
    (entry,) = json.loads((tmp_path / QUARANTINE).read_text())
    assert (entry["clip_id"], entry["view"]) == KEYS[6]
    assert entry["reason"].startswith("latents hold NaN")


def test_a_shard_that_failed_is_still_to_be_made(tmp_path):
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as writer:
        first = next(writer.pending())
        with pytest.raises(CacheError, match="nothing of this shard can be encoded"):
            writer.write_shard(first, [Record(key, np.full(SHAPE, np.inf)) for key in first.keys])
        assert not list((tmp_path / "shards").iterdir())
        assert next(writer.pending()) == first


def test_a_stripe_comes_first_and_then_the_others(tmp_path):
    manifest = replace(MANIFEST_5, records_per_shard=1)
    with CacheWriter(tmp_path, manifest, CLIPS, stripe=(2, 3)) as writer:
        assert [shard.number for shard in writer.pending()] == [2, 5, 8, 0, 1, 3, 4, 6, 7, 9]
    for stripe in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="stripe"):
            CacheWriter(tmp_path, manifest, CLIPS, stripe=stripe)


def test_two_writers_share_the_shards_and_wait_for_each_other(tmp_path, tree, whole, monkeypatch):
    monkeypatch.setattr(writer_module, "POLL_SECONDS", 0.01)
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as one, CacheWriter(tmp_path, MANIFEST_5, CLIPS) as other:
        ours = next(one.pending())
        told: list[str] = []

        def tell(holder: str) -> None:
            told.append(holder)
            if len(told) == 3:
                one.write_shard(ours, records_of(ours.keys))

        got = []
        for shard in other.pending(tell):
            got.append(shard.number)
            other.write_shard(shard, records_of(shard.keys))
        assert ours.number == 0 and got == [1, 2] and len(told) == 3
        assert all(str(os.getpid()) in holder for holder in told)
        assert list(one.pending()) == [] and one.num_keys_done == 10
        assert one.finish() == other.finish()
        assert (one.num_made, other.num_made) == (1, 2)
    assert tree(tmp_path) == whole


def test_a_writer_leaves_what_it_holds_to_the_others_when_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "POLL_SECONDS", 0.01)
    first = CacheWriter(tmp_path, MANIFEST_5, CLIPS)
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as other:
        with first:
            held = [shard.number for _, shard in zip(range(2), first.pending(), strict=False)]
            offers = other.offers()
            assert next(offers) == Shard(2, tuple(KEYS[8:])) and isinstance(next(offers), str)
        assert held == [0, 1] and [shard.number for shard in (next(offers), next(offers))] == [0, 1]
        assert list(offers) == []


def test_a_shard_that_was_taken_over_is_given_up_and_waited_for(tmp_path, tree, whole, monkeypatch):
    """Its writer stood still for longer than its lease; what it had made must not appear any more."""
    monkeypatch.setattr(writer_module, "POLL_SECONDS", 0.01)
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as slow, CacheWriter(tmp_path, MANIFEST_5, CLIPS) as other:
        mine = next(slow.pending())
        slow._held[mine.number].release()
        theirs = next(other.pending())
        assert theirs == mine
        assert not slow.write_shard(mine, records_of(mine.keys))
        assert not list((tmp_path / "shards").iterdir()) and slow.num_keys_done == 0
        rest = [next(slow.pending()) for _ in range(2)]
        assert [shard.number for shard in rest] == [1, 2]
        other.__exit__(None, None, None)  # It dies; nobody but the slow one is left.
        assert [shard.number for shard in slow.pending()] == [0]
        for shard in (mine, *rest):
            assert slow.write_shard(shard, records_of(shard.keys))
        slow.finish()
    assert tree(tmp_path) == whole


def test_a_writer_stopped_between_its_last_look_and_the_rename_knows_it_was_taken_over(
    tmp_path, tree, whole, monkeypatch
):
    chmod = Path.chmod

    def while_another_does_it_all(path: Path, mode: int) -> None:
        if path.name.startswith(".000000.bin.") and not stood_still:
            stood_still.append(path)
            slow._held[0].release()
            write(tmp_path)
            path.unlink(missing_ok=True)
        chmod(path, mode)

    stood_still: list[Path] = []
    monkeypatch.setattr(Path, "chmod", while_another_does_it_all)
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as slow:
        mine = next(slow.pending())
        assert not slow.write_shard(mine, records_of(mine.keys)) and stood_still
        assert list(slow.pending()) == [] and slow.finish().complete
    assert tree(tmp_path) == whole and not (tmp_path / LEASES).exists()


def test_who_finishes_leaves_a_living_ones_leases_and_the_last_removes_them(tmp_path, tree, whole):
    """Somebody may be mending a shard while the build ends."""
    with Leases(tmp_path / LEASES, 1000.0) as other:
        lease = other.take("000001.mended")
        assert write(tmp_path) == [0, 1, 2]
        assert lease is not None and lease.is_held()
    assert write(tmp_path) == [] and tree(tmp_path) == whole and not (tmp_path / LEASES).exists()


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("content", [b"", b'{"beat": "000'])
def test_a_builders_file_in_pieces_keeps_nothing_from_being_cleared_away(
    tmp_path, tree, whole, is_finished, content
):
    """As a full disk or a power cut leaves it."""
    write(tmp_path, shards=None if is_finished else 1)
    put(tmp_path, {f"{LEASES}/0123456789abcdef": content})
    assert living(tmp_path / LEASES) == []
    write(tmp_path)
    assert tree(tmp_path) == whole and not (tmp_path / LEASES).exists()


def test_a_builder_of_another_machine_that_fell_silent_is_cleared_away_at_the_end(tmp_path, monkeypatch):
    """It died between two shards, so that nobody ever waited for it."""
    stranger = {"beat": "0" * 20, "host": "far", "machine": "far", "pid": 1, "started": "1", "seconds": 0.2}
    put(tmp_path, {f"{LEASES}/0123456789abcdef": json.dumps(stranger).encode()})
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, records_of(shard.keys))
        time.sleep(0.25)
        writer.finish()
    assert not (tmp_path / LEASES).exists()


def test_finished_cache_needs_no_lease(tmp_path):
    """Runs that start together on one finished cache must not take each other for builders."""
    write(tmp_path)
    with (
        CacheWriter(tmp_path, MANIFEST_5, CLIPS) as first,
        CacheWriter(tmp_path, MANIFEST_5, CLIPS) as second,
    ):
        assert list(first.pending()) == list(second.pending()) == []
        assert first.finish() == second.finish() == Manifest.read(tmp_path)
        assert first.is_complete() and not (tmp_path / LEASES).exists()


def test_a_cache_that_somebody_else_made_whole_meanwhile_is_not_begun_again(tmp_path, tree, whole):
    """A writer that saw it broken waits its turn; what it saw must not decide then."""
    write(tmp_path)
    lost = (tmp_path / "shards/000001.bin").read_bytes()
    (tmp_path / "shards/000001.bin").unlink()
    manifest = (tmp_path / MANIFEST).stat()
    with Leases(tmp_path / LEASES) as leases:
        lease = leases.take(FINISH)
        writer = CacheWriter(tmp_path, MANIFEST_5, CLIPS)
        late = threading.Thread(target=writer.__enter__)
        late.start()
        while not writer._leases:
            late.join(0.01)
        (tmp_path / "shards/000001.bin").write_bytes(lost)
        assert lease is not None
        lease.release()
        late.join()
    assert list(writer.pending()) == [] and writer.finish().complete
    writer.__exit__(None, None, None)
    assert (tmp_path / MANIFEST).stat().st_ino == manifest.st_ino
    assert tree(tmp_path) == whole


def test_probe_and_figures_are_kept_through_loss_and_repair(tmp_path, tree):
    build_with_probe(tmp_path)
    whole = tree(tmp_path)
    assert whole[PROBE] == PROBE_BYTES and Manifest.read(tmp_path).measured == {"cosine": 0.5}
    for damage in (
        lambda: (tmp_path / PROBE).unlink(),
        lambda: (tmp_path / PROBE).write_bytes(PROBE_BYTES[:-1] + b"!"),
        lambda: (tmp_path / INDEX).unlink(),
        lambda: (tmp_path / "shards/000002.bin").unlink(),
    ):
        damage()
        build_with_probe(tmp_path)
        assert tree(tmp_path) == whole


def test_a_finished_cache_cannot_be_written_to(tmp_path, tree, whole):
    """A writer that has begun, and comes back after others have finished."""
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as late:
        write(tmp_path)
        late.write_probe(PROBE_BYTES)
        late.note({"cosine": 0.1})
        assert late.finish().complete
    assert tree(tmp_path) == whole
    with CacheWriter(tmp_path, MANIFEST_5, CLIPS) as writer, pytest.raises(KeyError):
        writer.write_shard(Shard(0, tuple(KEYS[:4])), records_of(tuple(KEYS[:4])))
