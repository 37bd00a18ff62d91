"""With the same weights, encoder and predictor compute what transformers' V-JEPA 2 computes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from salt_vla.config import EncoderConfig, PredictorConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.models import Predictor, VideoEncoder, build_encoder, build_predictor, gather_tokens

# 3 × 4 × 4 tokens; heads of 32 and 16 channels, neither a multiple of 6: some channels are not turned.
GRID = ClipGeometry(num_frames=6, image_size=16, tubelet_size=2, patch_size=4)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Twins:
    """One set of weights in two implementations."""

    reference: VJEPA2Model
    encoder: VideoEncoder
    predictor: Predictor


@pytest.fixture(scope="module")
def twins() -> Twins:
    config = VJEPA2Config(
        crop_size=GRID.image_size,
        frames_per_clip=GRID.num_frames,
        tubelet_size=GRID.tubelet_size,
        patch_size=GRID.patch_size,
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_pooler_layers=1,
        pred_hidden_size=64,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = VJEPA2Model(config).eval()
        with torch.no_grad():  # Far from the start, where biases are zero and all attention is flat.
            for parameter in reference.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder = build_encoder(EncoderConfig(name="vit_micro", geometry=GRID, depth=3)).eval()
    predictor = build_predictor(PredictorConfig(dim=64, depth=2, num_heads=4), 128, 128, GRID).eval()
    state = reference.state_dict()
    encoder.load_state_dict(encoder_weights(state))
    predictor.load_state_dict(predictor_weights(state))
    return Twins(reference, encoder, predictor)


def layer_weights(state: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """Their blocks under our names: three projections become one."""
    ours = {}
    for number in range(depth):
        theirs, block = f"{prefix}.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            ours[f"{block}.attn.proj.{kind}"] = state[f"{theirs}.attention.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                ours[f"{block}.{name}.{kind}"] = state[f"{theirs}.{name}.{kind}"]
    return ours


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    patches = "encoder.embeddings.patch_embeddings.proj"
    return layer_weights(state, "encoder", 3) | {
        "patch_embed.weight": state[f"{patches}.weight"].flatten(1),
        "patch_embed.bias": state[f"{patches}.bias"],
        "norm.weight": state["encoder.layernorm.weight"],
        "norm.bias": state["encoder.layernorm.bias"],
    }


def predictor_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = layer_weights(state, "predictor", 2)
    ours["mask_tokens"] = state["predictor.embeddings.mask_tokens"].flatten(1)
    for name, theirs in (
        ("embed", "embeddings.predictor_embeddings"),
        ("norm", "layernorm"),
        ("proj", "proj"),
    ):
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = state[f"predictor.{theirs}.{kind}"]
    return ours


def clips(batch: int = 2) -> Tensor:
    size = (batch, 3, GRID.num_frames, GRID.image_size, GRID.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def split(context: int, targets: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Disjoint sorted ids, other ones in each row."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.stack([torch.randperm(GRID.num_tokens, generator=generator) for _ in range(batch)])
    return rows[:, :context].sort().values, rows[:, context : context + targets].sort().values


@torch.no_grad()
def test_encoder_of_full_clips(twins: Twins) -> None:
    theirs = twins.reference(clips().transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(twins.encoder(clips()), theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_encoder_of_visible_tokens(twins: Twins) -> None:
    """Their training code gathers tokens first; their layers take the places in the form of a mask."""
    context, _ = split(context=11, targets=0)
    network = twins.reference.encoder
    hidden = gather_tokens(network.embeddings(clips().transpose(1, 2)), context)
    for layer in network.layer:
        hidden = layer(hidden, context)[0]
    theirs = network.layernorm(hidden)
    torch.testing.assert_close(twins.encoder(clips(), context), theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_predictor(twins: Twins) -> None:
    """They read mask token 1; what they return follows the order of the targets."""
    context, targets = split(context=11, targets=9)
    whole = twins.encoder(clips())
    theirs = twins.reference.predictor(whole, [context], [targets]).last_hidden_state
    ours = twins.predictor(gather_tokens(whole, context), context, targets, group=1)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_padded_contexts_of_uneven_size(twins: Twins) -> None:
    """They know no padding: each clip goes through their networks by itself, with its own context."""
    context, targets = split(context=11, targets=9)
    sizes = (11, 7)
    valid = torch.arange(11) < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, context, context[:, 6:7])
    ours = twins.encoder(clips(), padded, valid)
    answers = twins.predictor(ours, padded, targets, group=1, context_valid=valid)
    network = twins.reference.encoder
    for clip, size in enumerate(sizes):
        seen, asked = context[clip : clip + 1, :size], targets[clip : clip + 1]
        hidden = gather_tokens(network.embeddings(clips()[clip : clip + 1].transpose(1, 2)), seen)
        for layer in network.layer:
            hidden = layer(hidden, seen)[0]
        theirs = network.layernorm(hidden)
        torch.testing.assert_close(ours[clip : clip + 1, :size], theirs, atol=TOLERANCE, rtol=0)
        # Their predictor takes a whole clip's tokens and picks the context itself.
        whole = torch.zeros(1, GRID.num_tokens, 128).index_copy(1, seen[0], theirs)
        predicted = twins.reference.predictor(whole, [seen], [asked]).last_hidden_state
        torch.testing.assert_close(answers[clip : clip + 1], predicted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_comparison_would_notice_another_rope(twins: Twins) -> None:
    """Moving every context token by one column, or counting rows as columns, is far outside the tolerance."""
    context, _ = split(context=11, targets=0)
    step, row, column = context // 16, context % 16 // 4, context % 4
    transposed = step * 16 + column * 4 + row
    pixels = clips()
    right = twins.encoder(pixels, context)
    turned = twins.encoder(pixels.transpose(-1, -2), transposed)
    assert (right - turned).abs().max() > 100 * TOLERANCE
