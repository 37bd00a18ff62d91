"""The analytic count of a step equals what torch counts of the products that really run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from salt_vla.config import EncoderConfig, MaskConfig, PredictorConfig, TargetConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MaskGroup, build_masks
from salt_vla.training.flops import block_flops, group_sizes, mean_step_flops, step_flops
from salt_vla.training.learner import build_learner

GRID = ClipGeometry(num_frames=8, image_size=48, tubelet_size=2, patch_size=8)  # 4 × 6 × 6 tokens
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=2),
    predictor=PredictorConfig(dim=48, depth=3, num_heads=2),
    batch_size=4,
)
TARGET_DIM = 40


def counted(config: TrainConfig, groups: list[MaskGroup], backward: bool = True) -> float:
    """What torch counts for one clip of a step, with attention as the plain products it consists of."""
    learner = build_learner(config, TARGET_DIM, "cpu")
    clips = len(groups[0].context_ids)
    tubelets = torch.randn(clips, GRID.num_tokens, GRID.patch_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predicted, _ = learner.networks(tubelets, groups)
        if backward:
            torch.stack([z.sum() for z in predicted]).sum().backward()
    return counter.get_total_flops() / clips


@pytest.mark.parametrize(
    "change",
    [
        CONFIG,
        replace(CONFIG, masks=MaskConfig(strategy="random", ratio=0.75)),
        replace(CONFIG, predictor=replace(CONFIG.predictor, depth=1)),
        replace(CONFIG, encoder=replace(CONFIG.encoder, positions="sincos")),
        replace(CONFIG, encoder=replace(CONFIG.encoder, grad_checkpointing=True)),
        replace(CONFIG, predictor=replace(CONFIG.predictor, grad_checkpointing=True)),
    ],
    ids=["two groups", "one group", "one block", "sincos", "checkpointed encoder", "checkpointed predictor"],
)
def test_a_step_costs_what_torch_counts(change: TrainConfig) -> None:
    groups = build_masks(change.masks, GRID).sample(change.batch_size)
    expected = step_flops(change, TARGET_DIM, group_sizes(groups)).total
    assert counted(change, groups) == pytest.approx(expected, rel=1e-9)


def test_padding_is_counted_as_it_is_computed() -> None:
    groups = build_masks(CONFIG.masks, GRID).sample(4)
    valid = [torch.ones_like(group.context_ids, dtype=torch.bool) for group in groups]
    for row in valid:
        row[1, -1] = False
    padded = [MaskGroup(g.context_ids, g.target_ids, v) for g, v in zip(groups, valid, strict=True)]
    assert counted(CONFIG, padded) == pytest.approx(counted(CONFIG, groups), rel=1e-9)


def test_forward_is_the_part_without_gradients() -> None:
    groups = build_masks(CONFIG.masks, GRID).sample(4)
    expected = step_flops(CONFIG, TARGET_DIM, group_sizes(groups)).forward
    assert counted(CONFIG, groups, backward=False) == pytest.approx(expected, rel=1e-9)


def test_a_moving_average_s_targets_cost_a_forward_pass_over_all_tokens() -> None:
    sizes = [(20, 100), (10, 110)]
    ema = step_flops(replace(CONFIG, target=TargetConfig(provider="ema")), TARGET_DIM, sizes)
    cached = step_flops(CONFIG, TARGET_DIM, sizes)
    learner = build_learner(CONFIG, TARGET_DIM, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.encoder.encode_tubelets(torch.randn(1, GRID.num_tokens, GRID.patch_dim))
    assert ema.total - cached.total == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert cached.parts["targets"] == 0


def test_attention_is_quadratic_and_the_rest_linear_in_tokens() -> None:
    linear, attention = block_flops(64, 256, 100)
    twice = block_flops(64, 256, 200)
    assert twice == (2 * linear, 4 * attention)


def test_the_reference_encoder_s_pass_over_all_tokens_costs_361_gflop() -> None:
    """ViT-B on 1,568 tokens, by hand: 12 blocks of 24·n·d² + 4·n²·d, and the patches' 2·n·1536·d."""
    config = replace(TrainConfig(), target=TargetConfig(provider="ema"))
    n, d = 1568, 768
    by_hand = 12 * (24 * n * d**2 + 4 * n**2 * d) + 2 * n * 1536 * d
    assert step_flops(config, d, [(363, 751), (99, 1102)]).parts["targets"] == by_hand
    assert round(by_hand / 1e9) == 361


def test_the_mean_over_steps_lies_between_the_dearest_and_the_cheapest() -> None:
    masks = build_masks(CONFIG.masks, GRID)
    each = [
        step_flops(CONFIG, TARGET_DIM, group_sizes(masks.sample(CONFIG.batch_size, CONFIG.seed, step))).total
        for step in range(5)
    ]
    mean = mean_step_flops(CONFIG, TARGET_DIM, masks, draws=5).total
    assert mean == pytest.approx(sum(each) / 5)
    assert min(each) < mean < max(each)
