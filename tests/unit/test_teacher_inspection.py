"""What teachers show without film: lost biases, tokens out of order, permuted positions; no false alarms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from salt_vla.config import EncoderConfig
from salt_vla.evaluation.teacher_inspection import (
    PositionOrder,
    TokenOrder,
    position_order,
    query_value_biases,
    token_order,
)
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, build_encoder, patchify
from salt_vla.models.attention import sincos_table
from salt_vla.models.pixels import normalise_pixels

GEOMETRY = ClipGeometry(num_frames=4, image_size=64, tubelet_size=2, patch_size=8)
DIM = 48
Latents = Callable[[Tensor], Tensor]


def encoder(positions: str = "sincos", geometry: ClipGeometry = GEOMETRY) -> VideoEncoder:
    torch.manual_seed(0)
    config = EncoderConfig(name="vit_micro", geometry=geometry, positions=positions, depth=2)
    return build_encoder(config).eval().requires_grad_(False)


def latents_of(model: VideoEncoder) -> Latents:
    return lambda frames: model(normalise_pixels(frames))


class WithTable(nn.Module):
    """Tokens that are their patches and their row of a table: one for each place of a square, after a CLS."""

    def __init__(self, table: Tensor, extra: int = 1) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.cat([torch.zeros(extra, table.shape[1]), table])[None])
        self.extra = extra
        generator = torch.Generator().manual_seed(3)
        self.mix = torch.randn(GEOMETRY.patch_dim, table.shape[1], generator=generator) / 100

    def latents(self, frames: Tensor) -> Tensor:
        table = self.position_embeddings.detach()[0, self.extra :].repeat(GEOMETRY.token_grid[0], 1)
        return patchify(normalise_pixels(frames), GEOMETRY) @ self.mix + table


def shuffled(table: Tensor, seed: int = 0) -> Tensor:
    return table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]


def sinusoid(places: int) -> Tensor:
    """Of one axis that counts all places, as VideoMAE's is."""
    angles = torch.arange(places)[:, None] / 10000 ** (torch.arange(DIM // 2) / (DIM // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def smooth_table(noise: float = 0.3) -> Tensor:
    """As a learned one is: smooth over the places, and noisy."""
    generator = torch.Generator().manual_seed(1)
    places = GEOMETRY.tokens_per_step
    return sincos_table(DIM, GEOMETRY)[:places] + noise * torch.randn(places, DIM, generator=generator)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_a_healthy_encoder_has_its_tokens_and_positions_in_order(positions: str) -> None:
    model = encoder(positions)
    assert token_order(latents_of(model), GEOMETRY) == TokenOrder(tried=8, found=8)
    assert position_order(latents_of(model), model, GEOMETRY).judgement == "ordered"


@pytest.mark.parametrize("seed", range(5))
def test_a_permuted_table_of_positions_is_found(seed: int) -> None:
    model = encoder()
    model.positions.copy_(shuffled(model.positions, seed))
    found = position_order(latents_of(model), model, GEOMETRY)
    assert found.judgement == "shuffled" and found.of_table
    assert token_order(latents_of(model), GEOMETRY).found == 8  # Each token still sees its own patch.


@pytest.mark.parametrize("extra", [0, 1])
def test_a_learned_table_is_judged_after_its_cls_row(extra: int) -> None:
    table = smooth_table()
    healthy, permuted = WithTable(table, extra), WithTable(shuffled(table), extra)
    assert position_order(healthy.latents, healthy, GEOMETRY).judgement == "ordered"
    assert position_order(permuted.latents, permuted, GEOMETRY).judgement == "shuffled"


def test_a_permutation_shows_in_the_tokens_where_the_table_is_not_to_be_found() -> None:
    table = sinusoid(GEOMETRY.tokens_per_step)
    for rows, judgement in ((table, "ordered"), (shuffled(table), "shuffled")):
        hidden = WithTable(rows)
        found = position_order(hidden.latents, nn.Identity(), GEOMETRY)
        assert found.judgement == judgement and not found.of_table


@pytest.mark.parametrize("seed", range(8))
def test_a_table_of_random_numbers_is_no_permuted_one(seed: int) -> None:
    """Fresh weights have no order in space; that is no reason for an alarm."""
    table = torch.randn(GEOMETRY.tokens_per_step, DIM, generator=torch.Generator().manual_seed(seed))
    model = WithTable(table)
    assert position_order(model.latents, model, GEOMETRY).judgement == "unknown"
    assert position_order(model.latents, nn.Identity(), GEOMETRY).judgement == "unknown"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_that_fell_the_other_way_are_no_permutation(dtype: torch.dtype) -> None:
    """In half precision the faint trace of rotary positions is noise: one bit differs in tokens anywhere."""
    model = encoder("rope").to(dtype)
    found = position_order(lambda frames: model(normalise_pixels(frames).to(dtype)).float(), model, GEOMETRY)
    assert found.judgement == "unknown" and found.spread < found.least_spread
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(DIM, generator=generator).repeat(GEOMETRY.tokens_per_step, 1)
    step[:, :3] += 5e-3 * torch.randint(0, 2, (len(step), 3), generator=generator)
    tokens = step.repeat(GEOMETRY.token_grid[0], 1)

    def judged(module: nn.Module) -> str:
        return position_order(lambda clips: tokens.expand(len(clips), -1, -1), module, GEOMETRY).judgement

    assert judged(nn.Linear(3, 3).to(dtype)) == "unknown"
    assert judged(nn.Linear(3, 3)) == "shuffled"  # What it would be taken for in float32.


def test_tokens_that_know_no_place_cannot_be_judged() -> None:
    model = WithTable(torch.zeros(GEOMETRY.tokens_per_step, DIM))
    assert position_order(model.latents, model, GEOMETRY).judgement == "unknown"


@pytest.mark.parametrize("size", [8, 16])
def test_grids_too_small_to_tell_order_from_chance_are_not_judged(size: int) -> None:
    geometry = ClipGeometry(num_frames=4, image_size=size, tubelet_size=2, patch_size=8)
    model = encoder(geometry=geometry)
    found = position_order(latents_of(model), model, geometry)
    assert found.judgement == "unknown" and found.places == (size // 8) ** 2
    assert token_order(latents_of(model), geometry).found == min(8, geometry.num_tokens)


def test_other_tensors_called_pos_are_no_position_tables() -> None:
    model = encoder()
    model.register_buffer("pos_ids", torch.arange(64)[None])
    model.register_buffer("position_scale", torch.ones(7, 5))
    model.register_buffer("pos_kernel", torch.ones(4, 4, 4, 4))
    assert position_order(latents_of(model), model, GEOMETRY).judgement == "ordered"


@pytest.mark.parametrize("order", ["transposed", "space before time", "reversed"])
def test_tokens_in_another_order_than_the_geometrys_are_found(order: str) -> None:
    model = encoder()
    steps, rows, columns = GEOMETRY.token_grid

    def wrong(frames: Tensor) -> Tensor:
        tokens = model(normalise_pixels(frames)).unflatten(1, (steps, rows, columns))
        if order == "transposed":
            return tokens.transpose(2, 3).flatten(1, 3)
        if order == "reversed":
            return tokens.flatten(1, 3).flip(1)
        return tokens.permute(0, 2, 3, 1, 4).flatten(1, 3)

    found = token_order(wrong, GEOMETRY)
    assert 2 * found.found < found.tried


@pytest.mark.parametrize(
    "names",
    [
        ("attention.attention.q_bias", "attention.attention.v_bias"),
        ("attention.query.bias", "attention.value.bias"),
        ("self_attn.q_proj.bias", "self_attn.v_proj.bias"),
        ("attn.q.bias", "attn.v.bias"),
    ],
)
def test_biases_are_found_under_every_familys_names(names: tuple[str, str]) -> None:
    class Holder(nn.Module):
        def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
            others = {"attention.key.bias": torch.zeros(4), "mlp.fc1.bias": torch.zeros(4)}
            return {names[0]: torch.ones(4), names[1]: torch.zeros(4), **others}

    found = query_value_biases(Holder())
    assert (found.total, found.zero) == (2, 1)


def test_of_a_joint_bias_the_keys_third_does_not_count() -> None:
    model = encoder()
    assert (query_value_biases(model).total, query_value_biases(model).zero) == (4, 4)
    dim = model.dim
    model.blocks[0].attn.qkv.bias[dim : 2 * dim] = 1
    assert query_value_biases(model).zero == 4
    model.blocks[0].attn.qkv.bias[:dim] = 1
    model.blocks[1].attn.qkv.bias[-1] = 1
    assert query_value_biases(model).zero == 2
    assert query_value_biases(nn.Linear(3, 3)).total == 0


def test_judgements_have_a_gap_between_them() -> None:
    def order(neighbours: float, **others: float) -> str:
        figures = {"nearest": 0.2, "chance": 0.5, "directions": 0.1, "spread": 0.5} | others
        return PositionOrder(neighbours, **figures, places=64, of_table=True).judgement

    assert [order(0.3), order(0.85), order(1.0)] == ["ordered", "unknown", "shuffled"]
    assert order(1.0, nearest=0.6, directions=0.95) == "unknown"
    assert order(1.0, spread=1e-7) == "unknown"


def coarse(latents: Latents, side: int) -> Latents:
    """As an image tower of `side`² patches that is resampled to the clip's grid."""

    def of(frames: Tensor) -> Tensor:
        tokens = latents(frames)
        maps = tokens.unflatten(1, GEOMETRY.token_grid).flatten(0, 1).permute(0, 3, 1, 2)
        small = nn.functional.adaptive_avg_pool2d(maps, side)
        large = nn.functional.interpolate(small, maps.shape[-2:], mode="bilinear", align_corners=False)
        return large.permute(0, 2, 3, 1).reshape(tokens.shape)

    return of


def test_a_coarse_grid_of_its_own_is_no_disorder() -> None:
    geometry = GEOMETRY
    fine = latents_of(encoder())
    found = token_order(coarse(fine, 4), geometry, own_rows=4)
    assert found.tried == 8 and found.found > 4
    assert token_order(coarse(fine, 2), geometry, own_rows=2) == TokenOrder(0, 0)  # Half of all would do.
    backwards = token_order(lambda frames: coarse(fine, 4)(frames).flip(1), geometry, own_rows=4)
    assert 2 * backwards.found < backwards.tried


def test_numbers_that_are_none_are_not_judged() -> None:
    def broken(frames: Tensor) -> Tensor:
        return torch.full((len(frames), GEOMETRY.num_tokens, DIM), torch.nan)

    assert token_order(broken, GEOMETRY) == TokenOrder(0, 0)
    assert position_order(broken, nn.Identity(), GEOMETRY).judgement == "unknown"
