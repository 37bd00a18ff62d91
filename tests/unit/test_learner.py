"""The learner is a function of its configuration and seed, keeps float32, and decays only what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salt_vla.config import EncoderConfig, OptimizerConfig, PredictorConfig, TrainConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.training.learner import Learner, build_learner, check_networks
from salt_vla.training.optimizer import set_rates
from salt_vla.training.runtime import resolve_device
from salt_vla.training.schedules import cosine, warmup_cosine

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)  # 2 × 4 × 4 tokens
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    optimizer=OptimizerConfig(warmup_steps=4),
    steps=20,
    seed=3,
)


def learner_of(config: TrainConfig = CONFIG) -> Learner:
    return build_learner(config, target_dim=8, device="cpu")


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}


def test_same_seed_gives_the_same_weights() -> None:
    first = weights(learner_of())
    torch.rand(7)  # Whatever was drawn in between.
    second = weights(learner_of())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_seeds_give_other_weights() -> None:
    first, second = weights(learner_of()), weights(learner_of(replace(CONFIG, seed=4)))
    random = [name for name, tensor in first.items() if tensor.unique().numel() > 1]
    assert len(random) > 5
    assert not any(torch.equal(first[name], second[name]) for name in random)


def test_networks_that_cannot_be_built_are_told_apart_without_building_any() -> None:
    check_networks(CONFIG, target_dim=8)
    gigantic = replace(CONFIG, encoder=replace(CONFIG.encoder, name="vit_gigantic", depth=0))
    check_networks(gigantic, target_dim=8)  # 7 GB, if they were there.
    for wrong in ("vit_bass", "vit_micro_patch16_224"):
        with pytest.raises(ConfigError, match=r"encoder\.name"):
            check_networks(replace(CONFIG, encoder=replace(CONFIG.encoder, name=wrong)), target_dim=8)
    odd = replace(CONFIG, predictor=replace(CONFIG.predictor, dim=14))
    with pytest.raises(ConfigError, match="choose an even width"):
        check_networks(odd, target_dim=8)


def test_encoders_of_one_seed_do_not_depend_on_the_predictor() -> None:
    """Recipes that differ in the predictor alone start from the same encoder."""
    deeper = replace(CONFIG, predictor=replace(CONFIG.predictor, depth=3, dim=32))
    ours, theirs = learner_of().encoder.state_dict(), learner_of(deeper).encoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_building_moves_no_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    learner_of()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_is_optimised_once_and_is_float32() -> None:
    learner = learner_of()
    grouped = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in learner.named_parameters())
    modules = (learner.encoder, learner.predictor)
    assert len(grouped) == len(set(grouped)) == sum(len(list(m.parameters())) for m in modules)
    assert {p.dtype for _, p in learner.named_parameters()} == {torch.float32}


def test_weight_decay_spares_norms_biases_and_mask_tokens() -> None:
    """With gradients of zero, decay is all that can move a parameter."""
    learner = learner_of()
    with torch.no_grad():
        for _, parameter in learner.named_parameters():
            parameter.add_(1)  # Biases start at zero, where decay would not show.
    before = weights(learner)
    set_rates(learner.optimizer, CONFIG, step=4)
    for _, parameter in learner.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    for name, parameter in learner.named_parameters():
        is_spared = "norm" in name or name.endswith("bias") or name == "predictor.mask_tokens"
        assert torch.equal(parameter, before[name]) == is_spared, name
        assert is_spared or (parameter.detach() / before[name]).allclose(
            torch.tensor(1 - CONFIG.optimizer.lr * cosine(4, start=0.04, final=0.4, total_steps=20))
        ), name


@pytest.mark.parametrize("step", [0, 2, 4, 11, 19])
def test_rates_of_a_step_are_the_schedules(step: int) -> None:
    learner, o = learner_of(), CONFIG.optimizer
    lr, decay = set_rates(learner.optimizer, CONFIG, step)
    assert lr == warmup_cosine(
        step, start=o.lr_start, peak=o.lr, final=o.lr_final, warmup_steps=4, total_steps=20
    )
    assert decay == cosine(step, start=o.weight_decay, final=o.weight_decay_final, total_steps=20)
    decayed, spared = learner.optimizer.param_groups
    assert (decayed["lr"], decayed["weight_decay"]) == (lr, decay)
    assert (spared["lr"], spared["weight_decay"]) == (lr, 0.0)


def test_betas_are_those_of_the_recipe() -> None:
    learner = learner_of(replace(CONFIG, optimizer=replace(CONFIG.optimizer, betas=(0.8, 0.95))))
    assert {group["betas"] for group in learner.optimizer.param_groups} == {(0.8, 0.95)}


def test_train_and_eval_reach_both_networks() -> None:
    learner = learner_of()
    assert learner.encoder.training and learner.predictor.training
    learner.train(False)
    assert not learner.encoder.training and not learner.predictor.training
    learner.train()
    assert learner.encoder.training and learner.predictor.training


def test_device_and_threads_are_filled_in_where_they_were_left_open() -> None:
    resolved = resolve_device(CONFIG).runtime
    assert resolved.device in {"cpu", "cuda"} and resolved.threads >= 1
    asked = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", threads=3))
    assert resolve_device(asked) == asked
