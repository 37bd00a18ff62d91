"""Clips cut from what a source lists: where they begin, what they are called, which split they are in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_vla.config import ViewConfig
from salt_vla.data.segments import (
    Cutting,
    Listing,
    Problem,
    Segment,
    SourceOptions,
    clip_starts,
    cut_clips,
    drawn_split,
    group_number,
)
from salt_vla.errors import ConfigError, DataError

SEGMENT = Segment("set/a", "a.webm", group="a", first_frame=100, frames=60, fps=12.0)
EVERY_4TH = ViewConfig(frame_stride=4)


def listing(*segments: Segment, problems: tuple[Problem, ...] = ()) -> Listing:
    return Listing("set", "folder", Path("/videos"), segments, problems)


@pytest.mark.parametrize(
    ("cutting", "starts"),
    [
        (Cutting(EVERY_4TH, 4, hop=16), [0, 16, 32]),
        (Cutting(EVERY_4TH, 4, hop=47), [0, 47]),
        (Cutting(EVERY_4TH, 4, clips_per_video=1), [23]),
        (Cutting(EVERY_4TH, 4, clips_per_video=3), [7, 23, 39]),
        (Cutting(EVERY_4TH, 15, clips_per_video=3), [0, 1, 2]),
        (Cutting(EVERY_4TH, 16), []),
        (Cutting(ViewConfig(frame_stride=4, short="hold"), 16), [0]),
        (Cutting(ViewConfig(sampling="uniform"), 100), [0]),
        (Cutting(ViewConfig(sampling="fps", target_fps=6.0), 4, hop=50), [0, 50]),
    ],
)
def test_clips_begin_where_it_is_written(cutting, starts):
    assert clip_starts(SEGMENT, cutting) == starts


@given(frames=st.integers(0, 300), count=st.integers(1, 9), stride=st.integers(1, 8))
def test_every_clip_lies_in_its_segment_and_none_is_there_twice(frames, count, stride):
    cutting = Cutting(ViewConfig(frame_stride=stride), 8, clips_per_video=count)
    starts = clip_starts(replace(SEGMENT, frames=frames), cutting)
    span = 7 * stride + 1
    assert starts == sorted(set(starts)) and len(starts) <= count
    assert bool(starts) == (frames >= span)
    assert all(0 <= start <= frames - span for start in starts)


def test_ids_are_made_of_the_sources_key():
    def ids(**changes: object) -> list[str]:
        return cut_clips(listing(SEGMENT), Cutting(EVERY_4TH, 4, **changes))[0].clip_ids  # type: ignore[arg-type]

    assert ids(hop=32) == ["set/a/000000", "set/a/000032"]
    assert ids(clips_per_video=1) == ["set/a"]
    assert ids(clips_per_video=2) == ["set/a/0-of-2", "set/a/1-of-2"]


def test_a_row_says_where_its_video_lies_in_the_file():
    table, problems = cut_clips(listing(SEGMENT), Cutting(EVERY_4TH, 4, clips_per_video=1))
    (clip,) = table.clips()
    assert (clip.first_frame, clip.episode_first_frame, clip.episode_frames) == (123, 100, 60)
    assert (clip.dataset, clip.source, clip.fps, clip.variable_rate) == ("set", "folder", 12.0, False)
    assert clip.episode == group_number("a") > 0
    assert problems == []


def test_what_gives_no_clip_is_a_problem_and_moves_no_other_id():
    short = replace(SEGMENT, key="set/b", group="b", frames=5)
    third = replace(SEGMENT, key="set/c", group="c")
    lost = Problem("set/d", "d.webm", "is missing")
    whole, _ = cut_clips(listing(SEGMENT, third), Cutting(EVERY_4TH, 4))
    table, problems = cut_clips(listing(SEGMENT, short, third, problems=(lost,)), Cutting(EVERY_4TH, 4))
    assert table.clip_ids == whole.clip_ids
    assert problems == [lost, Problem("set/b", "a.webm", "too short: 5 frames, a clip needs 13")]


def test_no_clip_at_all_is_an_error_with_the_first_reason():
    with pytest.raises(DataError, match=r"/videos \(folder\) gives no clip; the first of 1: set/a: too"):
        cut_clips(listing(SEGMENT), Cutting(EVERY_4TH, 30))
    with pytest.raises(DataError, match=r"/videos \(folder\) gives no clip$"):
        cut_clips(listing(), Cutting())


def test_splits_are_drawn_by_group_and_new_groups_move_no_old_ones():
    segments = [replace(SEGMENT, key=f"set/{n}", group=f"g{n // 2}", frames=100) for n in range(2000)]
    table, _ = cut_clips(listing(*segments), Cutting(EVERY_4TH, 4, hop=60, validation_share=0.1))
    splits: dict[int, set[str]] = {}
    for clip in table.clips():
        splits.setdefault(clip.episode, set()).add(clip.split)
    assert all(len(names) == 1 for names in splits.values())
    share = sum(names == {"validation"} for names in splits.values()) / len(splits)
    assert 0.07 < share < 0.13
    fewer, _ = cut_clips(listing(*segments[::3]), Cutting(EVERY_4TH, 4, hop=60, validation_share=0.1))
    old = {clip.clip_id: clip.split for clip in table.clips()}
    assert all(old[clip.clip_id] == clip.split for clip in fewer.clips())


def test_a_split_of_the_sources_own_is_kept():
    own = replace(SEGMENT, split="test")
    table, _ = cut_clips(listing(own), Cutting(EVERY_4TH, 4, validation_share=0.9))
    assert {clip.split for clip in table.clips()} == {"test"}
    assert drawn_split("anything", 0.0) == "train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop": 0}, "hop is 0"),
        ({"clips_per_video": -1}, "clips_per_video -1"),
        ({"num_frames": 10**9}, "num_frames must be at least 1 and at most 4096"),
        ({"clips_per_video": 10**9}, "clips_per_video must be at most 10000"),
        ({"view": ViewConfig(frame_stride=10**21)}, "frame_stride must be at most 1000000"),
        (
            {"view": ViewConfig(sampling="fps", target_fps=1e-300)},
            "target_fps must lie in 0.001..1000, not 1e-300",
        ),
        ({"view": ViewConfig(sampling="fps", target_fps=1e300)}, "target_fps must lie in"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"validation_share": 1.0}, "validation_share must lie in"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Cutting(**changes)


@pytest.mark.parametrize("name", ["/", "a/b", "a/../b", "..", ".", "a\nb", "a\ud800"])
def test_a_data_sets_name_is_one_word(name: str) -> None:
    with pytest.raises(ConfigError, match="a data set's name is one word"):
        SourceOptions(dataset=name)


def test_a_film_that_is_said_to_last_for_weeks_costs_itself_alone() -> None:
    long = replace(SEGMENT, key="set/b", frames=10**8)
    table, problems = cut_clips(listing(SEGMENT, long), Cutting(EVERY_4TH, 4))
    assert [problem.key for problem in problems] == ["set/b"] and problems[0].reason.startswith("too long: ")
    assert all(clip.startswith("set/a/") for clip in table.clip_ids)
