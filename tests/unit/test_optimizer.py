"""The optimizer is torch's AdamW with the rates of each step; mistakes are made where they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from salt_vla.config import EncoderConfig, OptimizerConfig, PredictorConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.optimizer import SAMPLE, changed_share, rates, sample_of, set_rates

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    optimizer=OptimizerConfig(warmup_steps=4, betas=(0.9, 0.95)),
    steps=20,
)


def learner_of(config: TrainConfig = CONFIG) -> Learner:
    return build_learner(config, target_dim=8, device="cpu")


def with_optimizer(**changes: object) -> TrainConfig:
    return replace(CONFIG, optimizer=replace(CONFIG.optimizer, **changes))  # type: ignore[arg-type]


def gradient(parameter: Tensor, step: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def step(learner: Learner, config: TrainConfig, number: int) -> None:
    set_rates(learner.optimizer, config, number)
    for place, (_, parameter) in enumerate(learner.named_parameters()):
        parameter.grad = gradient(parameter, number, place)
    learner.optimizer.step()


def test_twenty_steps_are_torchs_own_adamw() -> None:
    """Plain, unfused and in float64, with the rates written into it before each step."""
    learner = learner_of()
    named = [(name, nn.Parameter(p.detach().double().clone())) for name, p in learner.named_parameters()]
    plain = [
        torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False) for _, p in named
    ]
    for number in range(CONFIG.steps):
        step(learner, CONFIG, number)
        lr, decay = rates(CONFIG, number)
        for place, ((name, parameter), optimizer) in enumerate(zip(named, plain, strict=True)):
            spared = parameter.ndim < 2 or name.endswith("mask_tokens")
            optimizer.param_groups[0] |= {"lr": lr, "weight_decay": 0.0 if spared else decay}
            parameter.grad = gradient(parameter.float(), number, place).double()
            optimizer.step()
    for (name, expected), (_, parameter) in zip(named, learner.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6, msg=name
        )


def test_a_cooldown_is_the_rate_of_the_steps_that_are_left() -> None:
    config = with_optimizer(schedule="cooldown", cooldown_steps=5, lr_final=0.0, lr=1e-3, lr_start=0.0)
    found = [rates(config, number)[0] for number in range(20)]
    assert found[:5] == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[5:16] == [1e-3] * 11
    assert found[16:] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])
    other_end = replace(config, steps=40)
    assert [rates(other_end, number)[0] for number in range(16)] == found[:16]


def decays(learner: Learner) -> set[str]:
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    return {
        names[id(p)] for group in learner.optimizer.param_groups if group["decayed"] for p in group["params"]
    }


def test_decay_on_everything_is_what_was_asked_for() -> None:
    config = with_optimizer(decay_all=True)
    learner = learner_of(config)
    everything = {name for name, _ in learner.named_parameters()}
    assert decays(learner) == everything > decays(learner_of())
    set_rates(learner.optimizer, config, 3)
    assert {group["weight_decay"] for group in learner.optimizer.param_groups} == {rates(config, 3)[1]}


def test_parameters_in_bfloat16_lose_what_float32_keeps() -> None:
    """At a small rate most updates are below half a unit in the last of bfloat16's eight bits."""
    small = {"lr_start": 1e-5, "lr": 1e-5, "weight_decay": 0.0, "weight_decay_final": 0.0}
    shares = {}
    for parameters in ("float32", "bfloat16"):
        config = with_optimizer(parameters=parameters, **small)
        learner = learner_of(config)
        before = sample_of(learner.named_parameters())
        step(learner, config, 0)
        shares[parameters] = changed_share(before, learner.named_parameters())
        moments = [
            value
            for state in learner.optimizer.state.values()
            for key, value in state.items()
            if key != "step"
        ]
        dtypes = {p.dtype for _, p in learner.named_parameters()} | {value.dtype for value in moments}
        assert dtypes == {getattr(torch, parameters)}
    assert shares["float32"] > 0.95 and shares["bfloat16"] < 0.4


def test_the_changed_share_is_counted() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(30, 2)), "b": nn.Parameter(torch.zeros(40))}
    before = sample_of(parameters.items())
    assert changed_share(before, parameters.items()) == 0
    with torch.no_grad():
        parameters["a"][:10].add_(1)
    assert changed_share(before, parameters.items()) == 0.2
    assert all(not tensor.any() for tensor in before)  # Copies, taken before.


def test_of_many_numbers_only_a_sample_is_looked_at() -> None:
    big = nn.Parameter(torch.zeros(2 * SAMPLE + 6))
    (taken,) = sample_of([("big", big)])
    assert len(taken) == SAMPLE + 3
    with torch.no_grad():
        big[: SAMPLE // 2].add_(1)
    assert changed_share([taken], [("big", big)]) == pytest.approx(0.25, rel=1e-3)
