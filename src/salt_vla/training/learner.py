"""What learns: encoder, predictor and their optimizer, built from a configuration and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from salt_vla.config import OptimizerConfig, TrainConfig
from salt_vla.models import Predictor, VideoEncoder, build_encoder, build_predictor
from salt_vla.training.schedules import cosine, warmup_cosine


@dataclass
class Learner:
    """Float32 parameters and optimizer state; only compute is ever cast lower."""

    encoder: VideoEncoder
    predictor: Predictor
    optimizer: torch.optim.AdamW

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return _named_parameters(self.encoder, self.predictor)

    def train(self, mode: bool = True) -> None:
        self.encoder.train(mode)
        self.predictor.train(mode)


def build_learner(config: TrainConfig, target_dim: int, device: str) -> Learner:
    """Fresh networks; the same configuration and seed give the same weights, and no generator moves."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = build_encoder(config.encoder).to(device)
        predictor = build_predictor(config.predictor, encoder.dim, target_dim, config.geometry).to(device)
    return Learner(encoder, predictor, _build_optimizer(encoder, predictor, config.optimizer))


def _named_parameters(encoder: VideoEncoder, predictor: Predictor) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in (("encoder", encoder), ("predictor", predictor)):
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def _spared_from_decay(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases and mask tokens are not pulled towards zero."""
    return parameter.ndim < 2 or name.endswith("mask_tokens")


def _build_optimizer(
    encoder: VideoEncoder, predictor: Predictor, config: OptimizerConfig
) -> torch.optim.AdamW:
    named = list(_named_parameters(encoder, predictor))
    decayed = [p for name, p in named if not _spared_from_decay(name, p)]
    spared = [p for name, p in named if _spared_from_decay(name, p)]
    groups = [{"params": decayed, "decayed": True}, {"params": spared, "decayed": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr_start, betas=config.betas, eps=1e-8, fused=True)


def set_rates(learner: Learner, config: TrainConfig, step: int) -> tuple[float, float]:
    """Set (learning rate, weight decay) for update number `step` (from 0), and return them."""
    o = config.optimizer
    lr = warmup_cosine(
        step,
        start=o.lr_start,
        peak=o.lr,
        final=o.lr_final,
        warmup_steps=o.warmup_steps,
        total_steps=config.steps,
    )
    decay = cosine(step, start=o.weight_decay, final=o.weight_decay_final, total_steps=config.steps)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return lr, decay
