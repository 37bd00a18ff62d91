"""What a training step costs in floating-point operations, counted from shapes, attention included.

Knows settings and sizes of masks, no tensors: torch's own counter takes attention on a CPU for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from salt_vla.config import TrainConfig
from salt_vla.masks import MaskGroup, MaskStrategy
from salt_vla.models.encoder import vit_size

GroupSizes = tuple[int, int]  # (context, target) tokens a clip in one mask group, padding included


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one clip, by part: products of matrices, a multiply-add being two.

    Norms, activations, rotations and the optimizer are not counted, as is usual: they are no matrix products.
    """

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def forward(self) -> float:
        """Student's forward passes alone: no targets, no backward, nothing computed again."""
        return sum(cost for name, cost in self.parts.items() if name.startswith(("encoder", "predictor")))


def block_flops(
    dim: int, hidden: int, tokens: int, asking: int | None = None, again: bool = False
) -> tuple[float, float]:
    """(linear layers, attention) of one transformer block's forward pass on one clip.

    `asking`: how many tokens ask, are projected and go through the MLP, where not all do. `again`: what
    activation checkpointing repeats in the backward pass, all but the last linear layer, whose output no
    gradient needs.
    """
    asking = tokens if asking is None else asking
    keys_values = 2 * tokens * dim * 2 * dim
    queries_and_output = 2 * (2 * asking * dim * dim)
    mlp = (1 if again else 2) * 2 * asking * dim * hidden
    return float(keys_values + queries_and_output + mlp), 2.0 * (2 * asking * tokens * dim)


def step_flops(config: TrainConfig, target_dim: int, sizes: Sequence[GroupSizes]) -> Flops:
    """A training step of `config` with targets `target_dim` wide, given each mask group's sizes.

    Backward costs twice the forward pass, but for the patch embedding, whose pixels need no gradient. Targets
    cost the student's forward pass over all tokens where they are a moving average of it (`ema`), nothing
    where they are cached or pixels; a frozen `teacher`'s own cost is not known here and left out.
    """
    size = vit_size(config.encoder)
    encoder_depth = config.encoder.depth or size.depth
    narrow, predictor_depth = config.predictor.dim, config.predictor.depth
    hidden = round(size.dim * size.mlp_ratio)
    tokens = config.geometry.num_tokens
    embed = 2 * config.geometry.patch_dim * size.dim
    parts = dict.fromkeys(
        (
            "encoder embedding",
            "encoder linear",
            "encoder attention",
            "predictor linear",
            "predictor attention",
        ),
        0.0,
    )
    again = 0.0
    for context, targets in sizes:
        parts["encoder embedding"] += embed * context
        linear, attention = block_flops(size.dim, hidden, context)
        parts["encoder linear"] += encoder_depth * linear
        parts["encoder attention"] += encoder_depth * attention
        parts["predictor linear"] += 2 * context * size.dim * narrow + 2 * targets * narrow * target_dim
        if config.encoder.grad_checkpointing:
            again += encoder_depth * sum(block_flops(size.dim, hidden, context, again=True))
        for number in range(predictor_depth):
            shape = (
                narrow,
                4 * narrow,
                context + targets,
                targets if number == predictor_depth - 1 else None,
            )
            linear, attention = block_flops(*shape)
            parts["predictor linear"] += linear
            parts["predictor attention"] += attention
            if config.predictor.grad_checkpointing:
                again += sum(block_flops(*shape, again=True))
    forward = sum(parts.values())
    parts["backward"] = 2 * forward - parts["encoder embedding"]
    parts["computed again"] = again
    parts["targets"] = look_flops(config, tokens) if config.target.provider == "ema" else 0.0
    return Flops(parts)


def look_flops(config: TrainConfig, tokens: int) -> float:
    """Of the encoder's forward pass over so many tokens of one clip."""
    size = vit_size(config.encoder)
    blocks = (config.encoder.depth or size.depth) * sum(
        block_flops(size.dim, round(size.dim * size.mlp_ratio), tokens)
    )
    return float(2 * config.geometry.patch_dim * size.dim * tokens + blocks)


def group_sizes(groups: Iterable[MaskGroup]) -> list[GroupSizes]:
    """(context, target) tokens a clip of a batch's mask groups: what is computed, padding included."""
    return [(group.context_ids.shape[1], group.target_ids.shape[1]) for group in groups]


FEWEST_DRAWS, CLIPS_DRAWN = 16, 1024


def mean_step_flops(
    config: TrainConfig, target_dim: int, masks: MaskStrategy, draws: int | None = None
) -> Flops:
    """`step_flops` averaged over the masks of the run's first `draws` steps. None: 16 or more, as many as
    hold 1,024 clips, since one batch's blocks are of one size and steps differ by it."""
    draws = draws or max(FEWEST_DRAWS, CLIPS_DRAWN // config.batch_size)
    total: dict[str, float] = {}
    for step in range(draws):
        sizes = group_sizes(masks.sample(config.batch_size, config.seed, step))
        for name, cost in step_flops(config, target_dim, sizes).parts.items():
            total[name] = total.get(name, 0.0) + cost / draws
    return Flops(total)
