"""The order of frames: who sees only brightness cannot name it, who reads frame numbers names it always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.data.clip_table import Clip
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.arrangements import STILL_LEVELS, motion
from salt_vla.evaluation.features import ORDERS, SHUFFLES, Pixels
from salt_vla.evaluation.results import PIXELS, Scored
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.suites import frame_order, time_arrow
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=8, image_size=16, tubelet_size=2, patch_size=8)
STEP = EvalSettings(poolings=("step",))
BenchOf = Callable[..., Any]


def numbered(clip: Clip) -> np.ndarray:
    """Brightness is 20 · frame, plus the episode's own."""
    light = 20 * np.arange(8)[:, None, None, None] + clip.episode
    return np.broadcast_to(light, (8, 16, 16, 3)).astype(np.uint8)


def still(clip: Clip) -> np.ndarray:
    return np.full((8, 16, 16, 3), 40 + 5 * clip.episode, np.uint8)


def half_still(clip: Clip) -> np.ndarray:
    return still(clip) if clip.first_frame else numbered(clip)


class Brightness:
    """Every token is the whole clip's mean brightness: no order is left in it."""

    geometry, dim, fingerprint = GEOMETRY, 2, "brightness"

    def latents(self, frames: Tensor) -> Tensor:
        mean = frames.double().mean((1, 2, 3, 4))
        return torch.stack([mean, mean**2], -1)[:, None].expand(-1, GEOMETRY.num_tokens, -1)


class Noise:
    """Numbers that are a function of all pixels, and tell nothing."""

    geometry, dim, fingerprint = GEOMETRY, 6, "noise"

    def latents(self, frames: Tensor) -> Tensor:
        weights = torch.arange(1, 9)[None, :, None, None, None]
        seeds = (frames.long() * weights).sum((1, 2, 3, 4))
        shape = (GEOMETRY.num_tokens, self.dim)
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        )


def values(scored: list[Scored]) -> dict[str, float]:
    return {one.encoder: one.sums.value for one in scored}


@pytest.mark.parametrize(("suite", "chance"), [(time_arrow, 1 / 2), (frame_order, 1 / 4)])
def test_brightness_alone_is_at_chance_and_frame_numbers_are_always_right(
    bench_of: BenchOf, suite: Any, chance: float
) -> None:
    encoders = {"brightness": Brightness(), PIXELS: Pixels(GEOMETRY)}
    found = suite.score(bench_of(numbered, encoders, GEOMETRY, settings=STEP))
    assert values(found) == {"brightness": chance, "pixels": 1.0, "constant": chance}
    assert not any(one.causal for one in found)


def test_what_tells_nothing_is_near_chance(bench_of: BenchOf) -> None:
    bench = bench_of(numbered, {"noise": Noise()}, GEOMETRY, episodes=80, settings=STEP)
    found = values(time_arrow.score(bench))["noise"]
    assert 0.4 < found < 0.6, "160 held-out items: 2.5 standard deviations"


def test_both_orders_of_a_clip_are_items_of_its_own_episode(bench_of: BenchOf) -> None:
    bench = bench_of(numbered, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=STEP)
    (found, constant) = time_arrow.score(bench)
    assert (found.suite, found.target, found.sums.metric) == ("time-arrow/a/step", "order", "accuracy")
    assert found.sums.episodes.tolist() == list(range(1, 16, 2))
    assert set(found.sums.clips) == {4.0}, "two clips, two orders"
    assert found.sums.same_clips(constant.sums)


def test_an_orders_frames_are_the_clips_own(bench_of: BenchOf) -> None:
    for name, order in ORDERS.items():
        for count in (4, 7, 8, 16):
            assert sorted(order(count)) == list(range(count)), name
    assert ORDERS["4321"](8) == [6, 7, 4, 5, 2, 3, 0, 1]
    assert ORDERS["2143"](7) == [1, 2, 0, 5, 6, 3, 4]


def test_every_segment_stands_once_in_every_place() -> None:
    orders = [(0, 1, 2, 3), *SHUFFLES.values()]
    for place in range(4):
        assert sorted(order[place] for order in orders) == [0, 1, 2, 3]


def test_motion_is_the_largest_change_of_a_place_in_grey_levels(bench_of: BenchOf) -> None:
    bench = bench_of(half_still, {}, GEOMETRY)
    assert motion(bench, bench.test).tolist() == pytest.approx([140.0, 0.0] * 8, abs=1e-4)


def test_clips_that_stand_still_are_counted_and_left_out_on_request(bench_of: BenchOf) -> None:
    encoders = {PIXELS: Pixels(GEOMETRY)}
    (all_of_them, _) = time_arrow.score(bench_of(half_still, encoders, GEOMETRY, settings=STEP))
    assert all_of_them.sums.value == pytest.approx(0.75), "half can be told, half are a coin's toss"
    assert "8 of 16 held-out clips hardly move" in all_of_them.note
    moving = EvalSettings(poolings=("step",), min_motion=STILL_LEVELS)
    (only_moving, _) = time_arrow.score(bench_of(half_still, encoders, GEOMETRY, settings=moving))
    assert only_moving.sums.value == 1.0
    assert "8 clips that move less than asked for are left out" in only_moving.note
    assert "hardly" not in only_moving.note


def test_where_nothing_moves_enough_there_is_a_sentence(bench_of: BenchOf) -> None:
    settings = EvalSettings(poolings=("step",), min_motion=1.0)
    with pytest.raises(DataError, match=r"no clip of camera 'a' moves by 1 grey levels.*lower min_motion"):
        time_arrow.score(bench_of(still, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=settings))


def test_clips_of_too_few_frames_have_no_segments(bench_of: BenchOf) -> None:
    short = ClipGeometry(num_frames=2, image_size=16, tubelet_size=2, patch_size=8)
    bench = bench_of(lambda clip: numbered(clip)[:2], {PIXELS: Pixels(short)}, short)
    with pytest.raises(ConfigError, match=r"cuts clips into 4 segments; clips of 2 frame\(s\) are too short"):
        frame_order.score(bench)


def test_one_pass_reads_every_order_and_pooling(bench_of: BenchOf) -> None:
    """The probes' tables of all poolings, each with its own figure."""
    bench = bench_of(numbered, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, cameras=("x.a", "x.b"))
    found = frame_order.score(bench)
    assert list(dict.fromkeys(one.suite for one in found)) == [
        f"frame-order/{camera}/{pooling}" for camera in "ab" for pooling in ("grid", "step", "mean")
    ]


def test_tokens_are_no_pooling_of_a_probe_that_reads_vectors() -> None:
    with pytest.raises(ConfigError, match="unknown pooling 'tokens'; known: grid, step, mean"):
        EvalSettings(poolings=("mean", "tokens"))
