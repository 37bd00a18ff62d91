"""What takes a damaged record's place: another clip of the batch, the same one in any process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from salt_vla.batches import Batch, Batches, Part
from salt_vla.cache import ArrayCache, CorruptRecord, Key, open_cache
from salt_vla.config import DataConfig, TrainConfig, from_json, to_json
from salt_vla.errors import CacheError, ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.loader import Loading, load_from
from salt_vla.masks import RandomMasks
from salt_vla.rundir import RunDirectory
from salt_vla.training.skipped import SkippedRecords, Tally

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
MASKS = RandomMasks(GEOMETRY, ratio=0.5)
CLIPS, VIEWS = 12, 2


class Pictures:
    """Pixels that tell their key; those of `bad` are damaged, as a store's may be."""

    def __init__(self, bad: Iterable[Key] = ()) -> None:
        self.bad = set(bad)

    def read_many(self, keys: list[Key], out: np.ndarray | None = None) -> np.ndarray:
        for clip_id, view in keys:
            if (clip_id, view) in self.bad:
                raise CorruptRecord(Path("views"), clip_id, view, "shards/000000.bin", 7, "it is torn")
        told = [int(clip_id.split("/")[1]) * VIEWS + view for clip_id, view in keys]
        out = np.empty((len(keys), 4, 32, 32, 3), np.uint8) if out is None else out
        out[:] = np.array(told, np.uint8).reshape(-1, 1, 1, 1, 1)
        return out


@pytest.fixture
def folder(tmp_path, build_cache) -> Path:
    """A cache of two shards of 12 records."""
    build_cache(tmp_path / "cache", clips=CLIPS, views=VIEWS, shape=(GEOMETRY.num_tokens, 3), per_shard=12)
    return tmp_path / "cache"


def damage(folder: Path, keys: Iterable[Key]) -> None:
    cache = open_cache(folder)
    for clip_id, view in keys:
        shard, slot = divmod(int(clip_id.split("/")[1]) * VIEWS + view, 12)
        with (folder / f"shards/{shard:06d}.bin").open("r+b") as file:
            file.seek(slot * cache.encoding.record_bytes)
            first = file.read(1)[0]
            file.seek(slot * cache.encoding.record_bytes)
            file.write(bytes([first ^ 1]))


def make(cache: ArrayCache | None, views: Pictures | None = None, **changes) -> Batches:
    options = {"batch_size": 6, "num_views": VIEWS, "seed": 3, "steps": 12, "cache": cache} | changes
    parts = [Part(tuple(f"clip/{n}" for n in range(CLIPS)))]
    return Batches(parts, views or Pictures(), MASKS, **options)


def keys_at(step: int, batch_size: int = 6) -> list[Key]:
    return make(None, batch_size=batch_size)[step].keys


def digest(batch: Batch) -> str:
    state = hashlib.sha256(repr((batch.keys, list(map(str, batch.corrupt)))).encode())
    ids = [ids for group in batch.masks for ids in (group.context_ids, group.target_ids)]
    for tensor in (batch.frames, *ids, *([] if batch.records is None else [batch.records])):
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def check_rows(batch: Batch, cache: ArrayCache) -> None:
    """Pixels and latents of a row are its key's."""
    assert batch.records is not None
    for row, (clip_id, view) in enumerate(batch.keys):
        assert int(batch.frames[row, 0, 0, 0, 0]) == int(clip_id.split("/")[1]) * VIEWS + view
        latents = cache.encoding.decode(batch.records[row].numpy().data)
        assert np.array_equal(latents, cache.read(clip_id, view=view))


def test_another_clip_of_the_batch_takes_its_place(folder):
    asked = keys_at(2)
    damage(folder, [asked[1], asked[4]])
    intact_masks = make(None)[2].masks
    batch = make(open_cache(folder))[2]
    good = [key for key in asked if key not in (asked[1], asked[4])]
    assert batch.keys == [good[0] if n == 1 else good[1] if n == 4 else key for n, key in enumerate(asked)]
    check_rows(batch, open_cache(folder))
    assert [(error.clip_id, error.view) for error in batch.corrupt] == [asked[1], asked[4]]
    assert "the checksum does not match" in str(batch.corrupt[0])
    assert all(
        torch.equal(a.target_ids, b.target_ids) for a, b in zip(batch.masks, intact_masks, strict=True)
    )


def test_other_steps_are_what_they_were(folder):
    before = [digest(make(open_cache(folder))[step]) for step in range(12)]
    bad = keys_at(2)[0]
    damage(folder, [bad])
    after = [digest(make(open_cache(folder))[step]) for step in range(12)]
    touched = [step for step in range(12) if bad in keys_at(step)]
    assert [step for step in range(12) if before[step] != after[step]] == touched
    assert 0 < len(touched) < 12


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_same_in_any_order_process_and_number_of_workers(folder, workers):
    damage(folder, [*keys_at(5)[:3], *keys_at(7)[:1]])
    expected = [digest(make(open_cache(folder))[step]) for step in range(5, 12)]
    cache = open_cache(folder)
    backwards = [digest(make(cache)[step]) for step in range(11, 4, -1)]
    assert backwards[::-1] == expected
    seen = [digest(batch) for batch in load_from(make(cache), 5, Loading(workers))]
    assert seen == expected


def test_a_batch_without_a_readable_record_takes_a_later_steps(folder):
    (only,) = keys_at(3, batch_size=1)
    damage(folder, [only])
    batch = make(open_cache(folder), batch_size=1)[3]
    assert batch.keys == keys_at(4, batch_size=1) and len(batch.corrupt) == 1
    check_rows(batch, open_cache(folder))


def test_a_cache_without_any_readable_record_is_an_error(folder):
    for shard in (folder / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CorruptRecord, match="the checksum does not match"):
        make(open_cache(folder), batch_size=1)[0]


def test_stop_raises_what_is_wrong(folder):
    bad = keys_at(0)[2]
    damage(folder, [bad])
    batches = make(open_cache(folder), on_corrupt_record="stop")
    with pytest.raises(CorruptRecord, match=rf"clip '{bad[0]}', view {bad[1]}\): the checksum") as raised:
        next(load_from(batches, 0))
    assert (raised.value.clip_id, raised.value.view) == bad


def test_damaged_pixels_count_like_damaged_latents(folder):
    asked = keys_at(1)
    damage(folder, [asked[0]])
    batch = make(open_cache(folder), Pictures(bad=[asked[3]]))[1]
    assert {str(error).partition(",")[0] for error in batch.corrupt} == {f"cache {folder}", "cache views"}
    assert not {asked[0], asked[3]} & set(batch.keys) and len(batch.keys) == 6


def test_a_key_that_is_nowhere_is_no_damage(folder):
    batches = make(open_cache(folder))
    batches.parts = (Part(("clip/stranger",)),)
    with pytest.raises(CacheError, match="holds no view") as raised:
        batches[0]
    assert not isinstance(raised.value, CorruptRecord)


def test_canonical_batches_leave_it_out_and_the_others_keep_their_masks(folder):
    before = list(make(open_cache(folder)).canonical(CLIPS, batch_size=5))
    damage(folder, [("clip/3", 0), ("clip/10", 0), ("clip/11", 0), ("clip/6", 1)])
    after = list(make(open_cache(folder)).canonical(CLIPS, batch_size=5))
    kept = [[n for n, key in enumerate(b.keys) if key in a.keys] for b, a in zip(before, after, strict=True)]
    assert [len(rows) for rows in kept] == [4, 5, 0]
    for whole, part, rows in zip(before, after, kept, strict=True):
        assert part.keys == [whole.keys[n] for n in rows]
        assert torch.equal(part.frames, whole.frames[rows])
        assert part.records is not None and whole.records is not None
        assert torch.equal(part.records, whole.records[rows])
        for ours, theirs in zip(part.masks, whole.masks, strict=True):
            assert torch.equal(ours.context_ids, theirs.context_ids[rows])
            assert torch.equal(ours.target_ids, theirs.target_ids[rows])
    assert [len(batch.corrupt) for batch in after] == [1, 0, 2]


def test_batches_without_clips_are_counted_and_not_handed_on(folder, tmp_path):
    damage(folder, [("clip/10", 0), ("clip/11", 0)])
    run, tally = RunDirectory(tmp_path / "run"), Tally()
    run.path.mkdir()
    seen = SkippedRecords(run).watch(make(open_cache(folder)).canonical(CLIPS, batch_size=5), tally)
    assert [len(batch.keys) for batch in seen] == [5, 5]
    assert (tally.clips, tally.corrupt, tally.as_row()) == (10, 2, {"corrupt_records": 2})
    again = SkippedRecords(run).watch(make(open_cache(folder)).canonical(CLIPS, batch_size=5), Tally())
    assert len(list(again)) == 2
    lines = run.log_file.read_text().splitlines()
    assert len(lines) == 2 and all(line.startswith(f"skipped: cache {folder}, shards/") for line in lines)


def test_ten_damaged_records_stop_a_run_only_when_they_are_one_in_a_hundred(folder, tmp_path):
    asked = keys_at(0)
    damage(folder, asked[:1])
    run = RunDirectory(tmp_path)
    for clips, before, is_stopped in ((0, 8, False), (0, 9, True), (985, 9, True), (2000, 9, False)):
        watched = SkippedRecords(run).watch([make(open_cache(folder))[0]], Tally(clips, before))
        if is_stopped:
            with pytest.raises(CacheError, match=r"10 records were damaged .* `salt-vla cache verify` names"):
                list(watched)
        else:
            assert len(list(watched)) == 1


def test_nothing_is_said_of_intact_records(folder, tmp_path):
    run, tally = RunDirectory(tmp_path / "run"), Tally()
    batches = (make(open_cache(folder))[step] for step in range(3))
    assert len(list(SkippedRecords(run).watch(batches, tally))) == 3
    assert (tally.clips, tally.as_row()) == (18, {}) and not run.path.exists()


def test_the_policy_is_a_setting_that_older_files_lack():
    text = to_json(TrainConfig(data=DataConfig(on_corrupt_record="stop")))
    assert from_json(TrainConfig, text).data.on_corrupt_record == "stop"
    older = text.replace('    "on_corrupt_record": "stop",\n', "")
    assert older != text and from_json(TrainConfig, older).data.on_corrupt_record == "skip"
    with pytest.raises(ConfigError, match=r"data\.on_corrupt_record must be one of skip, stop, not 'hope'"):
        DataConfig(on_corrupt_record="hope")
