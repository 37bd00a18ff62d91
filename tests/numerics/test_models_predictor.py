"""The predictor answers for the targets it is asked about, whatever their order, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from salt_vla.config import PredictorConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import Predictor, build_predictor

GRID = ClipGeometry(num_frames=6, image_size=32, tubelet_size=2, patch_size=8)  # 3 × 4 × 4 tokens
POSITIONS = ("rope", "sincos")
CONTEXT = torch.tensor([[0, 3, 17, 30, 45], [1, 2, 20, 21, 47]])
TARGETS = torch.tensor([[1, 4, 16, 46], [0, 19, 22, 40]])


def predictor_of(positions: str = "rope", **changes: object) -> Predictor:
    torch.manual_seed(0)
    config = PredictorConfig(dim=32, depth=2, num_heads=2, positions=positions)  # type: ignore[arg-type]
    return build_predictor(replace(config, **changes), encoder_dim=24, target_dim=10, geometry=GRID)  # type: ignore[arg-type]


def context_tokens(count: int = 5) -> Tensor:
    return torch.randn(2, count, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_target_is_answered_in_the_teachers_width(positions: str) -> None:
    assert predictor_of(positions)(context_tokens(), CONTEXT, TARGETS).shape == (2, 4, 10)


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_of_targets_is_immaterial(positions: str) -> None:
    predictor, order = predictor_of(positions), torch.tensor([2, 0, 3, 1])
    straight = predictor(context_tokens(), CONTEXT, TARGETS)
    torch.testing.assert_close(predictor(context_tokens(), CONTEXT, TARGETS[:, order]), straight[:, order])


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_of_context_is_immaterial(positions: str) -> None:
    predictor, order = predictor_of(positions), torch.tensor([4, 1, 0, 3, 2])
    straight = predictor(context_tokens(), CONTEXT, TARGETS)
    shuffled = predictor(context_tokens()[:, order], CONTEXT[:, order], TARGETS)
    torch.testing.assert_close(shuffled, straight)


@pytest.mark.parametrize("positions", POSITIONS)
def test_answer_depends_on_the_place_asked_for(positions: str) -> None:
    """A target elsewhere gets another answer, though all start from the same mask token."""
    predictor = predictor_of(positions)
    answers = predictor(context_tokens(), CONTEXT, TARGETS)
    assert torch.cdist(answers[0], answers[0]).fill_diagonal_(9).min() > 1e-4


def test_each_group_has_its_own_mask_token() -> None:
    predictor = predictor_of(num_mask_tokens=2)
    first, second = (predictor(context_tokens(), CONTEXT, TARGETS, group=group) for group in (0, 1))
    assert (first - second).abs().max() > 1e-4
    second.sum().backward()
    assert predictor.mask_tokens.grad is not None
    assert predictor.mask_tokens.grad[1].any() and not predictor.mask_tokens.grad[0].any()


@pytest.mark.parametrize("group", [2, -1])
def test_group_without_a_mask_token_is_refused_in_words(group: int) -> None:
    message = f"mask group {group} has no mask token; predictor.num_mask_tokens is 2"
    with pytest.raises(ConfigError, match=message):
        predictor_of(num_mask_tokens=2)(context_tokens(), CONTEXT, TARGETS, group=group)


def test_no_targets_get_no_answers() -> None:
    assert predictor_of()(context_tokens(), CONTEXT, TARGETS[:, :0]).shape == (2, 0, 10)


@pytest.mark.parametrize("positions", POSITIONS)
def test_padded_context_does_not_change_the_answers(positions: str) -> None:
    predictor = predictor_of(positions)
    padded_ids = torch.cat([CONTEXT, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    padded_tokens = torch.cat([context_tokens(), torch.full((2, 3, 24), 7.0)], dim=1)
    valid = torch.arange(8).expand(2, -1) < 5
    expected = predictor(context_tokens(), CONTEXT, TARGETS)
    torch.testing.assert_close(
        predictor(padded_tokens, padded_ids, TARGETS, context_valid=valid), expected, atol=1e-6, rtol=1e-5
    )
    assert not torch.allclose(predictor(padded_tokens, padded_ids, TARGETS), expected, atol=1e-4)


def test_no_gradient_flows_from_padding() -> None:
    predictor = predictor_of()
    tokens = torch.cat([context_tokens(), torch.full((2, 3, 24), 7.0)], dim=1).requires_grad_()
    ids = torch.cat([CONTEXT, CONTEXT[:, -1:].expand(-1, 3)], dim=1)
    valid = torch.arange(8).expand(2, -1) < 5
    predictor(tokens, ids, TARGETS, context_valid=valid).square().sum().backward()
    assert tokens.grad is not None
    assert not tokens.grad[:, 5:].any() and tokens.grad[:, :5].any(dim=-1).all()


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_block_computes_targets_alone(depth: int) -> None:
    predictor, widths = predictor_of(depth=depth), []
    for block in predictor.blocks:
        block.mlp.register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))  # type: ignore[union-attr]
    predictor(context_tokens(), CONTEXT, TARGETS)
    assert widths == [9] * (depth - 1) + [4]


def test_fresh_weights_are_the_references_and_the_mask_tokens_small() -> None:
    predictor = predictor_of(dim=128, depth=3, num_heads=4)
    assert predictor.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert predictor.mask_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    for number, block in enumerate(predictor.blocks, start=1):
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (384, 12), (512, 8), (96, 4), (32, 1)])
def test_width_depth_and_heads_are_free(dim: int, heads: int) -> None:
    predictor = predictor_of(dim=dim, depth=2, num_heads=heads)
    assert predictor(context_tokens(), CONTEXT, TARGETS).shape == (2, 4, 10)
    assert predictor.head_dim * heads == dim and len(predictor.blocks) == 2


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        predictor = predictor_of(grad_checkpointing=checkpointing)
        predictor(context_tokens(), CONTEXT, TARGETS).square().sum().backward()
        return [p.grad for p in predictor.parameters() if p.grad is not None]

    kept, recomputed = gradients(False), gradients(True)
    assert len(kept) == len(list(predictor_of().parameters()))
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b)


def test_rope_heads_of_odd_width_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"predictor.dim=30 over predictor.num_heads=2 makes heads of 15"):
        predictor_of(dim=30)
    assert predictor_of("sincos", dim=30)(context_tokens(), CONTEXT, TARGETS).shape == (2, 4, 10)
