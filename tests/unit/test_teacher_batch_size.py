"""The largest batch is found by running batches, below the limit that was given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import ResourceError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder
from salt_vla.teachers.batch_size import largest_batch
from salt_vla.teachers.pixel import EncoderTeacher

MB = 10**6


class Hungry(EncoderTeacher):
    """Takes a known number of bytes a clip while it works, and remembers the batches it was given."""

    bytes_a_clip = 40 * MB
    most = 1024

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen.append(len(pixels))
        if len(pixels) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate a lot")
        meal = torch.ones(len(pixels) * self.bytes_a_clip, dtype=torch.uint8)
        return super().encode(pixels) + 0 * meal[:1]


@pytest.fixture
def teacher() -> Hungry:
    geometry = ClipGeometry(num_frames=2, image_size=16, tubelet_size=2, patch_size=8)
    made = Hungry(build_encoder(EncoderConfig(name="vit_micro", geometry=geometry, depth=1)), "hungry")
    made.seen = []
    return made


@pytest.mark.parametrize(("limit", "batch"), [(60 * MB, 1), (100 * MB, 2), (220 * MB, 4), (420 * MB, 8)])
def test_the_batch_is_the_largest_power_of_two_below_the_limit(
    limit: int, batch: int, teacher: Hungry
) -> None:
    assert largest_batch(teacher, limit) == batch


def test_memory_that_earlier_work_left_behind_is_no_free_meal(teacher: Hungry) -> None:
    """Blocks below the size that the C library maps on its own stay resident when they are freed."""
    blocks = [torch.ones(20 * MB, dtype=torch.uint8) for _ in range(12)]
    pins = [torch.ones(1000, dtype=torch.uint8) for _ in range(12)]
    del blocks
    assert largest_batch(teacher, 100 * MB) == 2
    del pins


def test_a_batch_that_would_not_fit_is_not_tried(teacher: Hungry) -> None:
    largest_batch(teacher, 220 * MB)
    assert max(teacher.seen) == 4


def test_the_end_of_memory_ends_the_search(teacher: Hungry) -> None:
    teacher.most = 2
    assert largest_batch(teacher, 10**12) == 2


def test_another_error_is_not_taken_for_the_end_of_memory(teacher: Hungry) -> None:
    teacher.bytes_a_clip = -1
    with pytest.raises(RuntimeError, match="negative dimension"):
        largest_batch(teacher, 10**12)


def test_a_limit_below_one_clip_is_a_sentence(teacher: Hungry) -> None:
    with pytest.raises(
        ResourceError, match=r"one clip of .* needs more than 10 MB with teacher hungry/block1/norm"
    ):
        largest_batch(teacher, 10 * MB)


def test_without_a_limit_it_is_a_share_of_what_is_free(
    teacher: Hungry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_vla.teachers.batch_size.CPU_SHARE", 0)
    with pytest.raises(ResourceError, match="needs more than 0 MB"):
        largest_batch(teacher)
    monkeypatch.setattr("salt_vla.teachers.batch_size.MAX_BATCH", 2)
    monkeypatch.setattr("salt_vla.teachers.batch_size.CPU_SHARE", 0.9)
    assert largest_batch(teacher) == 2
