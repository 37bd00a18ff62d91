"""Rotated attention: the gradient written by hand is the true one, and the fast kernel is what runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from salt_vla.config import EncoderConfig, MaskConfig, PredictorConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import build_masks
from salt_vla.models import build_encoder, build_predictor
from salt_vla.models.attention import Block, rotate, rotation, token_places, turned
from salt_vla.training.networks import Networks

GRID = ClipGeometry(num_frames=6, image_size=16, tubelet_size=2, patch_size=4)  # 3 × 4 × 4 tokens
HEADS, HEAD_DIM = 2, 16


def random_ids(batch: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(GRID.num_tokens)[:count] for _ in range(batch)])


def test_channels_turn_by_their_token_s_place_one_by_one() -> None:
    """Against the formula, a channel at a time: pair (2i, 2i + 1), angles tiled over an axis' channels."""
    ids = random_ids(2, 5)
    x = torch.randn(2, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    out = rotate(x, rotation(ids, HEAD_DIM, GRID))
    axis_dim = 2 * ((HEAD_DIM // 3) // 2)
    half = axis_dim // 2
    for channel in range(HEAD_DIM):
        axis, within = divmod(channel, axis_dim)
        partner = channel + 1 - 2 * (channel % 2)
        sign = 1 if channel % 2 else -1
        for row in range(2):
            for token in range(5):
                places = [int(part) for part in token_places(ids[row, token], GRID)]
                angle = places[axis] / 10000 ** (within % half / half) if axis < 3 else 0.0
                mine, other = x[row, token, 0, channel], x[row, token, 0, partner]
                expected = mine * math.cos(angle) + sign * other * math.sin(angle)
                assert out[row, token, 0, channel].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_gradient_by_hand_is_the_gradient() -> None:
    turn = rotation(random_ids(2, 5), HEAD_DIM, GRID)
    x = torch.randn(2, 5, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: turned(y, turn), (x,))
    (by_hand,) = torch.autograd.grad(turned(x, turn).square().mul(torch.arange(HEAD_DIM)).sum(), x)
    (by_autograd,) = torch.autograd.grad(rotate(x, turn).square().mul(torch.arange(HEAD_DIM)).sum(), x)
    assert torch.allclose(by_hand, by_autograd, rtol=1e-12, atol=1e-12)


def test_turning_keeps_bfloat16_and_without_gradients_computes_the_same() -> None:
    turn = rotation(random_ids(1, 7), HEAD_DIM, GRID)
    x = torch.randn(1, 7, HEADS, HEAD_DIM).bfloat16()
    with_gradient = turned(x.clone().requires_grad_(), turn)
    assert with_gradient.dtype == torch.bfloat16
    assert torch.equal(turned(x, turn), with_gradient.detach())


def kernels_of(valid: Tensor | None, last: int | None) -> set[str]:
    block = Block(32, HEADS, 2.0)
    ids = random_ids(2, 12)
    x = torch.randn(2, 12, 32, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        block(x, rotation(ids, HEAD_DIM, GRID), valid, last).sum().backward()
    return {event.key for event in seen.key_averages() if "attention" in event.key}


@pytest.mark.parametrize("last", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_runs_in_the_flash_kernel_with_padding_too(padded: bool, last: int | None) -> None:
    valid = None
    if padded:
        valid = torch.ones(2, 12, dtype=torch.bool)
        valid[1, 8:] = False
    names = kernels_of(valid, last)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not any("math" in name for name in names)


def test_a_padded_row_computes_what_the_short_row_would() -> None:
    block = Block(32, HEADS, 2.0).eval()
    ids = random_ids(1, 9)
    x = torch.randn(1, 9, 32)
    short = block(x[:, :6], rotation(ids[:, :6], HEAD_DIM, GRID))
    valid = torch.arange(9).unsqueeze(0) < 6
    padded = block(x, rotation(ids, HEAD_DIM, GRID), valid)
    assert torch.allclose(padded[:, :6], short, atol=1e-6)


def test_autocast_makes_one_copy_of_a_weight_for_both_mask_groups() -> None:
    encoder = build_encoder(EncoderConfig(name="vit_micro", geometry=GRID, depth=2))
    networks = Networks(encoder, build_predictor(PredictorConfig(dim=48, depth=2, num_heads=2), 128, 8, GRID))
    groups = build_masks(MaskConfig(), GRID).sample(2)
    tubelets = torch.randn(2, GRID.num_tokens, GRID.patch_dim)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            predicted, _ = networks(tubelets, groups)
        torch.stack([z.float().sum() for z in predicted]).sum().backward()
    forward = [e for e in seen.events() if e.name == "aten::to" and e.input_shapes[0] == [512, 128]]
    casts = [e for e in forward if any(child.name == "aten::_to_copy" for child in e.cpu_children)]
    # fc1 of both encoder blocks: to bfloat16 once a block, and the gradient of the copy back to float32 once.
    assert len(groups) == 2
    assert len(casts) == 2 * 2
