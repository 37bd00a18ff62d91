"""Pooled features are the averages they claim to be, in clip order, however the clips are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.features import (
    PIXELS,
    POOLINGS,
    TOKENS,
    Pixels,
    Reading,
    features_of,
    pixel_features,
    pool_tokens,
)
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=4, image_size=24, tubelet_size=2, patch_size=4)  # grid (2, 6, 6)
CLIPS = 7


class PatchMeans:
    """A token model without parameters: each token is its tubelet's mean colour, once per `repeats`."""

    def __init__(self, geometry: ClipGeometry = GEOMETRY, repeats: int = 1) -> None:
        self.geometry = geometry
        self.dim = 3 * repeats
        self.repeats = repeats
        self.fingerprint = f"means {geometry} {repeats}"

    def latents(self, frames: Tensor) -> Tensor:
        steps, rows, columns = self.geometry.token_grid
        batch = len(frames)
        cut = frames.double().reshape(
            batch, steps, self.geometry.tubelet_size, rows, self.geometry.patch_size, columns, -1, 3
        )
        tokens = cut.mean((2, 4, 6)).reshape(batch, steps * rows * columns, 3)
        return tokens.repeat(1, 1, self.repeats)


class BrokenShape(PatchMeans):
    def latents(self, frames: Tensor) -> Tensor:
        return super().latents(frames)[:, 1:]


def films(geometry: ClipGeometry = GEOMETRY, clips: int = CLIPS) -> Tensor:
    shape = (clips, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def tokens_by_place(geometry: ClipGeometry) -> Tensor:
    """One clip whose token at (t, r, c) is the vector (t, r, c)."""
    steps, rows, columns = geometry.token_grid
    axes = (torch.arange(steps), torch.arange(rows), torch.arange(columns))
    return torch.cartesian_prod(*axes).float()[None]


@pytest.mark.parametrize(("pooling", "size"), [("mean", 3), ("step", 2 * 3), ("grid", 2 * 4 * 3)])
def test_each_pooling_has_its_size(pooling: str, size: int) -> None:
    assert pool_tokens(tokens_by_place(GEOMETRY), GEOMETRY, pooling).shape == (1, size)


def test_mean_pooling_averages_every_token() -> None:
    assert pool_tokens(tokens_by_place(GEOMETRY), GEOMETRY, "mean").tolist() == [[0.5, 2.5, 2.5]]


def test_step_pooling_keeps_time_in_order() -> None:
    assert pool_tokens(tokens_by_place(GEOMETRY), GEOMETRY, "step").tolist() == [
        [0.0, 2.5, 2.5, 1.0, 2.5, 2.5]
    ]


def test_grid_pooling_keeps_quarters_in_order_of_time_row_column() -> None:
    pooled = pool_tokens(tokens_by_place(GEOMETRY), GEOMETRY, "grid").reshape(2, 2, 2, 3)
    for step in range(2):
        for row, row_mean in enumerate((1.0, 4.0)):
            for column, column_mean in enumerate((1.0, 4.0)):
                assert pooled[step, row, column].tolist() == [step, row_mean, column_mean]


def test_an_odd_side_shares_its_middle_row_between_quarters() -> None:
    odd = ClipGeometry(num_frames=2, image_size=20, tubelet_size=2, patch_size=4)  # grid (1, 5, 5)
    pooled = pool_tokens(tokens_by_place(odd), odd, "grid").reshape(2, 2, 3)
    assert pooled[0, 0].tolist() == [0.0, 1.0, 1.0]
    assert pooled[1, 1].tolist() == [0.0, 3.0, 3.0]


def test_a_side_of_one_token_is_not_split() -> None:
    single = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=16)  # grid (2, 1, 1)
    tokens = tokens_by_place(single)
    assert pool_tokens(tokens, single, "grid").shape == (1, 2 * 3)
    assert torch.equal(pool_tokens(tokens, single, "grid"), pool_tokens(tokens, single, "step"))


def test_the_quarters_average_to_the_step_and_the_steps_to_the_mean() -> None:
    tokens = torch.randn(3, GEOMETRY.num_tokens, 5, generator=torch.Generator().manual_seed(1))
    grid, step, mean = (pool_tokens(tokens, GEOMETRY, pooling) for pooling in POOLINGS)
    assert torch.allclose(grid.reshape(3, 2, 4, 5).mean(2).flatten(1), step, atol=1e-6)
    assert torch.allclose(step.reshape(3, 2, 5).mean(1), mean, atol=1e-6)


def test_an_unknown_pooling_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'max'; known: grid, step, mean"):
        pool_tokens(tokens_by_place(GEOMETRY), GEOMETRY, "max")


def test_pixels_are_area_averages_in_zero_to_one() -> None:
    frames = films(ClipGeometry(num_frames=2, image_size=32, tubelet_size=2, patch_size=16))
    features = pixel_features(frames).reshape(CLIPS, 2, 16, 16, 3)
    blocks = frames.double().reshape(CLIPS, 2, 16, 2, 16, 2, 3).mean((3, 5)) / 255
    assert torch.allclose(features.double(), blocks, atol=1e-6)
    assert features.min() >= 0 and features.max() <= 1


def test_images_smaller_than_the_pixel_baseline_are_kept_whole() -> None:
    frames = films(ClipGeometry(num_frames=2, image_size=8, tubelet_size=2, patch_size=4))
    assert pixel_features(frames).shape == (CLIPS, 2 * 8 * 8 * 3)


def test_features_are_the_averages_of_the_clips_in_their_order() -> None:
    frames = films()
    found = features_of("means", PatchMeans(), frames, [Reading("mean"), Reading("tokens")])
    assert np.allclose(found[Reading("mean")], frames.double().mean((1, 2, 3)).numpy(), rtol=1e-6)
    assert found[Reading("tokens")].shape == (CLIPS, GEOMETRY.num_tokens, 3)
    assert all(values.dtype == np.float32 for values in found.values())


def test_reversed_frames_are_what_the_encoder_sees() -> None:
    frames = films()
    both = [Reading("step"), Reading("step", "reversed")]
    found = features_of("means", PatchMeans(), frames, both)
    forward = features_of("means", PatchMeans(), frames.flip(1), both[:1])
    assert np.array_equal(found[both[1]], forward[both[0]])
    assert not np.array_equal(found[both[0]], found[both[1]])


def test_the_network_runs_once_an_order_of_frames() -> None:
    runs = []

    class Counting(PatchMeans):
        def latents(self, frames: Tensor) -> Tensor:
            runs.append(len(frames))
            return super().latents(frames)

    readings = [Reading("mean"), Reading("step"), Reading("mean", "reversed")]
    assert set(features_of("one", Counting(), films(), readings)) == set(readings)
    assert len(runs) == 2


def test_pixels_as_tokens_are_patches_in_token_order() -> None:
    geometry = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=8)
    pixels = Pixels(geometry)
    frames = films(geometry)
    tokens = pixels.latents(frames)
    assert tokens.shape == (CLIPS, 8, pixels.dim)
    patch = frames[:, 2:4, :8, 8:].double().reshape(CLIPS, 2, 4, 2, 4, 2, 3).mean((3, 5)) / 255
    assert torch.allclose(tokens[:, 5].double(), patch.flatten(1), atol=1e-6)


def test_pixels_as_tokens_of_a_probe_know_their_places() -> None:
    """Attention has no order: a patch that does not say where it is would be a weaker baseline."""
    pixels = Pixels(GEOMETRY)
    kept = features_of(PIXELS, pixels, films(), [Reading(TOKENS)])[Reading(TOKENS)]
    assert kept.shape == (CLIPS, GEOMETRY.num_tokens, pixels.dim + 3)
    assert np.array_equal(kept[..., :-3], pixels.latents(films()).numpy())
    steps, rows, columns = GEOMETRY.token_grid
    token = 1 * rows * columns + 4 * columns + 2
    assert np.allclose(kept[:, token, -3:], [1.5 / steps, 4.5 / rows, 2.5 / columns])


def test_pixels_under_a_pooling_lose_neither_time_nor_place() -> None:
    found = features_of(PIXELS, Pixels(GEOMETRY), films(), [Reading("mean"), Reading("grid")])
    for values in found.values():
        assert np.array_equal(values, pixel_features(films()).numpy())


def test_features_carry_no_gradient_graph() -> None:
    class Learned(PatchMeans):
        weight = torch.nn.Parameter(torch.ones(3))

        def latents(self, frames: Tensor) -> Tensor:
            tokens = super().latents(frames) * self.weight
            assert not tokens.requires_grad
            return tokens

    assert features_of("learned", Learned(), films(), [Reading("mean")])


def test_a_model_of_another_geometry_is_named_with_both_shapes() -> None:
    other = PatchMeans(ClipGeometry(num_frames=8, image_size=24, tubelet_size=2, patch_size=4))
    with pytest.raises(DataError, match=r"'other' reads clips of 8 frames of 24×24.*given 4 frames"):
        features_of("other", other, films(), [Reading()])


def test_latents_that_do_not_fit_the_geometry_are_refused() -> None:
    with pytest.raises(DataError, match=r"'broken' gave latents of shape \(7, 71, 3\)"):
        features_of("broken", BrokenShape(), films(), [Reading()])


def test_an_unknown_reading_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown order of frames 'shaken'; known: forward, reversed"):
        Reading("mean", "shaken")
    with pytest.raises(ConfigError, match=r"unknown pooling 'max'; known: grid, step, mean, tokens"):
        Reading("max")
