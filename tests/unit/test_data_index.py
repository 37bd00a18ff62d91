"""Indexing, whatever the source: which one a path has, what is measured, what is said of what is left out."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting, SourceOptions
from salt_vla.errors import ConfigError, DataError, UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table
from salt_vla.jobs.data_index import (
    EMBEDDED,
    TooManyBad,
    find_source,
    index_data,
    kinds_of,
    list_segments,
    read_cutting,
    recognised_by,
    write_index,
)

CUTTING = Cutting(ViewConfig(frame_stride=2), num_frames=4, hop=8)
GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
Write = Callable[..., Path]


def test_a_path_that_two_sources_know_asks_which(write_layout: Write, tmp_path: Path) -> None:
    both = write_layout("ssv2", tmp_path / "both", films=1)
    assert find_source(both) == "ssv2"
    shutil.copytree(write_layout("intphys2", tmp_path / "other", films=1), both, dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"could be read as intphys2 or ssv2; say which with --source \("):
        find_source(both)


def test_a_path_that_no_source_knows_is_answered_with_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no film")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert recognised_by(path) == []
        with pytest.raises(
            DataError, match=r"no layout that is known here; .*folder, intphys2, kinetics, lerobot, sim"
        ):
            find_source(path)
    with pytest.raises(DataError, match=r"there is nothing at .*nowhere"):
        find_source(tmp_path / "nowhere")


def test_any_layout_may_be_given_where_a_table_is(write_layout: Write, tmp_path: Path) -> None:
    view = ViewConfig(frame_stride=2)
    for layout in ("ssv2", "folder", "table", "lerobot-v2.1"):
        path = write_layout(layout, tmp_path / layout / "data")
        table = open_table(str(path), view, GEOMETRY)
        assert table.hash == index_data(path, Cutting(view, 4))[0].hash


def test_what_a_folder_could_not_give_is_counted_on_stderr(
    write_layout: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_layout(
        "ssv2", tmp_path / "data", films=1, lists={"train": range(30), "validation": range(30, 40)}
    )
    (path / "20bn-something-something-v2" / "3.webm").write_bytes(b"")
    table = open_table(str(path), ViewConfig(frame_stride=2), GEOMETRY)
    assert "ssv2/3/000000" not in table.clip_ids
    err = capsys.readouterr().err
    assert "left out: 1 × list missing, 1 × is empty" in err and "`salt-vla data index` names each" in err


def test_a_folder_with_too_many_bad_ones_says_what_names_them(write_layout: Write, tmp_path: Path) -> None:
    path = write_layout("ssv2", tmp_path / "data", films=1)
    (path / "20bn-something-something-v2" / "1.webm").unlink()
    with pytest.raises(DataError, match=r"ssv2/1 \(missing: .*; `salt-vla data index` names each"):
        open_table(str(path), ViewConfig(frame_stride=2), GEOMETRY)


def test_the_embedded_data_set_is_what_it_was() -> None:
    """The hash that the demo's caches and views are named by."""
    table, problems = index_data(Path(EMBEDDED), Cutting(ViewConfig(frame_stride=2), 8))
    assert table.clip_ids[0] == "metaworld-mini/000000/observation.images.front/000000"
    assert (len(table), problems, table.hash) == (3730, [], "0bbebb9e28fd8b4dfdc35ef635151f57")


def test_workers_measure_what_one_process_measures(write_layout: Write, tmp_path: Path) -> None:
    path = write_layout(
        "ssv2", tmp_path / "data", films=2, lists={"train": range(40), "validation": range(40, 48)}
    )
    (path / "20bn-something-something-v2" / "7.webm").write_bytes(b"no film")
    alone, several = (list_segments(path, num_workers=workers) for workers in (0, 2))
    assert alone == several
    assert [problem.key for problem in alone.problems] == ["ssv2/something-something-v2-test.json", "ssv2/7"]


def test_measured_files_say_how_long_and_fast_they_are(write_video: Write, tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a.webm", frames=31, fps=12)
    write_video(tmp_path / "data" / "b.mp4", frames=20, fps=30)
    write_video(tmp_path / "data" / "c.mp4", frames=9, fps=5, codec="libsvtav1")
    found = {segment.file: segment for segment in list_segments(tmp_path / "data").segments}
    facts = {file: (s.first_frame, s.frames, s.fps, s.variable_rate) for file, s in found.items()}
    assert facts == {
        "a.webm": (0, 31, pytest.approx(12), False),
        "b.mp4": (0, 20, pytest.approx(30), False),
        "c.mp4": (0, 9, pytest.approx(5), False),
    }


def test_a_name_that_is_no_text_costs_its_film_alone(write_video: Write, tmp_path: Path) -> None:
    film = write_video(tmp_path / "data" / "a.mp4")
    shutil.copy(os.fsencode(film), os.fsencode(tmp_path / "data") + b"/b\xff.mp4")
    summary = write_index(tmp_path / "data", tmp_path / "clips.parquet", CUTTING, max_bad_share=0.5)
    assert summary["problems"] == {"its name is not text in UTF-8": 1}
    assert {clip.file for clip in ClipTable.read(tmp_path / "clips.parquet").clips()} == {"a.mp4"}


def test_a_link_in_a_circle_costs_its_film_alone(write_video: Write, tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a.mp4")
    for one, other in (("l1.mp4", "l2.mp4"), ("l2.mp4", "l1.mp4"), ("metadata.csv", "metadata.csv")):
        (tmp_path / "data" / one).symlink_to(other)
    assert recognised_by(tmp_path / "data") == ["folder"]
    table, problems = index_data(tmp_path / "data", CUTTING, max_bad_share=0.7)
    assert set(table.rows["file"].to_pylist()) == {"a.mp4"}
    assert [problem.key for problem in problems] == ["data/l1.mp4", "data/l2.mp4"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("layout", ["folder", "ssv2"])
def test_what_may_not_be_read_costs_itself_alone(write_layout: Write, tmp_path: Path, layout: str) -> None:
    """A closed file, and a closed folder beside the others, for a user who is not root."""
    path = write_layout(layout, tmp_path / "data", **({"films": 1} if layout == "ssv2" else {}))
    film = min(path.rglob("*.webm"))
    film.chmod(0)
    (path / "closed").mkdir(mode=0)
    for folder in (tmp_path, *tmp_path.parents):  # pytest closes its own to other users
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o055)
    code = """
import os, sys
from pathlib import Path
from salt_vla.config import ViewConfig
from salt_vla.data.segments import Cutting
from salt_vla.jobs.data_index import index_data
data, cutting = Path(sys.argv[1]), Cutting(ViewConfig(frame_stride=2), 4)
assert index_data(data, cutting)[1] == []  # Root may read all; what is imported late is there afterwards.
os.setuid(65534)
table, problems = index_data(data, cutting, max_bad_share=0.7)
assert len(table) > 3
for problem in problems:
    print(problem.file, problem.reason)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = str(film.relative_to(path))
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            "closed the folder cannot be listed: Permission denied",
            f"{name} may not be read by this user; change its permissions",
        ]
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "x.parquet is not a Parquet file, or a damaged one"),
        (b"PAR1 half of it", "x.parquet is not a Parquet file, or a damaged one"),
        (None, "x.parquet is a clip table already; give it as --data"),
    ],
)
def test_a_parquet_file_that_is_no_list_is_told_apart(
    tiny_table: ClipTable, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "x.parquet"
    tiny_table.write(path) if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_source(path)
    assert said in str(caught.value)


def test_a_revision_is_for_what_is_not_here(write_layout: Write, tmp_path: Path) -> None:
    for layout in ("folder", "lerobot"):
        path = write_layout(layout, tmp_path / layout)
        with pytest.raises(ConfigError, match="--revision is for a hub id"):
            list_segments(path, options=SourceOptions(revision="main"))


def test_films_of_several_rates_give_clips_of_one_pace(write_video: Write, tmp_path: Path) -> None:
    """At 5 a second a clip of 4 frames spans 0.6 s: 7 frames of 12 a second, 18 or 19 of 30."""
    write_video(tmp_path / "data" / "slow.mp4", frames=24, fps=12)
    write_video(tmp_path / "data" / "fast.mp4", frames=60, fps=30)
    view = ViewConfig(sampling="fps", target_fps=5.0)
    table, _ = index_data(tmp_path / "data", Cutting(view, 4, clips_per_video=2))
    assert [(clip.file, clip.first_frame) for clip in table.clips()] == [
        ("fast.mp4", 10),
        ("fast.mp4", 30),
        ("slow.mp4", 4),
        ("slow.mp4", 12),
    ]


def test_the_share_of_validation_is_drawn_by_name_and_never_moves(write_video: Write, tmp_path: Path) -> None:
    film = write_video(tmp_path / "film.mp4", frames=8)
    cutting = Cutting(ViewConfig(frame_stride=1), 4, clips_per_video=2, validation_share=0.3)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(40):
        shutil.copy(film, folder / f"{number}.mp4")
    splits = {clip.file: clip.split for clip in index_data(folder, cutting)[0].clips()}
    assert 4 <= list(splits.values()).count("validation") <= 20
    for number in range(40, 50):
        shutil.copy(film, folder / f"{number}.mp4")
    (folder / "3.mp4").unlink()
    again = {clip.file: clip.split for clip in index_data(folder, cutting)[0].clips()}
    assert {file: again[file] for file in splits if file != "3.mp4"} == {
        file: split for file, split in splits.items() if file != "3.mp4"
    }


def test_too_many_bad_ones_carry_their_reasons(write_layout: Write, tmp_path: Path) -> None:
    path = write_layout("ssv2", tmp_path / "data", films=1)
    for number in (1, 2):
        (path / "20bn-something-something-v2" / f"{number}.webm").unlink()
    with pytest.raises(TooManyBad, match=r"^2 of the 11 entries of .* more than 5%: 2 × missing; ") as caught:
        index_data(path, CUTTING)
    assert [problem.key for problem in caught.value.problems] == ["ssv2/1", "ssv2/2"]
    assert len(index_data(path, CUTTING, max_bad_share=0.2)[1]) == 2


def test_a_table_remembers_how_its_clips_were_cut(
    write_layout: Write, tmp_path: Path, tiny_table: ClipTable
) -> None:
    out = tmp_path / "clips.parquet"
    write_index(write_layout("ssv2", tmp_path / "data", films=1), out, CUTTING)
    assert read_cutting(out) == CUTTING
    tiny_table.write(out)
    assert read_cutting(out) is None
    tiny_table.write(out, {b"salt_vla.cutting": b'{"hop": 3}'})
    with pytest.raises(ConfigError, match=r"clips\.parquet, its salt_vla\.cutting lacks field"):
        read_cutting(out)
    out.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a Parquet file, or a damaged one"):
        read_cutting(out)


def test_an_index_made_anew_is_the_same_file_and_its_problems_are_its_own(
    write_layout: Write, tmp_path: Path
) -> None:
    path = write_layout("ssv2", tmp_path / "data", films=1)
    out, beside = tmp_path / "clips.parquet", tmp_path / "clips.parquet.problems.json"
    film = path / "20bn-something-something-v2" / "1.webm"
    first = write_index(path, out, CUTTING)
    before, whole = out.read_bytes(), film.read_bytes()
    film.write_bytes(b"")
    assert write_index(path, out, CUTTING, max_bad_share=0.5)["problems"] == {"is empty": 1}
    (problem,) = json.loads(beside.read_text())
    assert problem["key"] == "ssv2/1" and problem["reason"].startswith("is empty (0 bytes)")
    film.write_bytes(whole)
    assert write_index(path, out, CUTTING) == first
    assert out.read_bytes() == before and json.loads(beside.read_text()) == []


def test_kinds_are_reasons_without_their_details() -> None:
    reasons = [
        "too short: 3 frames, a clip needs 7",
        "too short: 4 frames, a clip needs 7",
        "is empty (0 bytes); restore it",
        "says that its pictures are 9 × 9, more than 5",
        "says that its pictures are 10 × 9, more than 5",
        "its label is not text in UTF-8; mend it",
    ]
    assert list(kinds_of(reasons).items()) == [
        ("too short", 2),
        ("says that its pictures are N × N, more than N", 2),
        ("is empty", 1),
        ("its label is not text in UTF-8", 1),
    ]


def test_an_unknown_source_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="'zip' is not known here; known names: folder, intphys2, kinetics, lerobot"
    ):
        index_data(tmp_path, CUTTING, "zip")
