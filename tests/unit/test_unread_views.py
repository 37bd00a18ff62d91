"""Which shards are not published for what could not be read, and how the sentence says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from salt_vla.cache import CacheWriter, Manifest, Record
from salt_vla.cache.shards import Footer
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.read_ahead import read_ahead
from salt_vla.data.video_file import OutOfReach
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.unread_views import Approval

AWAY = OutOfReach("clip 'a', view 0: video /films/a.mp4 is missing")
BROKEN = DataError("clip 'b', view 0: video /films/b.mp4 cannot be decoded")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CacheWriter]:
    """Of 400 keys, four to a shard: 20 may be bad."""
    manifest = Manifest("latents", "float16", (2,), 1, 4, {"teacher": "t"})
    with CacheWriter(tmp_path / "cache", manifest, [f"clip/{n}" for n in range(400)]) as writer:
        yield writer


def test_a_shard_of_which_every_film_is_out_of_reach_is_refused_and_names_the_first(
    writer: CacheWriter,
) -> None:
    approval = Approval(writer, "cure")
    shard = next(writer.pending())
    approval.shard(shard, [AWAY] * 3)
    approval.shard(shard, [AWAY, AWAY, AWAY, BROKEN])
    approval.shard(shard, [BROKEN] * 4)
    with pytest.raises(DataError, match=r"not one of 4 clip views .* the first is clip 'a', view 0: video"):
        approval.shard(shard, [AWAY] * 4)


def test_too_many_bad_views_are_counted_over_all_that_lies_on_disk(writer: CacheWriter) -> None:
    approval = Approval(writer, "cure")
    for shard in writer.pending():
        if shard.number == 5:
            break
        writer.write_shard(shard, [Record(key, None, "broken") for key in shard.keys])
        assert writer.ledger.num_quarantined == 4 * (shard.number + 1)
    approval.beginning()
    approval.shard(shard, [])
    with pytest.raises(
        DataError, match=r"^21 of 400 clip views .* so far, more than 5%; the last is clip 'b'"
    ):
        approval.shard(shard, [BROKEN])
    writer.write_shard(shard, [Record(key, None, "broken") for key in shard.keys])
    approval.shard(shard, [])  # Nothing was made worse.
    with pytest.raises(DataError, match=r"^24 of the 400 .* in quarantine already, more than 5%.*; cure$"):
        approval.beginning()


def test_a_shard_that_is_lost_takes_its_quarantine_with_it(writer: CacheWriter) -> None:
    ledger = writer.ledger
    footer = Footer(0, ledger.identity, ledger.keys_of(0), (None, 1, None, 2), ("", "", "", ""))
    ledger.note(0, footer)
    ledger.note(0, footer)
    assert (ledger.num_quarantined, ledger.done) == (2, {0})
    assert not ledger.look(0)
    assert (ledger.num_quarantined, ledger.done) == (0, set())


def test_a_film_that_was_swapped_is_named_and_one_that_is_away_is_not_called_so(
    writer: CacheWriter, tiny_table: ClipTable, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_table.root, tmp_path / "copy"))
    table = ClipTable(tiny_table.rows, dict.fromkeys(tiny_table.roots, root))
    clips = table.clip_ids[:1]
    film = root / table.clip(clips[0]).file
    before = table.files_hash
    assert table.changed_file(clips) is None
    content = film.read_bytes()
    film.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert table.changed_file(table.clip_ids) == film and table.files_hash == before
    others = [clip.clip_id for clip in table.clips() if root / clip.file != film]
    assert table.changed_file(others) is None
    film.unlink()
    assert table.changed_file(clips) is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_that_a_film_is_out_of_reach_is_known_whoever_decodes(
    tiny_table: ClipTable, tmp_path: Path, num_workers: int
) -> None:
    table = ClipTable(tiny_table.rows, dict.fromkeys(tiny_table.roots, tmp_path / "nowhere"))
    reader = ViewReader(table, ViewConfig(frame_stride=2), ClipGeometry(8, 32, 2, 8))
    ((_, error),) = read_ahead(reader, [(table.clip_ids[0], 0)], num_workers)
    assert isinstance(error, OutOfReach) and "is missing" in str(error)
