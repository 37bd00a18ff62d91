"""Photometric augmentation: known values, the student's pixels alone, the same in micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, PhotometricConfig, PredictorConfig, TrainConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import BlockSpec, MultiBlockMasks
from salt_vla.models.photometric import jittered
from salt_vla.models.pixels import normalise_pixels
from salt_vla.targets import FrozenTargets, TargetSpace, Task
from salt_vla.training.learner import build_learner
from salt_vla.training.step import forward, train_step

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
ALL = PhotometricConfig(brightness=0.4, contrast=0.4, saturation=0.4)
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    batch_size=6,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32"))
JITTERED = replace(CONFIG, data=replace(CONFIG.data, photometric=ALL))


def frames_of(size: int = 2) -> Tensor:
    return torch.randint(0, 256, (size, 4, 32, 32, 3), generator=torch.Generator().manual_seed(1)).byte()


def one_pixel(*colours: tuple[int, int, int]) -> Tensor:
    """A clip of one frame of as many pixels as there are colours."""
    return torch.tensor(colours, dtype=torch.uint8).view(1, 1, 1, -1, 3)


@pytest.mark.parametrize(
    ("strengths", "drawn", "expected"),
    [
        (PhotometricConfig(brightness=0.5), 1.0, [[150.0, 75.0, 255.0], [15.0, 30.0, 45.0]]),
        (PhotometricConfig(brightness=0.5), -1.0, [[50.0, 25.0, 100.0], [5.0, 10.0, 15.0]]),
        # Grey of the pixels: 0.299·100 + 0.587·50 + 0.114·200 = 82.05 and 18.15; of the clip: 50.1.
        (PhotometricConfig(contrast=0.5), -1.0, [[75.05, 50.05, 125.05], [30.05, 35.05, 40.05]]),
        (PhotometricConfig(saturation=0.5), -1.0, [[91.025, 66.025, 141.025], [14.075, 19.075, 24.075]]),
        (PhotometricConfig(saturation=0.5), 1.0, [[108.975, 33.975, 255.0], [5.925, 20.925, 35.925]]),
    ],
)
def test_each_change_is_what_it_says(strengths, drawn, expected):
    pixels = one_pixel((100, 50, 200), (10, 20, 30))
    changed = jittered(pixels, torch.full((1, 3), drawn), strengths)
    torch.testing.assert_close(changed.view(2, 3), torch.tensor(expected), atol=1e-3, rtol=0)
    assert pixels.flatten()[0] == 100


@settings(max_examples=30, deadline=None)
@given(drawn=st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6))
def test_pixels_stay_pixels_and_clips_do_not_touch_each_other(drawn):
    jitter = torch.tensor(drawn).view(2, 3)
    changed = jittered(frames_of(), jitter, ALL)
    assert changed.dtype == torch.float32 and changed.min() >= 0 and changed.max() <= 255
    for row in range(2):
        alone = jittered(frames_of()[row : row + 1], jitter[row : row + 1], ALL)
        torch.testing.assert_close(alone, changed[row : row + 1])


def test_nothing_drawn_or_no_strength_changes_nothing():
    frames = frames_of()
    assert jittered(frames, None, ALL) is frames
    assert torch.equal(jittered(frames, torch.zeros(2, 3), ALL), frames.float())
    assert torch.equal(jittered(frames, torch.ones(2, 3), PhotometricConfig()), frames.float())
    same = jittered(frames, torch.zeros(2, 3), ALL)
    torch.testing.assert_close(normalise_pixels(same), normalise_pixels(frames))


def test_changes_are_of_a_whole_clip():
    """A frame that is the same in the file is the same afterwards: no flicker that targets do not have."""
    frames = frames_of().clone()
    frames[:, 2] = frames[:, 0]
    changed = jittered(frames, torch.tensor([[0.5, -0.7, 0.9], [-0.1, 0.3, -1.0]]), ALL)
    assert torch.equal(changed[:, 2], changed[:, 0]) and not torch.equal(changed, frames.float())


class Seen(FrozenTargets):
    """Targets that keep what they were asked for."""

    dim = 8
    needs_records = False

    def __init__(self) -> None:
        self.frames: list[Tensor] = []

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        self.frames.append(frames.clone())
        return frames.float().mean(dim=(1, 2, 3, 4))[:, None, None] * torch.ones(1, GRID.num_tokens, 8)


def batch_of(jitter: bool) -> Batch:
    drawn = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    masks = MultiBlockMasks(GRID, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)]).sample(6)
    keys = [(f"clip{n}", 0) for n in range(6)]
    return Batch(keys, frames_of(6), None, masks, jitter=drawn if jitter else None)


def task_of(provider: Seen) -> Task:
    return Task(provider, TargetSpace("raw", torch.zeros(GRID.num_tokens, 8)))


def test_the_student_sees_changed_pixels_and_targets_do_not():
    provider = Seen()
    learner = build_learner(JITTERED, 8, "cpu")
    inputs: list[Tensor] = []
    learner.networks.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    for jitter in (False, True):
        forward(learner, batch_of(jitter), task_of(provider), JITTERED, 0)
    assert torch.equal(provider.frames[0], provider.frames[1])
    assert provider.frames[1].dtype == torch.uint8
    difference = (inputs[1] - inputs[0]).abs().mean(dim=(1, 2))
    assert (difference > 0.02).all()


def test_micro_batches_see_the_same_changes():
    rows = []
    for parts in (1, 3):
        learner = build_learner(JITTERED, 8, "cpu")
        config = replace(JITTERED, grad_accum_steps=parts)
        rows.append(train_step(learner, batch_of(True), task_of(Seen()), config, 0))
    plain = train_step(build_learner(CONFIG, 8, "cpu"), batch_of(False), task_of(Seen()), CONFIG, 0)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert rows[0]["loss"] != plain["loss"]


def test_strengths_are_checked_and_say_whether_there_are_any():
    assert not PhotometricConfig() and PhotometricConfig(saturation=0.1)
    with pytest.raises(ConfigError, match=r"data\.photometric\.contrast must lie in \[0, 1\), not 1"):
        PhotometricConfig(contrast=1)
