"""AdamW as this project uses it: what is spared from decay, and rates that are functions of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from salt_vla.config import OptimizerConfig, TrainConfig
from salt_vla.training.schedules import cosine, warmup_cooldown, warmup_cosine

SAMPLE = 2**22  # numbers that are looked at to tell how many have changed


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Two groups of parameters: decayed, and spared from it."""
    named = list(named_parameters)
    decayed = [p for name, p in named if config.decay_all or not _spared_from_decay(name, p)]
    spared = [p for name, p in named if not config.decay_all and _spared_from_decay(name, p)]
    groups = [{"params": decayed, "decayed": True}, {"params": spared, "decayed": False, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr_start, betas=config.betas, eps=1e-8, fused=True)


def _spared_from_decay(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases and mask tokens are not pulled towards zero."""
    return parameter.ndim < 2 or name.endswith("mask_tokens")


def rates(config: TrainConfig, step: int) -> tuple[float, float]:
    """(learning rate, weight decay) of update number `step` (from 0)."""
    o = config.optimizer
    if o.schedule == "cooldown":
        lr = warmup_cooldown(
            step,
            start=o.lr_start,
            peak=o.lr,
            final=o.lr_final,
            warmup_steps=o.warmup_steps,
            cooldown_steps=o.cooldown_steps,
            total_steps=config.steps,
        )
    else:
        lr = warmup_cosine(
            step,
            start=o.lr_start,
            peak=o.lr,
            final=o.lr_final,
            warmup_steps=o.warmup_steps,
            total_steps=config.steps,
        )
    return lr, cosine(step, start=o.weight_decay, final=o.weight_decay_final, total_steps=config.steps)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> tuple[float, float]:
    """Set the rates of update number `step`, and return them."""
    lr, decay = rates(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return lr, decay


def sample_of(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
    """Copies of every n-th number of each parameter, of at most about four million in all."""
    parameters = [parameter for _, parameter in named_parameters]
    every = max(1, sum(p.numel() for p in parameters) // SAMPLE)
    return [_local(p).flatten()[::every].clone() for p in parameters]


def changed_share(before: Sequence[Tensor], named_parameters: Iterable[tuple[str, nn.Parameter]]) -> float:
    """The share of the sampled numbers that an update has changed: below 1 where it is lost in rounding."""
    after = sample_of(named_parameters)
    changed = torch.stack([(a != b).sum() for a, b in zip(before, after, strict=True)]).sum()
    return changed.item() / sum(len(sample) for sample in after)


def _local(parameter: Tensor) -> Tensor:
    """This process' own part of a parameter that is spread over several."""
    return getattr(parameter.detach(), "to_local", lambda: parameter.detach())()
