"""Pooled features are the averages they claim to be, in clip order, however the clips are batched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.features import (
    CONSTANT,
    PIXELS,
    POOLINGS,
    extract_features,
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


def batched(frames: Tensor, order: list[int], size: int) -> Iterator[tuple[list[int], Tensor]]:
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, frames[rows]


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
    mean, step, grid = (pool_tokens(tokens, GEOMETRY, pooling) for pooling in POOLINGS)
    assert torch.allclose(grid.reshape(3, 2, 4, 5).mean(2).flatten(1), step, atol=1e-6)
    assert torch.allclose(step.reshape(3, 2, 5).mean(1), mean, atol=1e-6)


def test_an_unknown_pooling_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'max'; known: mean, step, grid"):
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


def test_features_are_in_clip_order_however_the_clips_come() -> None:
    frames = films()
    straight = extract_features({"means": PatchMeans()}, batched(frames, list(range(CLIPS)), 3), CLIPS)
    shuffled = extract_features({"means": PatchMeans()}, batched(frames, [4, 0, 6, 2, 5, 1, 3], 2), CLIPS)
    for pooling in POOLINGS:
        for encoder in ("means", PIXELS):
            assert np.array_equal(straight[pooling][encoder], shuffled[pooling][encoder])
    by_hand = frames.double().mean((1, 2, 3)).numpy()
    assert np.allclose(straight["mean"]["means"], by_hand, rtol=1e-6)


def test_extraction_is_deterministic_and_float32() -> None:
    once, again = (
        extract_features({"means": PatchMeans()}, batched(films(), list(range(CLIPS)), 4), CLIPS)
        for _ in range(2)
    )
    for pooling in POOLINGS:
        for encoder, values in once[pooling].items():
            assert values.dtype == np.float32
            assert np.array_equal(values, again[pooling][encoder])


def test_every_pooling_holds_the_models_the_pixels_and_the_constant() -> None:
    models = {"one": PatchMeans(), "two": PatchMeans(repeats=2)}
    table = extract_features(
        models, batched(films(), list(range(CLIPS)), 4), CLIPS, poolings=("mean", "grid")
    )
    assert list(table) == ["mean", "grid"]
    for by_encoder in table.values():
        assert set(by_encoder) == {"one", "two", PIXELS, CONSTANT}
        assert by_encoder[CONSTANT].shape == (CLIPS, 0)
        assert by_encoder["two"].shape[1] == 2 * by_encoder["one"].shape[1]
    assert table["mean"][PIXELS] is table["grid"][PIXELS]


def test_one_pass_over_the_frames_serves_every_model() -> None:
    passes = []

    def counted() -> Iterator[tuple[list[int], Tensor]]:
        passes.append(1)
        yield from batched(films(), list(range(CLIPS)), 4)

    extract_features({"one": PatchMeans(), "two": PatchMeans(repeats=2)}, counted(), CLIPS)
    assert len(passes) == 1


def test_numpy_frames_give_the_same_features() -> None:
    frames = films()
    from_torch = extract_features({"m": PatchMeans()}, [(range(CLIPS), frames)], CLIPS)
    from_numpy = extract_features({"m": PatchMeans()}, [(np.arange(CLIPS), frames.numpy())], CLIPS)
    assert np.array_equal(from_torch["grid"]["m"], from_numpy["grid"]["m"])


def test_features_carry_no_gradient_graph() -> None:
    class Learned(PatchMeans):
        weight = torch.nn.Parameter(torch.ones(3))

        def latents(self, frames: Tensor) -> Tensor:
            tokens = super().latents(frames) * self.weight
            assert not tokens.requires_grad
            return tokens

    extract_features({"learned": Learned()}, batched(films(), list(range(CLIPS)), 4), CLIPS)


def test_a_missing_or_repeated_clip_is_named() -> None:
    with pytest.raises(DataError, match="clip 6 of 7 came 0 times"):
        extract_features({}, batched(films(), list(range(6)), 3), CLIPS)
    with pytest.raises(DataError, match="clip 2 of 7 came 2 times"):
        extract_features({}, batched(films(), [0, 1, 2, 2, 3, 4, 5, 6], 3), CLIPS)
    with pytest.raises(DataError, match="do not lie within 0 … 6"):
        extract_features({}, [([7], films()[:1])], CLIPS)


def test_a_model_of_another_geometry_is_named_with_both_shapes() -> None:
    other = PatchMeans(ClipGeometry(num_frames=8, image_size=24, tubelet_size=2, patch_size=4))
    with pytest.raises(DataError, match=r"'other' reads clips of 8 frames of 24×24.*given 4 frames"):
        extract_features({"other": other}, batched(films(), list(range(CLIPS)), 4), CLIPS)


def test_latents_that_do_not_fit_the_geometry_are_refused() -> None:
    with pytest.raises(DataError, match=r"'broken' gave latents of shape \(4, 71, 3\)"):
        extract_features({"broken": BrokenShape()}, batched(films(), list(range(CLIPS)), 4), CLIPS)


def test_frames_must_be_uint8_clips_with_their_indices() -> None:
    with pytest.raises(DataError, match=r"must be uint8 .* not torch\.float32"):
        extract_features({}, [(range(CLIPS), films().float())], CLIPS)
    with pytest.raises(DataError, match="3 clip indices came with 7 clips"):
        extract_features({}, [(range(3), films())], CLIPS)


@pytest.mark.parametrize("name", [PIXELS, CONSTANT])
def test_an_encoder_may_not_take_a_baselines_name(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a baseline"):
        extract_features({name: PatchMeans()}, [], 0)
