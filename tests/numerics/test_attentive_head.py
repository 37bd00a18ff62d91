"""The attentive head equals torch.nn's own layers and transformers' V-JEPA 2 pooler, weights copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler

from salt_vla.evaluation.attentive_head import AttentiveHead, answers, count_heads

DIM, HEADS, OUTPUTS, CLIPS, TOKENS = 32, 4, 5, 3, 11


def drawn(depth: int, seed: int = 0) -> AttentiveHead:
    """A head all of whose weights, biases and gains are far from their start."""
    torch.manual_seed(seed)
    head = AttentiveHead(DIM, OUTPUTS, depth, HEADS).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.3, 0.3)
    return head


def tokens(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(CLIPS, TOKENS, DIM, dtype=torch.float64) * 2 + 0.5


def attention(joint: Tensor, bias: Tensor, out: nn.Linear | None) -> nn.MultiheadAttention:
    """torch's own, with these weights; without `out` its output projection is the identity."""
    made = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        made.in_proj_weight.copy_(joint)
        made.in_proj_bias.copy_(bias)
        made.out_proj.weight.copy_(torch.eye(DIM) if out is None else out.weight)
        made.out_proj.bias.copy_(torch.zeros(DIM) if out is None else out.bias)
    return made


def norm(of: nn.LayerNorm) -> nn.LayerNorm:
    made = nn.LayerNorm(DIM, eps=1e-6, dtype=torch.float64)
    made.load_state_dict(of.state_dict())
    return made


def by_torch(head: AttentiveHead, x: Tensor) -> Tensor:
    """The same head out of torch.nn's layers: keys and values computed for every token, a key bias too."""
    for block in head.blocks:
        b: Any = block
        normal = norm(b.norm1)(x)
        own = attention(b.attn.qkv.weight, b.attn.qkv.bias, b.attn.proj)
        x = x + own(normal, normal, normal)[0]
        x = x + F.linear(
            F.gelu(F.linear(norm(b.norm2)(x), b.mlp.fc1.weight, b.mlp.fc1.bias)),
            b.mlp.fc2.weight,
            b.mlp.fc2.bias,
        )
    joint = torch.cat([head.to_query.weight, head.to_key.weight, head.to_value.weight])
    bias = torch.cat([head.to_query.bias, torch.randn(DIM, dtype=torch.float64), head.to_value.bias])
    normal = norm(head.norm1)(x)
    query = head.query.expand(len(x), 1, DIM)
    query = query + attention(joint, bias, None)(query, normal, normal)[0]
    hidden = F.gelu(F.linear(norm(head.norm2)(query), head.mlp.fc1.weight, head.mlp.fc1.bias))
    query = query + F.linear(hidden, head.mlp.fc2.weight, head.mlp.fc2.bias)
    return F.linear(query[:, 0], head.readout.weight, head.readout.bias)


@pytest.mark.parametrize("depth", [0, 3])
def test_it_equals_a_construction_of_torchs_layers(depth: int) -> None:
    head, x = drawn(depth), tokens()
    assert torch.allclose(head(x), by_torch(head, x), rtol=1e-9, atol=1e-9)


def test_gradients_equal_those_of_that_construction() -> None:
    head = drawn(0)
    mine = torch.autograd.grad(head(tokens()).square().sum(), [head.query, head.mlp.fc1.weight])
    theirs = torch.autograd.grad(by_torch(head, tokens()).square().sum(), [head.query, head.mlp.fc1.weight])
    # torch's layers hold copies, so only what they did not copy has its gradient there: the MLP, and the
    # query's way around the attention.
    assert torch.allclose(mine[1], theirs[1], rtol=1e-8)
    assert not torch.equal(mine[0], torch.zeros_like(mine[0]))


@pytest.mark.parametrize("depth", [0, 3])
def test_it_equals_transformers_pooler(depth: int) -> None:
    head, x = drawn(depth), tokens()
    config = VJEPA2Config(
        hidden_size=DIM, num_attention_heads=HEADS, num_pooler_layers=depth, layer_norm_eps=1e-6, mlp_ratio=4
    )
    pooler: Any = VJEPA2AttentivePooler(config).double().eval()
    cross = pooler.cross_attention_layer
    pairs: list[tuple[Any, Any]] = [
        (cross.layer_norm1, head.norm1),
        (cross.cross_attn.q_proj, head.to_query),
        (cross.cross_attn.v_proj, head.to_value),
        (cross.layer_norm2, head.norm2),
        (cross.mlp, head.mlp),
    ]
    with torch.no_grad():
        pooler.query_tokens.copy_(head.query)
        cross.cross_attn.k_proj.weight.copy_(head.to_key.weight)
        for layer, block in zip(pooler.self_attention_layers, head.blocks, strict=True):
            of: Any = block
            parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            for part, weight, bias in zip(
                parts, of.attn.qkv.weight.chunk(3), of.attn.qkv.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            pairs += [
                (layer.layer_norm1, of.norm1),
                (layer.self_attn.out_proj, of.attn.proj),
                (layer.layer_norm2, of.norm2),
                (layer.mlp, of.mlp),
            ]
        for theirs, mine in pairs:
            theirs.load_state_dict(mine.state_dict())
        expected = F.linear(pooler(x), head.readout.weight, head.readout.bias)
    assert torch.allclose(head(x), expected, rtol=1e-6)  # Its softmax is in float32, whatever it is given.


@pytest.mark.parametrize("depth", [0, 2])
def test_heads_asked_together_say_what_each_says_alone(depth: int) -> None:
    heads, x = [drawn(depth, seed) for seed in range(3)], tokens()
    for head, together in zip(heads, answers(heads, x), strict=True):
        assert torch.allclose(together, head(x), rtol=1e-12)


def test_its_start_is_the_references() -> None:
    """Deviation 0.02 (truncated at ±2, far out), zero biases; output projections of block n ÷ √(2n)."""
    torch.manual_seed(0)
    head = AttentiveHead(256, 7, 3)
    for number, block in enumerate(head.blocks, 1):
        of: Any = block
        assert of.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for layer in (of.attn.proj, of.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.02)
            assert not layer.bias.any()
    assert head.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
    small = AttentiveHead(256, 7, 0)
    assert small.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.02)
    assert head.query.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("dim", "heads"), [(192, 16), (99, 11), (24, 12), (3, 3), (1, 1)])
def test_heads_divide_the_width(dim: int, heads: int) -> None:
    assert count_heads(768) == count_heads(1280) == 16
    assert count_heads(dim) == heads and AttentiveHead(dim, 2, 1)(torch.zeros(1, 2, dim)).shape == (1, 2)
