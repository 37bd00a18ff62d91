"""What learns: encoder, predictor and their optimizer, built from a configuration and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from salt_vla.config import TrainConfig
from salt_vla.masks import MaskGroup
from salt_vla.models import Predictor, VideoEncoder, build_encoder, build_predictor
from salt_vla.models.inflate import initial_weights
from salt_vla.training.distributed import World
from salt_vla.training.networks import Networks
from salt_vla.training.optimizer import build_optimizer
from salt_vla.training.sharding import replicate, shard, whole


@dataclass
class Learner:
    """Float32 parameters and optimizer state; only compute is ever cast lower, unless the settings ask for
    an earlier attempt's mistake.

    `call` is what a step calls: the networks themselves, or what wraps them for several processes or
    compiles them. `networks` keeps the parameters' plain names.
    """

    networks: Networks
    optimizer: torch.optim.AdamW
    world: World = field(default_factory=World)
    call: Callable[..., Any] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.call is None:
            self.call = self.networks

    @property
    def encoder(self) -> VideoEncoder:
        return self.networks.encoder

    @property
    def predictor(self) -> Predictor:
        return self.networks.predictor

    @property
    def is_sharded(self) -> bool:
        """Whether each process keeps some rows of every parameter only."""
        return isinstance(self.call, FSDPModule)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.networks.named_parameters()

    def train(self, mode: bool = True) -> None:
        self.networks.train(mode)

    def sharing(self, now: bool) -> AbstractContextManager[None]:
        """Within the block a backward pass adds up gradients over all processes if `now`, else in each.

        Forward and backward pass both belong into the block."""
        if isinstance(self.call, DistributedDataParallel):
            return nullcontext() if now else self.call.no_sync()
        if isinstance(self.call, FSDPModule):
            self.call.set_requires_gradient_sync(now)
        return nullcontext()

    def accompany(self, config: TrainConfig) -> None:
        """Take part in a forward pass of the other processes without a clip of one's own: where parameters
        are shared out, networks compute only together."""
        if self.is_sharded:
            device, geometry = next(self.networks.parameters()).device, config.geometry
            first, second = torch.arange(2, device=device).view(2, 1, 1)
            tubelets = torch.zeros(1, geometry.num_tokens, geometry.patch_dim, device=device)
            self.call(tubelets, [MaskGroup(first, second)] * config.masks.num_groups)

    def look(self, tubelets: Tensor, ids: Tensor) -> Tensor:
        """The encoder's output for those tokens (batch, tokens, dim); no gradients are exchanged. Where
        parameters are shared out, all processes have to look together."""
        return self.networks.look(tubelets, ids)

    def clip_gradients(self, most: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most `most`; the norm before."""
        return whole(torch.nn.utils.clip_grad_norm_(self.networks.parameters(), most))


def check_networks(config: TrainConfig, target_dim: int) -> None:
    """Raises `ConfigError` for networks that cannot be built; allocates nothing."""
    with torch.device("meta"):
        encoder = build_encoder(config.encoder)
        build_predictor(config.predictor, encoder.dim, target_dim, config.geometry)


def build_learner(
    config: TrainConfig,
    target_dim: int,
    device: str,
    world: World | None = None,
    start: Path | None = None,
) -> Learner:
    """Fresh networks; the same configuration and seed give the same weights, and no generator moves. `start`:
    what the encoder begins with instead (`models.inflate`).

    In a `world` of several processes every one of them has to ask.
    """
    world = world or World()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = build_encoder(config.encoder).to(device)
        predictor = build_predictor(config.predictor, encoder.dim, target_dim, config.geometry).to(device)
    if start is not None:
        initial_weights(start, encoder)
    networks = Networks(encoder, predictor)
    if config.optimizer.parameters == "bfloat16":
        networks.bfloat16()
    if config.runtime.compile:
        networks.compile_blocks()
    call: Callable[..., Any] = networks
    if world.size > 1 and config.runtime.parallel == "fsdp":
        shard(networks, device, world.size)
    elif world.size > 1:
        call = replicate(networks)
    return Learner(networks, build_optimizer(networks.named_parameters(), config.optimizer), world, call)
