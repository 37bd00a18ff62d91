"""Which frames a clip takes: strides, frame rates, whole videos, short ones, and shifts in time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_vla.config import TrainConfig, ViewConfig, from_json, to_json
from salt_vla.data.sampling import clip_span, frame_offsets, sampled_frames
from salt_vla.errors import ConfigError

STRIDE = ViewConfig(frame_stride=3)
FPS = ViewConfig(sampling="fps", target_fps=6.0)
UNIFORM = ViewConfig(sampling="uniform")


@pytest.mark.parametrize(
    ("view", "fps", "available", "expected"),
    [
        (STRIDE, 30.0, 100, (0, 3, 6, 9)),
        (STRIDE, 12.0, 1, (0, 3, 6, 9)),
        (FPS, 12.0, 100, (0, 2, 4, 6)),
        (FPS, 30.0, 100, (0, 5, 10, 15)),
        (FPS, 25.0, 100, (0, 4, 8, 13)),  # 0, 4.17, 8.33, 12.5: halves go up
        (FPS, 3.0, 100, (0, 1, 1, 2)),  # slower than asked for: frames repeat
        (UNIFORM, 30.0, 8, (1, 3, 5, 7)),
        (UNIFORM, 30.0, 100, (12, 37, 62, 87)),
        (UNIFORM, 30.0, 2, (0, 0, 1, 1)),
    ],
)
def test_offsets_are_the_ones_written_down(view, fps, available, expected):
    assert frame_offsets(view, 4, fps, available) == expected


def test_a_span_reaches_from_the_first_frame_to_the_last():
    assert clip_span(STRIDE, 4, 30.0, 0) == 10
    assert clip_span(FPS, 4, 25.0, 0) == 14
    assert clip_span(UNIFORM, 4, 25.0, 61) == 61


views = st.one_of(
    st.builds(ViewConfig, frame_stride=st.integers(1, 9)),
    st.builds(ViewConfig, sampling=st.just("fps"), target_fps=st.floats(0.5, 60)),
    st.just(UNIFORM),
)


@given(
    view=views,
    num_frames=st.integers(1, 32),
    fps=st.floats(1, 120),
    available=st.integers(1, 400),
    start=st.integers(0, 399),
    shift=st.integers(-500, 500),
)
def test_sampled_frames_lie_in_the_episode_in_order(view, num_frames, fps, available, start, shift):
    start = min(start, available - 1) if view.sampling != "uniform" else 0
    frames = sampled_frames(view, num_frames, fps, available, start, shift)
    assert len(frames) == num_frames
    assert list(frames) == sorted(frames) and frames[0] >= 0 and frames[-1] < available
    unmoved = sampled_frames(view, num_frames, fps, available, start)
    moved = {after - before for before, after in zip(unmoved, frames, strict=True)}
    assert len(moved) == 1 and abs(moved.pop()) <= abs(shift)


def test_a_shift_goes_as_far_as_the_episode_lets_it():
    assert sampled_frames(STRIDE, 4, 30.0, 20, 5, shift=100) == (10, 13, 16, 19)
    assert sampled_frames(STRIDE, 4, 30.0, 20, 5, shift=-100) == (0, 3, 6, 9)
    assert sampled_frames(STRIDE, 4, 30.0, 20, 5, shift=-2) == (3, 6, 9, 12)
    assert sampled_frames(UNIFORM, 4, 30.0, 100, 0, shift=50) == (24, 49, 74, 99)


def test_a_short_videos_last_frame_is_held_and_nothing_shifts():
    assert sampled_frames(STRIDE, 4, 30.0, 5, 0) == (0, 3, 4, 4)
    assert sampled_frames(STRIDE, 4, 30.0, 5, 0, shift=3) == (0, 3, 4, 4)


def test_a_rate_without_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"sampling 'fps' needs data.view.target_fps above 0, not 0"):
        ViewConfig(sampling="fps")
    with pytest.raises(ConfigError, match=r"sampling 'fps' needs data.view.target_fps above 0, not inf"):
        ViewConfig(sampling="fps", target_fps=float("inf"))
    with pytest.raises(ConfigError, match=r"sampling must be one of stride, fps, uniform, not 'every'"):
        ViewConfig(sampling="every")  # type: ignore[arg-type]


def test_a_file_written_before_a_field_existed_reads_as_it_was_meant():
    view = ViewConfig(frame_stride=7, num_views=2)
    config = TrainConfig()
    config = replace(config, data=replace(config.data, view=view))
    fields = json.loads(to_json(config))
    for name in ("sampling", "target_fps", "short"):
        del fields["data"]["view"][name]
    assert from_json(TrainConfig, json.dumps(fields)) == config
    del fields["data"]["view"]["num_views"]
    with pytest.raises(ConfigError, match=r"config.data.view lacks field\(s\) num_views"):
        from_json(TrainConfig, json.dumps(fields), "config")
