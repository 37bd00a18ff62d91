"""Every source in the registry turns a data set of its layout into a clip table of the same kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import SCHEMA, ClipTable
from salt_vla.data.sampling import clip_span
from salt_vla.data.segments import Cutting, Listing, Problem, SourceOptions
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError, UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data_index import find_source, index_data, list_segments
from salt_vla.registry import SIGNALS, SOURCES, resolve

VIEW = ViewConfig(frame_stride=2)
CUTTING = Cutting(VIEW, num_frames=4, hop=8)
GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
# Layout → its source; a source may have several.
LAYOUTS = {name: name for name in SOURCES} | {"lerobot-v2.1": "lerobot"}
RECORDED = {"lerobot", "sim"}  # with cameras, and lengths in tables instead of measured ones


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(layout: str) -> str:
    return LAYOUTS[layout]


@pytest.fixture(scope="module")
def dataset(layout: str, write_layout: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(layout, tmp_path_factory.mktemp(layout) / "data")


@pytest.fixture(scope="module")
def table(dataset: Path, source: str) -> ClipTable:
    return index_data(dataset, CUTTING, source)[0]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """The data set in another place, to be damaged."""
    folder = dataset if dataset.is_dir() else dataset.parent
    return Path(shutil.copytree(folder, tmp_path / "elsewhere" / "data")) / dataset.relative_to(folder)


def test_it_gives_a_clip_table(table: ClipTable, source: str) -> None:
    assert isinstance(table, ClipTable) and len(table) > 3
    assert table.rows.schema.equals(SCHEMA)
    assert not any(column.null_count for column in table.rows.columns)
    assert set(table.rows["source"].to_pylist()) == {source}
    assert len(table.roots) == 1 and table.root.is_dir()


def test_a_healthy_data_set_has_no_problems(dataset: Path, source: str) -> None:
    assert index_data(dataset, CUTTING, source)[1] == []


def test_its_data_sets_are_recognised(dataset: Path, source: str) -> None:
    """A rendered data set is LeRobot's: nothing but the name asks for rendering."""
    assert find_source(dataset) == ("lerobot" if source == "sim" else source)


def test_clip_ids_are_unique_and_begin_with_the_data_sets_name(dataset: Path, source: str) -> None:
    table, _ = index_data(dataset, CUTTING, source, SourceOptions(dataset="mine"))
    assert len(set(table.clip_ids)) == len(table)
    assert all(clip_id.startswith("mine/") for clip_id in table.clip_ids)
    assert set(table.rows["dataset"].to_pylist()) == {"mine"}


def test_clip_ids_do_not_depend_on_how_many_clips_are_cut(
    dataset: Path, source: str, table: ClipTable
) -> None:
    finer, _ = index_data(dataset, replace(CUTTING, hop=4), source)
    assert len(finer) > len(table)
    assert all(finer.clip(clip.clip_id) == clip for clip in table.clips())
    one, _ = index_data(dataset, replace(CUTTING, clips_per_video=1), source)
    assert all(clip_id.startswith(tuple(one.clip_ids)) for clip_id in table.clip_ids)


def test_the_same_data_set_gives_the_same_table_wherever_it_lies(
    dataset: Path, source: str, table: ClipTable, copy: Path
) -> None:
    assert index_data(dataset, CUTTING, source)[0].hash == table.hash
    moved, _ = index_data(copy, CUTTING, source)
    assert moved.hash == table.hash and moved.root != table.root


def test_clips_lie_within_their_videos_and_those_within_the_root(table: ClipTable) -> None:
    for clip in table.clips():
        span = clip_span(VIEW, 4, clip.fps, clip.episode_frames)
        assert clip.start_in_episode >= 0 and clip.episode_first_frame >= 0
        assert clip.start_in_episode + span <= clip.episode_frames
        assert clip.fps > 0
        assert table.video(clip).is_file() and table.video(clip).resolve().is_relative_to(table.root)


def test_no_group_is_in_two_splits(dataset: Path, source: str, table: ClipTable) -> None:
    groups: dict[str, set[str]] = {}
    for segment in list_segments(dataset, source).segments:
        groups.setdefault(segment.group, set()).add(segment.split)
    assert all(len(names) == 1 for names in groups.values())
    of_episode: dict[int, set[str]] = {}
    for clip in table.clips():
        of_episode.setdefault(clip.episode, set()).add(clip.split)
    assert all(len(names) == 1 for names in of_episode.values())
    assert len({name for names in of_episode.values() for name in names}) > 1


def test_every_clip_can_be_read(table: ClipTable) -> None:
    views = ViewReader(table, VIEW, GEOMETRY)
    for clip_id in table.clip_ids:
        assert views.read(clip_id).shape == (4, 32, 32, 3)


def test_a_missing_file_is_named_and_no_other_id_moves(source: str, table: ClipTable, copy: Path) -> None:
    victim = table.clips()[len(table) // 2]
    (copy if copy.is_dir() else copy.parent).joinpath(victim.file).unlink()
    again, problems = index_data(copy, CUTTING, source, max_bad_share=1)
    left = [clip_id for clip_id in table.clip_ids if table.clip(clip_id).file != victim.file]
    assert again.clip_ids == left
    if source != "folder":  # A file that nothing lists cannot be missed.
        assert {problem.file for problem in problems} >= {victim.file}
    for problem in problems:
        assert problem.key and problem.file and "missing" in problem.reason
        assert not any(clip_id.startswith(f"{problem.key}/") for clip_id in left)


def test_a_broken_file_costs_its_own_clips_alone(source: str, table: ClipTable, copy: Path) -> None:
    victim = table.clips()[len(table) // 2]
    (copy if copy.is_dir() else copy.parent).joinpath(victim.file).write_bytes(b"no video at all" * 99)
    again, problems = index_data(copy, CUTTING, source, max_bad_share=1)
    lost = [clip_id for clip_id in table.clip_ids if table.clip(clip_id).file == victim.file]
    if source in RECORDED:  # Lengths are in the tables: the file itself is not opened before it is decoded.
        assert again.clip_ids == table.clip_ids
        with pytest.raises(DataError, match="cannot be decoded"):
            ViewReader(again, VIEW, GEOMETRY).read(victim.clip_id)
    else:
        assert again.clip_ids == [clip_id for clip_id in table.clip_ids if clip_id not in lost]
        assert {problem.file for problem in problems} == {victim.file}
        assert all("cannot be decoded" in problem.reason for problem in problems)
        assert not any(str(copy.parent) in problem.reason for problem in problems)


def test_too_many_bad_files_stop_with_a_summary(source: str, table: ClipTable, copy: Path) -> None:
    files = sorted(set(table.rows["file"].to_pylist()))
    for file in files:
        path = (copy if copy.is_dir() else copy.parent) / file
        path.unlink() if source in RECORDED else path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be used, more than 5%: \d+ × (missing|is empty)"):
        index_data(copy, CUTTING, source)


def test_short_videos_are_left_out_with_a_reason_or_held(dataset: Path, source: str) -> None:
    long = Cutting(ViewConfig(frame_stride=9), num_frames=4, hop=8)
    with_reasons = Cutting(ViewConfig(frame_stride=7), num_frames=4, hop=8)
    held, none = index_data(dataset, replace(long, view=replace(long.view, short="hold")), source)
    assert none == [] and len(held) >= len(list_segments(dataset, source).segments)
    try:
        table, problems = index_data(dataset, with_reasons, source)
    except DataError as error:
        assert "gives no clip" in str(error) and "too short" in str(error)
        return
    keys = {problem.key for problem in problems}
    assert all("too short" in problem.reason for problem in problems)
    assert not any(clip_id.startswith(key + "/") for clip_id in table.clip_ids for key in keys)


@pytest.mark.parametrize(
    "view",
    [ViewConfig(sampling="fps", target_fps=6.0), ViewConfig(sampling="uniform")],
    ids=["fps", "uniform"],
)
def test_clips_at_a_rate_or_over_the_whole_video_can_be_read(
    dataset: Path, source: str, view: ViewConfig
) -> None:
    table, _ = index_data(dataset, Cutting(view, num_frames=4, hop=8), source)
    views = ViewReader(table, view, GEOMETRY)
    for clip_id in table.clip_ids[:: max(len(table) // 4, 1)]:
        assert views.read(clip_id).shape == (4, 32, 32, 3)


def test_the_table_survives_its_file(table: ClipTable, tmp_path: Path) -> None:
    table.write(tmp_path / "clips.parquet")
    read = ClipTable.read(tmp_path / "clips.parquet")
    assert read.rows.equals(table.rows) and read.root == table.root and read.hash == table.hash


def test_a_camera_that_is_not_there_is_no_clip(dataset: Path, source: str, table: ClipTable) -> None:
    cameras = sorted(set(table.rows["camera"].to_pylist()))
    if source not in RECORDED:
        assert cameras == [""]
        with pytest.raises(UserError, match="does not tell cameras apart; leave out --camera"):
            index_data(dataset, CUTTING, source, SourceOptions(cameras=("nose",)))
        return
    one, _ = index_data(dataset, CUTTING, source, SourceOptions(cameras=(cameras[0],)))
    assert one.clip_ids == table.select(camera=cameras[0]).clip_ids
    with pytest.raises(UserError, match="no camera 'nose'"):
        index_data(dataset, CUTTING, source, SourceOptions(cameras=("nose",)))


def test_what_was_recorded_belongs_to_the_clips(source: str, table: ClipTable) -> None:
    """A row of actions and states for every file frame of each clip; or the source says that it has none."""
    assert (source in SIGNALS) == (source in RECORDED)
    if source in SIGNALS:
        signals = resolve(SIGNALS, source)(table, 4, VIEW)
        assert signals.clip_ids == tuple(table.clip_ids)
        assert signals.episodes.tolist() == table.rows["episode"].to_pylist()
        assert signals.signals["action"].shape == (len(table), 7, 4)


def test_another_folder_for_the_films_is_the_lists_affair(dataset: Path, source: str) -> None:
    options = SourceOptions(videos=str(dataset if dataset.is_dir() else dataset.parent))
    if source == "table":
        assert index_data(dataset, CUTTING, source, options)[1] == []
        return
    with pytest.raises(UserError, match=f"--videos is for lists of videos; .* is read as {source}"):
        index_data(dataset, CUTTING, source, options)


def test_a_place_without_such_a_data_set_is_a_sentence(source: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    for place in [tmp_path, tmp_path / "notes.txt"]:
        with pytest.raises(UserError, match=str(tmp_path)) as caught:
            resolve(SOURCES, source)(place, SourceOptions())
        assert "\n" not in str(caught.value)


def test_listings_are_what_they_say(dataset: Path, source: str) -> None:
    listing = resolve(SOURCES, source)(dataset, SourceOptions())
    assert isinstance(listing, Listing) and listing.source == source
    assert all(isinstance(problem, Problem) for problem in listing.problems)
    for segment in listing.segments:
        assert segment.key.startswith(f"{listing.dataset}/") and segment.group.startswith(
            f"{listing.dataset}/"
        )
        assert not Path(segment.file).is_absolute()


def test_a_chosen_part_keeps_the_tables_order(table: ClipTable) -> None:
    chosen = [table.clip_ids[2], table.clip_ids[1]]
    part = table.only(chosen)
    assert part.clip_ids == [table.clip_ids[1], table.clip_ids[2]]
    assert part.rows.schema.equals(pa.schema(SCHEMA)) and part.root == table.root
    assert len(table.only([])) == 0
