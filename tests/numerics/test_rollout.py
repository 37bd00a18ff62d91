"""Attention as our encoder computes it, multiplied up over its layers."""

from __future__ import annotations

import pytest
import torch

from salt_vla.config import EncoderConfig
from salt_vla.errors import ConfigError
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.rollout import attention_map, attention_rollout
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder, patchify
from salt_vla.models.attention import Attention, rotation
from salt_vla.models.pixels import normalise_pixels
from salt_vla.teachers.pixel import EncoderTeacher

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
TOKENS = GEOMETRY.num_tokens


def teacher(depth: int, positions: str = "rope") -> EncoderTeacher:
    torch.manual_seed(0)
    config = EncoderConfig(name="vit_micro", geometry=GEOMETRY, depth=depth, positions=positions)
    encoder = build_encoder(config)
    for parameter in encoder.parameters():  # Fresh weights attend to all alike.
        parameter.data += 0.2 * torch.randn_like(parameter)
    return EncoderTeacher(encoder, "e")


def clips(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("turned", [True, False])
def test_the_map_times_the_values_is_what_the_layer_gives(turned: bool) -> None:
    torch.manual_seed(1)
    layer = Attention(48, 3)
    x = torch.randn(2, TOKENS, 48)
    turn = rotation(torch.arange(TOKENS)[None], 16, GEOMETRY) if turned else None
    shares = attention_map(layer, x, turn)
    values = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (3, 16))
    mixed = torch.einsum("bhqk,bkhd->bqhd", shares, values).flatten(2)
    assert torch.allclose(layer.proj(mixed), layer(x, turn), atol=1e-6)
    assert torch.allclose(shares.sum(-1), torch.ones(2, 3, TOKENS), atol=1e-6)


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_shares_sum_to_one_and_none_is_negative(positions: str) -> None:
    rolled = attention_rollout("e", teacher(4, positions), clips())
    assert rolled.shape == (2, TOKENS, TOKENS) and rolled.min() >= 0
    assert torch.allclose(rolled.sum(-1), torch.ones(2, TOKENS), atol=1e-5)


def test_layers_are_multiplied_later_ones_from_the_left() -> None:
    """Every layer's input is taken from the blocks, run one after the other by hand."""
    model, frames = teacher(3), clips()
    encoder = model.encoder
    turn = rotation(torch.arange(TOKENS)[None], encoder.head_dim, GEOMETRY)
    expected = torch.eye(TOKENS)
    with torch.inference_mode():
        x = encoder.patch_embed(patchify(normalise_pixels(frames), GEOMETRY))
        for block in encoder.blocks:
            mean = attention_map(block.attn, block.norm1(x), turn).mean(1)
            expected = (0.5 * mean + 0.5 * torch.eye(TOKENS)) @ expected
            x = block(x, turn)
        assert torch.allclose(encoder.norm(x), model.latents(frames), atol=1e-5)
    assert torch.allclose(attention_rollout("e", model, frames), expected, atol=1e-5)
    backwards = attention_rollout("e", model, frames.flip(1))
    assert not torch.allclose(backwards, expected, atol=1e-3), "it is a function of the film"


def test_the_encoder_is_left_as_it_was() -> None:
    model, frames = teacher(2), clips()
    before = model.latents(frames)
    attention_rollout("e", model, frames)
    assert torch.equal(before, model.latents(frames))
    assert not any(block.attn._forward_pre_hooks for block in model.encoder.blocks)
    with pytest.raises(ConfigError):
        attention_rollout("e", model, frames[:, :2])
    assert not any(block.attn._forward_pre_hooks for block in model.encoder.blocks), "after a failure too"


def test_a_model_that_does_not_show_its_attention_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="encoder 'pixels' does not show its attention"):
        attention_rollout("pixels", Pixels(GEOMETRY), clips())
