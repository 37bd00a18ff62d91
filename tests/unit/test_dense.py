"""Positions at each time step: which frames a step is asked for, and that its own tokens alone answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import Clip
from salt_vla.data.signals import ClipSignals
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.features import Pixels, Reading, features_of
from salt_vla.evaluation.results import PIXELS
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.suites import dense
from salt_vla.geometry import ClipGeometry

STATE, WORLD = "observation.state", "observation.environment_state"
GEOMETRY = ClipGeometry(num_frames=8, image_size=64, tubelet_size=2, patch_size=16)


def signals(**values: np.ndarray) -> ClipSignals:
    clips = len(next(iter(values.values())))
    names = {"state": STATE, "world": WORLD}
    return ClipSignals(
        tuple(f"clip{n}" for n in range(clips)),
        np.arange(clips),
        ("t",) * clips,
        10.0,
        {names[name]: array.astype(np.float32) for name, array in values.items()},
    )


def test_a_step_is_asked_for_the_mean_over_its_frames() -> None:
    """Clips of 4 frames, two file frames apart, two a step; x of the hand is the file frame."""
    state = np.zeros((2, 7, 4))
    state[..., 0] = np.arange(7)
    state[1] += 100
    found = dense.positions(signals(state=state), [0, 2, 4, 6], steps=2)
    assert list(found) == ["hand"]
    assert found["hand"][:, 0].tolist() == [1.0, 5.0, 101.0, 105.0]
    assert found["hand"][:, 1].tolist() == [0, 0, 100, 100]


def test_every_object_is_read_from_its_own_columns() -> None:
    world = np.broadcast_to(np.arange(9.0), (1, 2, 9))
    found = dense.positions(signals(world=world), [0, 1], steps=1)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "object": [[0, 1, 2]],
        "second_object": [[3, 4, 5]],
        "goal": [[6, 7, 8]],
    }


def test_other_widths_mean_other_things() -> None:
    with pytest.raises(DataError, match=r"dense needs positions as metaworld-mini records them.*observation"):
        dense.positions(signals(state=np.zeros((1, 2, 6)), world=np.zeros((1, 2, 3))), [0, 1], 1)


def test_a_position_that_is_no_number_names_the_clip() -> None:
    state = np.zeros((3, 2, 4))
    state[1, 0, 2] = np.nan
    with pytest.raises(
        DataError, match=r"'observation.state' of clip clip1 holds a value that is not a number"
    ):
        dense.positions(signals(state=state), [0, 1], 1)


@pytest.mark.parametrize("pooling", ["grid", "step", "tokens"])
def test_a_steps_features_are_its_own(pooling: str) -> None:
    """Another last step changes the features of that step and of no other."""
    random = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (3, 8, 64, 64, 3), generator=random, dtype=torch.uint8)
    changed = clips.clone()
    changed[:, 6:] = 255 - changed[:, 6:]
    reading = Reading(pooling)
    before, after = (
        dense.by_step(features_of("p", Pixels(GEOMETRY), frames, [reading])[reading], 4).reshape(3, 4, -1)
        for frames in (clips, changed)
    )
    assert np.array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3] != after[:, 3]).any(1).all()


class Recorded(Bench):
    """Every clip's hand moves as the light in its film does: x at file frame n is what frame n shows."""

    def signals(self, side: Side) -> ClipSignals:
        clips = side.clips.clips()
        state = np.zeros((len(clips), GEOMETRY.num_frames, 4))
        state[..., 0] = [light(clip) for clip in clips]
        return replace(signals(state=state), episodes=side.episodes)


def light(clip: Clip) -> np.ndarray:
    random = np.random.default_rng([clip.episode, clip.first_frame])
    return random.integers(0, 256, GEOMETRY.num_frames)


def lit(clip: Clip) -> np.ndarray:
    return np.broadcast_to(light(clip)[:, None, None, None], (8, 64, 64, 3)).astype(np.uint8)


class Blind:
    geometry, dim, fingerprint = GEOMETRY, 2, "blind"

    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(frames), GEOMETRY.num_tokens, 2)


@pytest.fixture
def bench(bench_of: Callable[..., Bench]) -> Bench:
    encoders = {"seeing": Pixels(GEOMETRY), "blind": Blind()}
    settings = EvalSettings(poolings=("step", "mean"))
    made = bench_of(lit, encoders, GEOMETRY, episodes=40, settings=settings)
    data = DataConfig(view=ViewConfig(frame_stride=1))
    return Recorded(**{f.name: getattr(made, f.name) for f in fields(made)} | {"data": data})


def test_every_time_step_is_an_item_read_from_what_it_shows(bench: Bench) -> None:
    found = {one.encoder: one for one in dense.score(bench)}
    one = found["seeing"]
    assert {(each.suite, each.target) for each in found.values()} == {("dense/a/step", "hand")}
    assert one.sums.clips.tolist() == [2.0 * 4] * 20 and one.sums.episodes.tolist() == list(range(1, 40, 2))
    assert (one.sums.metric, one.causal, one.sums.left_out) == ("r2", False, (1, 2)), "y and z never change"
    assert one.sums.value > 0.99
    assert (
        found["blind"].sums.value == pytest.approx(found["constant"].sums.value)
        and found["blind"].sums.value <= 0
    )


def test_poolings_without_time_are_a_sentence(bench: Bench) -> None:
    with pytest.raises(DataError, match="needs one of the poolings grid, step"):
        dense.score(replace(bench, settings=EvalSettings(poolings=("mean",))))


def test_data_without_positions_are_a_sentence(bench_of: Callable[..., Any]) -> None:
    small = ClipGeometry(num_frames=2, image_size=8, tubelet_size=2, patch_size=4)
    nothing = bench_of(lambda clip: np.zeros((2, 8, 8, 3), np.uint8), {PIXELS: Pixels(small)}, small)
    with pytest.raises(DataError, match="probes read recorded signals"):
        dense.score(nothing)
