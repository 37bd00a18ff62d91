"""Targets come from their provider bit for bit, and are compared in one space with what was there to see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salt_vla.cache import Encoding
from salt_vla.config import EncoderConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import explained_variance, normalise
from salt_vla.targets import (
    CachedTargets,
    PixelTargets,
    TargetSpace,
    TeacherTargets,
    dequantise,
    mean_per_position,
    nearest_context,
)
from salt_vla.teachers.pixel import EncoderTeacher

GRID = ClipGeometry(num_frames=6, image_size=32, tubelet_size=2, patch_size=8)  # 3 × 4 × 4 tokens
MODES = ("normalised", "centred", "raw")


def latents(batch: int = 4, tokens: int = 48, dim: int = 6, seed: int = 0) -> Tensor:
    """Raw latents as teachers give them: channels of unequal size, every place with a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(tokens, dim, generator=generator)
    return (torch.randn(batch, tokens, dim, generator=generator) + places) * torch.logspace(-1, 1.5, dim)


def records_of(arrays: Tensor, encoding: Encoding) -> Tensor:
    blobs = [np.frombuffer(encoding.encode(array), dtype=np.uint8) for array in arrays.numpy()]
    return torch.from_numpy(np.stack(blobs))


def frames_of(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 6, 32, 32, 3), generator=generator).byte()


def space_of(mode: str, raw: Tensor) -> TargetSpace:
    return TargetSpace(mode, mean_per_position([raw], mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(48, 6), (5, 7), (1, 3), (2, 3, 5)])
def test_dequantising_on_the_device_is_decoding(name: str, shape: tuple[int, ...]) -> None:
    encoding = Encoding(name, shape)  # type: ignore[arg-type]
    arrays = latents(4, int(np.prod(shape[:-1])), shape[-1]).reshape(4, *shape)
    records = records_of(arrays, encoding)
    expected = np.stack([encoding.decode(row.tobytes()) for row in records.numpy()])
    assert np.array_equal(dequantise(records, encoding).numpy(), expected)


@pytest.mark.parametrize("name", ["float16", "int8"])
@pytest.mark.parametrize("dim", [6, 7])
def test_records_of_a_micro_batch_decode_like_those_of_the_whole(name: str, dim: int) -> None:
    """A slice starts in the middle of the batch's bytes, at any offset."""
    encoding = Encoding(name, (5, dim))  # type: ignore[arg-type]
    records = records_of(latents(4, 5, dim), encoding)
    whole = dequantise(records, encoding)
    for start in range(4):
        assert torch.equal(dequantise(records[start : start + 1], encoding), whole[start : start + 1])


@pytest.mark.parametrize(("name", "tolerance"), [("float16", 1e-3), ("int8", 1 / 127)])
def test_cached_targets_are_the_latents_within_the_encodings_error(name: str, tolerance: float) -> None:
    encoding, raw = Encoding(name, (48, 6)), latents()  # type: ignore[arg-type]
    provider = CachedTargets(encoding)
    targets = provider.targets(frames_of(4), records_of(raw, encoding))
    assert provider.needs_records and provider.dim == 6
    assert ((targets - raw).abs() <= tolerance * raw.abs().amax(dim=-2, keepdim=True)).all()


def test_cached_targets_without_records_are_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="needs the batch's cached records"):
        CachedTargets(Encoding("float16", (48, 6))).targets(frames_of(), None)


def test_pixel_targets_are_the_tubelets_in_the_order_of_the_geometry() -> None:
    provider, frames = PixelTargets(GRID), frames_of()
    targets, pixels = provider.targets(frames, None), normalise_pixels(frames)
    assert targets.shape == (2, 48, provider.dim) and not provider.needs_records
    places = [(t, r, c) for t in range(3) for r in range(4) for c in range(4)]
    for token, (t, r, c) in enumerate(places):
        tubelet = pixels[:, :, 2 * t : 2 * t + 2, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        assert torch.equal(targets[:, token], tubelet.flatten(1))


def test_teacher_targets_are_the_teachers_latents_and_can_be_trained_on() -> None:
    """Inference-mode tensors cannot be saved for a backward pass: the provider's can."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="vit_micro", geometry=GRID, depth=1))
    teacher = EncoderTeacher(encoder, "teacher")
    provider, frames = TeacherTargets(teacher), frames_of()
    targets = provider.targets(frames, None)
    assert torch.equal(targets, teacher.latents(frames)) and provider.dim == 128
    weight = torch.ones(128, requires_grad=True)
    (targets * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_scored_space_is_layer_normalised_except_for_raw(mode: str) -> None:
    raw = latents()
    expected = raw if mode == "raw" else normalise(raw)
    assert torch.equal(space_of(mode, raw).scored(raw), expected)


@pytest.mark.parametrize("mode", MODES)
def test_trained_targets_come_back_to_the_scored_space(mode: str) -> None:
    raw = latents()
    space, ids = space_of(mode, raw), torch.tensor([[5, 0, 47], [1, 2, 3], [9, 9, 9], [47, 46, 0]])
    scored = space.scored(raw)
    picked = torch.stack([row[i] for row, i in zip(scored, ids, strict=True)])
    trained = space.trained(scored, ids)
    torch.testing.assert_close(space.to_scored(trained, ids), picked, atol=1e-6, rtol=1e-6)
    if mode != "centred":
        assert torch.equal(trained, picked)


def test_centred_targets_have_no_mean_left_at_any_place() -> None:
    raw = latents(64)
    space, ids = space_of("centred", raw), torch.arange(48).expand(64, -1)
    means = space.trained(space.scored(raw), ids).mean(dim=0)
    assert means.abs().max() < 1e-6 < space.position_mean.abs().max()


def test_predicting_nothing_in_centred_space_is_the_place_mean_baseline() -> None:
    raw, ids = latents(), torch.arange(48).expand(4, -1)
    space = space_of("centred", raw)
    predicted = space.to_scored(torch.zeros(4, 48, 6), ids)
    assert explained_variance(predicted, space.scored(raw), space.position_mean).item() == pytest.approx(0)


def test_to_scored_is_float32_from_bfloat16_predictions() -> None:
    space = space_of("centred", latents())
    assert space.to_scored(torch.zeros(1, 2, 6).bfloat16(), torch.tensor([[0, 1]])).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_mean_per_position_is_the_mean_over_all_clips_whatever_their_batches(mode: str) -> None:
    raw = latents(10)
    expected = (raw if mode == "raw" else normalise(raw)).double().mean(dim=0).float()
    for sizes in ([10], [4, 4, 2], [1] * 10):
        torch.testing.assert_close(mean_per_position(raw.split(sizes), mode), expected)


def test_channel_mean_is_the_mean_over_clips_and_places() -> None:
    raw = latents()
    torch.testing.assert_close(space_of("raw", raw).channel_mean, raw.mean(dim=(0, 1)))


def test_mean_of_no_batches_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="no batch"):
        mean_per_position([], "raw")


def place(token: int, geometry: ClipGeometry) -> tuple[int, int, int]:
    _, rows, columns = geometry.token_grid
    return token // (rows * columns), token // columns % rows, token % columns


def brute_force_distance(a: int, b: int, geometry: ClipGeometry) -> tuple[int, int]:
    """(squared distance in space, distance in time): compared in this order."""
    (t, r, c), (u, s, d) = place(a, geometry), place(b, geometry)
    return (r - s) ** 2 + (c - d) ** 2, abs(t - u)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 5),
    side=st.integers(1, 5),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**16),
)
def test_nearest_context_is_the_nearest_by_brute_force(
    steps: int, side: int, share: float, seed: int
) -> None:
    geometry = ClipGeometry(num_frames=steps, image_size=side, tubelet_size=1, patch_size=1)
    count = geometry.num_tokens
    visible = min(max(1, round(share * count)), count)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    context, targets = rows[:, :visible], rows[:, visible:]
    chosen = nearest_context(context, targets, geometry)
    assert chosen.shape == targets.shape
    for seen, asked, answers in zip(context.tolist(), targets.tolist(), chosen.tolist(), strict=True):
        for target, answer in zip(asked, answers, strict=True):
            best = min(brute_force_distance(target, token, geometry) for token in seen)
            assert answer in seen and brute_force_distance(target, answer, geometry) == best


def test_same_place_at_another_time_is_nearer_than_the_neighbour_now() -> None:
    context = torch.tensor([[0, 33]])  # (0, row 0, column 0) and (2, row 0, column 1)
    assert nearest_context(context, torch.tensor([[32, 1]]), GRID).tolist() == [[0, 33]]


def test_padding_is_never_the_nearest() -> None:
    """A padded entry repeats whatever id, even the target's own, which would be copying the answer."""
    context, targets = torch.tensor([[7, 20, 20], [7, 9, 9]]), torch.tensor([[20], [9]])
    valid = torch.tensor([[True, False, False], [True, True, True]])
    assert nearest_context(context, targets, GRID, valid).tolist() == [[7], [9]]
