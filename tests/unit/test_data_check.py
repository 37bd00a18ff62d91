"""A full pass over a table: every clip is decoded, bad ones are named, a crash costs one clip alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import ConfigError
from salt_vla.jobs import data_check
from salt_vla.jobs.data_check import CLIPS_AT_ONCE, BadClip, Checked, check_table, write_bad
from salt_vla.jobs.data_index import index_data

CUTTING = Cutting(ViewConfig(frame_stride=1), num_frames=4, hop=2)


@pytest.fixture
def films(write_video: Callable[..., Path], tmp_path: Path) -> Path:
    """Three films of 11 clips, 36 of which more than are decoded at once."""
    for name, frames in (("a", 24), ("b", 24), ("long", 74)):
        write_video(tmp_path / "films" / f"{name}.mp4", frames=frames)
    return tmp_path / "films"


@pytest.fixture
def table(films: Path) -> ClipTable:
    return index_data(films, CUTTING)[0]


def test_a_sound_table_has_no_bad_clip(table: ClipTable) -> None:
    checked = check_table(table, CUTTING)
    assert (checked.clips, checked.bad) == (len(table), ()) and len(table) > 2 * CLIPS_AT_ONCE
    assert checked.clips_per_second == pytest.approx(len(table) / checked.seconds)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_are_named_with_file_and_reason_in_the_tables_order(
    table: ClipTable, films: Path, workers: int
) -> None:
    (films / "b.mp4").unlink()
    (films / "a.mp4").write_bytes(b"no film")
    bad = check_table(table, CUTTING, workers).bad
    assert [clip.clip_id for clip in bad] == [c for c in table.clip_ids if "long" not in c]
    assert {(clip.file, clip.reason.split(":")[0].split(";")[0]) for clip in bad} == {
        ("a.mp4", "cannot be decoded"),
        ("b.mp4", "is missing"),
    }
    assert not any(str(films) in clip.reason or clip.clip_id in clip.reason for clip in bad)


def test_a_clip_that_reaches_beyond_its_video_is_bad(table: ClipTable) -> None:
    longer = Cutting(ViewConfig(frame_stride=5), num_frames=4)
    bad = check_table(table, longer).bad
    assert {clip.clip_id for clip in bad} == {
        clip.clip_id for clip in table.clips() if clip.start_in_episode + 16 > clip.episode_frames
    }
    assert all("index the data set for these clips" in clip.reason for clip in bad)


def test_a_clip_whose_file_leaves_the_root_is_one_bad_clip(table: ClipTable) -> None:
    rows = table.rows
    files = [file if file != "a.mp4" else "../a.mp4" for file in rows["file"].to_pylist()]
    hostile = table.filtered(rows.set_column(rows.column_names.index("file"), "file", pa.array(files)))
    bad = check_table(hostile, CUTTING).bad
    assert {(clip.file, "leaves the data set's root" in clip.reason) for clip in bad} == {("../a.mp4", True)}


def test_a_sample_is_always_the_same_clips(table: ClipTable, films: Path) -> None:
    for name in ("a", "b", "long"):
        (films / f"{name}.mp4").write_bytes(b"")
    first, again = check_table(table, CUTTING, sample=7), check_table(table, CUTTING, sample=7)
    assert first.bad == again.bad and first.clips == len(first.bad) == 7
    assert [clip.clip_id for clip in first.bad] == [
        c for c in table.clip_ids if c in {b.clip_id for b in first.bad}
    ]
    assert check_table(table, CUTTING, sample=10_000).clips == len(table)
    with pytest.raises(ConfigError, match="--sample must be 0"):
        check_table(table, CUTTING, sample=-1)


def _killed_by_long_films(reader: ViewReader, clip_ids: list[str]) -> dict[str, str]:
    """As a decoder that crashes on one clip; the others of its file are sound."""
    if any(clip_id.endswith("long.mp4/000010") for clip_id in clip_ids):
        os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def test_a_clip_that_kills_its_decoder_is_named_alone(
    table: ClipTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "_reasons", _killed_by_long_films)
    checked = check_table(table, CUTTING, num_workers=1)
    assert [(clip.clip_id, clip.file) for clip in checked.bad] == [("films/long.mp4/000010", "long.mp4")]
    assert "SIGSEGV" in checked.bad[0].reason


def test_bad_clips_are_written_as_json(tmp_path: Path) -> None:
    clips = (BadClip("a/0", "a.mp4", "is empty"), BadClip("a/1", "a.mp4", "is empty"))
    write_bad(Checked(5, 1.0, clips), tmp_path / "bad.json")
    assert json.loads((tmp_path / "bad.json").read_text()) == [
        {"clip_id": "a/0", "file": "a.mp4", "reason": "is empty"},
        {"clip_id": "a/1", "file": "a.mp4", "reason": "is empty"},
    ]
