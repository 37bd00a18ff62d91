"""Film strips: patches into frames and back, what is darkened, striped, pasted and coloured."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import patchify as model_patchify
from salt_vla.models.pixels import MEAN, STD, normalise_pixels
from salt_vla.objectives import normalise
from salt_vla.reports.patches import enlarge, paste_predictions, patchify, token_map, unpatchify
from salt_vla.reports.sheets import (
    MOST_COLUMNS,
    Layout,
    ShownTokens,
    layout_of,
    mask_sheet,
    pca_sheet,
    pca_strip,
    principal_colours,
    reconstruction_sheet,
)

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = (MEAN, STD)
ALL_IDS = np.arange(GEOMETRY.num_tokens)


@pytest.fixture
def frames() -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(60, 200, (4, 32, 32, 3)).astype(np.uint8)


def perfect(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a model without error would predict: the objective's own targets."""
    return normalise(model_patchify(normalise_pixels(torch.from_numpy(frames)[None]), GEOMETRY))[0].numpy()


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def tile(sheet: NDArray[np.uint8], layout: Layout, row: int, column: int) -> NDArray[np.uint8]:
    top, left = layout.corner(row, column)
    return sheet[top : top + layout.tile, left : left + layout.tile, :3]


def test_patches_are_ordered_as_the_models_order_them(frames: NDArray[np.uint8]) -> None:
    pixels = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None]
    assert np.array_equal(
        patchify(frames.astype(np.float32), GEOMETRY), model_patchify(pixels, GEOMETRY)[0].numpy()
    )


def test_unpatchify_undoes_patchify(frames: NDArray[np.uint8]) -> None:
    there = patchify(frames.astype(np.float32), GEOMETRY)
    assert there.shape == (GEOMETRY.num_tokens, GEOMETRY.patch_dim)
    assert np.array_equal(unpatchify(there, GEOMETRY), frames)


def test_a_token_map_is_true_on_the_pixels_of_its_tokens() -> None:
    where = token_map(np.array([0, 16 + 5]), GEOMETRY)
    assert where.shape == (2, 32, 32) and where.sum() == 2 * 64
    assert where[0, :8, :8].all() and where[1, 8:16, 8:16].all()


def test_a_perfect_prediction_gives_the_film_back(frames: NDArray[np.uint8]) -> None:
    pasted = paste_predictions(frames, perfect(frames), ALL_IDS, GEOMETRY, *IMAGENET)
    assert np.abs(pasted.astype(int) - frames).max() <= 1


def test_predictions_are_pasted_at_their_tokens_and_nowhere_else(frames: NDArray[np.uint8]) -> None:
    ids = np.array([3, 17, 30])
    flat = np.zeros((3, GEOMETRY.patch_dim), np.float32)
    pasted = paste_predictions(frames, flat, ids, GEOMETRY, *PLAIN)
    hidden = token_map(ids, GEOMETRY).repeat(GEOMETRY.tubelet_size, axis=0)
    assert np.array_equal(pasted[~hidden], frames[~hidden])
    first = pasted[:2, :8, 24:]
    assert np.ptp(first) == 0, "nothing but the tubelet's mean is known of a flat prediction"
    assert abs(int(first[0, 0, 0, 0]) - frames[:2, :8, 24:].mean()) <= 1


def test_a_wild_prediction_stays_within_what_a_pixel_can_be(frames: NDArray[np.uint8]) -> None:
    wild = np.full((GEOMETRY.num_tokens, GEOMETRY.patch_dim), 1e6, np.float32)
    assert (paste_predictions(frames, wild, ALL_IDS, GEOMETRY, *PLAIN) == 255).all()


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (4, 16, 32, 3), (4, 32, 32), (4, 3, 32, 32)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected uint8 frames of shape \(4, 32, 32, 3\)"):
        mask_sheet(np.zeros(shape, np.uint8), [], GEOMETRY)


def test_frames_that_are_not_bytes_are_refused(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match="float64"):
        pca_strip(frames / 255, {}, GEOMETRY)


def test_predictions_of_another_length_are_refused(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match=r"expected predictions of shape \(2, 384\)"):
        reconstruction_sheet(frames, np.zeros((3, 384), np.float32), np.array([0, 1]), GEOMETRY, *PLAIN)


def test_a_mask_sheet_darkens_targets_stripes_the_dropped_and_leaves_the_context(
    frames: NDArray[np.uint8],
) -> None:
    target, context = np.arange(0, 8), np.arange(8, 24)
    sheet = decoded(mask_sheet(frames, [(context, target)], GEOMETRY))
    layout = layout_of(GEOMETRY, 2, legend=True)
    assert sheet.shape[:2] == (layout.height, layout.width)
    half = layout.tile // 2
    original, masked = tile(sheet, layout, 0, 0), tile(sheet, layout, 1, 0)
    assert masked[:half].mean() < 0.5 * original[:half].mean(), "the upper half is hidden"
    assert np.array_equal(masked[half:], original[half:]), "the lower half is seen"
    before, after = tile(sheet, layout, 0, 1), tile(sheet, layout, 1, 1)
    assert np.array_equal(after[:half], before[:half])
    dropped = after[half:].astype(int)
    amber = dropped[..., 0] - dropped[..., 2] > 60
    assert 0.2 < amber.mean() < 0.5, "stripes of amber"
    assert np.ptp(dropped[~amber], axis=-1).max() <= 1, "and grey between them"


def test_a_mask_shows_on_black_film(frames: NDArray[np.uint8]) -> None:
    black = np.zeros_like(frames)
    sheet = decoded(mask_sheet(black, [(ALL_IDS[16:], ALL_IDS[:16])], GEOMETRY))
    hidden = tile(sheet, layout_of(GEOMETRY, 2, legend=True), 1, 0)
    assert hidden[..., 2].max() > 100, "an edge in colour"


def test_every_group_has_a_row(frames: NDArray[np.uint8]) -> None:
    groups = [(ALL_IDS[:16], ALL_IDS[16:])] * 3
    sheet = decoded(mask_sheet(frames, groups, GEOMETRY))
    layout = layout_of(GEOMETRY, 4, legend=True)
    assert len(sheet) == layout.height
    assert np.array_equal(tile(sheet, layout, 1, 1), tile(sheet, layout, 3, 1))


def test_the_ground_of_a_sheet_is_transparent_and_its_letters_are_not(frames: NDArray[np.uint8]) -> None:
    sheet = decoded(mask_sheet(frames, [], GEOMETRY))
    layout = layout_of(GEOMETRY, 1, legend=True)
    label = sheet[: layout.line_height, :, 3]
    assert 0.001 < (label > 128).mean() < 0.2
    assert sheet[:, layout.tile + layout.gap // 2, 3].min() == 0, "the gap between tiles"
    top, left = layout.corner(0, 0)
    assert (sheet[top : top + layout.tile, left : left + layout.tile, 3] == 255).all()


def test_a_reconstruction_sheet_shows_original_masked_and_pasted(frames: NDArray[np.uint8]) -> None:
    ids = ALL_IDS[:16]
    sheet = decoded(reconstruction_sheet(frames, perfect(frames)[ids], ids, GEOMETRY, *IMAGENET))
    layout = layout_of(GEOMETRY, 3)
    original, masked, pasted = (tile(sheet, layout, row, 0).astype(int) for row in range(3))
    assert masked.mean() < 0.5 * original.mean()
    assert np.abs(pasted - original).max() <= 1
    later = [tile(sheet, layout, row, 1) for row in range(3)]
    assert np.array_equal(later[0], later[1]) and np.array_equal(later[0], later[2])


def test_what_the_encoder_did_not_see_is_striped_in_the_masked_row(frames: NDArray[np.uint8]) -> None:
    target, context = ALL_IDS[:16], ALL_IDS[16:24]
    predicted = perfect(frames)[target]
    sheet = decoded(reconstruction_sheet(frames, predicted, target, GEOMETRY, *IMAGENET, context_ids=context))
    layout = layout_of(GEOMETRY, 3)
    original, masked = tile(sheet, layout, 0, 1), tile(sheet, layout, 1, 1)
    half = layout.tile // 2
    assert np.array_equal(masked[:half], original[:half]), "seen"
    assert (masked[half:] != original[half:]).any(axis=-1).mean() > 0.9, "neither seen nor predicted"


def test_a_bad_reconstruction_looks_bad(frames: NDArray[np.uint8]) -> None:
    sheet = decoded(reconstruction_sheet(frames, -perfect(frames), ALL_IDS, GEOMETRY, *IMAGENET))
    layout = layout_of(GEOMETRY, 3)
    original, pasted = tile(sheet, layout, 0, 0).astype(int), tile(sheet, layout, 2, 0).astype(int)
    assert np.abs(pasted - original).mean() > 30


def test_tokens_that_are_alike_get_the_same_colour_and_others_another() -> None:
    rng = np.random.default_rng(1)
    kinds = rng.normal(size=(4, 16))
    colours = principal_colours(kinds[np.arange(32) % 4])
    assert len(np.unique(colours, axis=0)) == 4
    assert np.array_equal(colours[0], colours[4])
    assert colours.min() == 0 and colours.max() == 255


def test_colours_do_not_depend_on_sign_conventions_or_scale() -> None:
    tokens = np.random.default_rng(2).normal(size=(64, 8))
    assert np.array_equal(principal_colours(tokens), principal_colours(tokens * 1000 + 5))


@pytest.mark.parametrize("tokens", [np.ones((32, 6)), np.zeros((32, 2))])
def test_tokens_without_variance_are_grey(tokens: NDArray[np.float64]) -> None:
    assert (principal_colours(tokens) == 128).all()


def test_narrow_latents_fill_the_colours_they_have() -> None:
    colours = principal_colours(np.arange(32.0)[:, None])
    assert np.ptp(colours[:, 0]) == 255 and (colours[:, 1:] == 128).all()


def test_a_pca_strip_has_a_row_an_encoder_in_report_order(frames: NDArray[np.uint8]) -> None:
    halves = (ALL_IDS % 4 < 2).astype(float)[:, None] * np.ones((1, 5))
    noise = np.random.default_rng(3).normal(size=(GEOMETRY.num_tokens, 12))
    sheet = decoded(pca_strip(frames, {"random": noise, "student": halves}, GEOMETRY))
    layout = layout_of(GEOMETRY, 3)
    student, random = tile(sheet, layout, 1, 0), tile(sheet, layout, 2, 0)
    half = layout.tile // 2
    assert len(np.unique(student[:, :half].reshape(-1, 3), axis=0)) == 1, "one colour a half"
    assert not np.array_equal(student[:, :half], student[:, half : 2 * half])
    assert len(np.unique(random.reshape(-1, 3), axis=0)) == 16


def test_latents_of_another_length_are_refused_by_encoder(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match=r"teacher: expected \(32, dim\)"):
        pca_strip(frames, {"teacher": np.zeros((31, 4))}, GEOMETRY)


@pytest.mark.parametrize(
    ("geometry", "columns"),
    [
        (ClipGeometry(num_frames=8, image_size=96), 4),
        (ClipGeometry(num_frames=16, image_size=224), 8),
        (ClipGeometry(num_frames=64, image_size=384), 8),
        (ClipGeometry(num_frames=2, image_size=16), 1),
    ],
)
def test_sheets_of_every_geometry_are_of_one_size_on_the_page(geometry: ClipGeometry, columns: int) -> None:
    layout = layout_of(geometry, 3)
    assert layout.columns == columns <= MOST_COLUMNS
    assert 700 <= layout.width <= 1900
    assert 0.015 < layout.text_height / layout.width < 0.022, "letters of one size on the page"


def test_large_frames_are_shrunk_by_averaging() -> None:
    geometry = ClipGeometry(num_frames=16, image_size=224)
    frames = np.zeros((16, 224, 224, 3), np.uint8)
    frames[:, ::2] = 200
    sheet = decoded(mask_sheet(frames, [], geometry))
    layout = layout_of(geometry, 1, legend=True)
    assert layout.tile == 112
    assert (tile(sheet, layout, 0, 7) == 100).all()


def test_enlarging_repeats_pixels() -> None:
    image = np.array([[[1, 2], [3, 4]]])
    assert enlarge(image, 2).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]


def test_a_sheet_of_several_clips_colours_them_together(frames: NDArray[np.uint8]) -> None:
    """Equal tokens of two clips have one colour, though the clips differ elsewhere; a film lies above its
    tokens."""
    rng = np.random.default_rng(1)
    first = rng.normal(size=(GEOMETRY.num_tokens, 6))
    second = first + 0.0
    second[GEOMETRY.tokens_per_step :] += 5
    shown = [ShownTokens("a", first, frames), ShownTokens("b", second), ShownTokens("c", None, frames)]
    sheet, layout = decoded(pca_sheet(shown, GEOMETRY)), layout_of(GEOMETRY, 4)
    assert sheet.shape[:2] == (layout.height, layout.width)
    assert np.array_equal(tile(sheet, layout, 1, 0), tile(sheet, layout, 2, 0))
    assert not np.array_equal(tile(sheet, layout, 1, 1), tile(sheet, layout, 2, 1))
    assert np.array_equal(tile(sheet, layout, 0, 1), tile(sheet, layout, 3, 1))
    with pytest.raises(DataError, match="expected"):
        pca_sheet([ShownTokens("a", first[:5])], GEOMETRY)
