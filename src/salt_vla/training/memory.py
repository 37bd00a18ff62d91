"""What a training step holds in memory, in bytes, from shapes: so that what cannot fit is known beforehand.

Knows settings and sizes of masks, no tensors. Calibrated against real steps (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salt_vla.config import TrainConfig
from salt_vla.loader import slots
from salt_vla.masks import MaskStrategy
from salt_vla.models.encoder import vit_size
from salt_vla.training.flops import GroupSizes, group_sizes

FLOAT, HALF = 4, 2
DRAWS = 8  # of masks, of which the largest count
MOST_ROWS = 64  # clips a draw: more make contexts shorter, never longer
PROCESS = {"cpu": 450_000_000, "cuda": 700_000_000}  # Python and torch; a CUDA context and its workspaces
CLIP_COPIES = 2  # of a clip's pixels as float32, at most at once: normalised, and cut into tubelets
LOSSES = 1.1  # of allocators, and what a block's backward pass needs beside what was kept for it
TARGET_COPIES = 2  # of all targets as float32: as they come, and normalised


@dataclass(frozen=True)
class Parameters:
    """Numbers that are learned, and those of the largest block, which FSDP gathers at once."""

    encoder: int
    predictor: int
    largest_block: int

    @property
    def total(self) -> int:
        return self.encoder + self.predictor


@dataclass(frozen=True)
class StepMemory:
    """Bytes by what they are for, on one device; `of_clip`: what one more clip a micro-batch adds."""

    parts: dict[str, int]
    of_clip: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        sums = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items() if size)
        return f"{sums} = {self.total / 1e9:.2f} GB"


def _block_parameters(dim: int, hidden: int) -> int:
    attention, mlp, norms = 4 * dim * (dim + 1), 2 * dim * hidden + hidden + dim, 4 * dim
    return attention + mlp + norms


def parameters(config: TrainConfig, target_dim: int) -> Parameters:
    """As `build_encoder` and `build_predictor` make them. Raises `ConfigError` for an unknown encoder."""
    size, narrow = vit_size(config.encoder), config.predictor.dim
    hidden = round(size.dim * size.mlp_ratio)
    block, small = _block_parameters(size.dim, hidden), _block_parameters(narrow, 4 * narrow)
    embed, norm = (config.geometry.patch_dim + 1) * size.dim, 2 * size.dim
    ends = (size.dim + 1) * narrow + 2 * narrow + (narrow + 1) * target_dim
    predictor = ends + config.predictor.num_mask_tokens * narrow + config.predictor.depth * small
    depth = config.encoder.depth or size.depth
    return Parameters(embed + depth * block + norm, predictor, max(block, small, embed))


def block_activations(dim: int, hidden: int, tokens: int, asking: int, half: bool) -> int:
    """Bytes that one block keeps for its backward pass on one clip; `asking` tokens ask and enter the MLP.

    Kept: the input and output of both norms, queries, keys and values before and after they are turned, the
    attention's output twice (by head, by token), the MLP's hidden layer before and after its GELU. Under
    bfloat16 autocast norms see float32, and what linear layers and attention see is half as wide.
    """
    wide, narrow = FLOAT, HALF if half else FLOAT
    norms = (tokens + asking) * dim * (wide + narrow)
    attention = (2 * (2 * tokens + asking) + 2 * asking) * dim * narrow
    return norms + attention + 2 * asking * hidden * narrow


def activations(config: TrainConfig, target_dim: int, sizes: Sequence[GroupSizes]) -> int:
    """Bytes that a clip's forward passes keep, over all mask groups."""
    size, narrow = vit_size(config.encoder), config.predictor.dim
    hidden, depth = round(size.dim * size.mlp_ratio), config.encoder.depth or size.depth
    half = "bfloat16" in (config.runtime.precision, config.optimizer.parameters)
    kept = again = 0
    for context, targets in sizes:
        both = context + targets
        of_encoder = block_activations(size.dim, hidden, context, context, half)
        of_predictor = block_activations(narrow, 4 * narrow, both, both, half)
        last = block_activations(narrow, 4 * narrow, both, targets, half)
        if config.encoder.grad_checkpointing:
            kept += depth * context * size.dim * FLOAT
            again = max(again, of_encoder)
        else:
            kept += depth * of_encoder
        if config.predictor.grad_checkpointing:
            kept += config.predictor.depth * both * narrow * FLOAT
            again = max(again, of_predictor)
        else:
            kept += (config.predictor.depth - 1) * of_predictor + last
        kept += context * (config.geometry.patch_dim + 2 * size.dim + narrow) * FLOAT
        kept += (2 * both * narrow + 3 * targets * target_dim) * FLOAT
    return kept + again


def step_memory(
    config: TrainConfig,
    target_dim: int,
    sizes: Sequence[GroupSizes],
    record_bytes: int = 0,
    gpus: int = 1,
) -> StepMemory:
    """A step of `config.batch_size` clips shared out over `gpus`, on each of them; `sizes`: (context, target)
    tokens of each mask group. A teacher that runs in the loop comes on top and is not known here."""
    device = "cuda" if config.runtime.device.startswith("cuda") or gpus > 1 else "cpu"
    p, geometry = parameters(config, target_dim), config.geometry
    sharded = gpus if gpus > 1 and config.runtime.parallel == "fsdp" else 1
    each = HALF if config.optimizer.parameters == "bfloat16" else FLOAT
    rows = -(-config.batch_size // gpus)
    micro = -(-rows // config.grad_accum_steps)
    pixels = geometry.num_tokens * geometry.patch_dim * FLOAT * CLIP_COPIES
    targets = geometry.num_tokens * target_dim * FLOAT * TARGET_COPIES
    of_step = int(LOSSES * activations(config, target_dim, sizes))
    of_clip = of_step + pixels + targets
    # Counted beside all activations: allocators do not fit the one into holes of the other. While several
    # groups' shares of a weight's gradient are added up, that of the micro-batches before is there as well.
    sums = 2 if config.grad_accum_steps > 1 and len(sizes) > 1 else 1
    averaged = p.total * bool(config.optimizer.average) + p.encoder * (config.target.provider == "ema")
    lower = p.total * HALF if config.runtime.precision == "bfloat16" else 0
    clips = rows * (geometry.clip_bytes + record_bytes)
    return StepMemory(
        {
            "process": PROCESS[device],
            "weights": p.total * each // sharded + (2 * p.largest_block * each if sharded > 1 else 0),
            "moments": 2 * p.total * each // sharded,
            "averages": averaged * FLOAT // sharded,
            "bfloat16 weights": lower // sharded,
            "gradients": sums * p.total * each // sharded,
            "activations": micro * of_step,
            "pixels and targets": micro * (pixels + targets),
            "batches": clips * (2 if device == "cuda" else 1),  # On a GPU the next one is there already.
        },
        of_clip,
    )


def largest_sizes(masks: MaskStrategy, batch_size: int, seed: int, draws: int = DRAWS) -> list[GroupSizes]:
    """(context, target) tokens of each mask group in that of a run's first steps that has most of them."""
    rows = min(batch_size, MOST_ROWS)
    drawn = [group_sizes(masks.sample(rows, seed, step)) for step in range(draws)]
    return max(drawn, key=lambda sizes: sum(map(sum, sizes)))


def shared_memory(config: TrainConfig, record_bytes: int = 0, gpus: int = 1) -> int:
    """Bytes of /dev/shm that one rank's loader processes take."""
    data, rows = config.data, -(-config.batch_size // gpus)
    each = rows * (config.geometry.clip_bytes + record_bytes)
    return data.num_workers * slots(data.prefetch) * each if data.num_workers else 0


def host_memory(config: TrainConfig, target_dim: int, record_bytes: int = 0, gpus: int = 1) -> int:
    """Bytes of RAM beside /dev/shm that one rank takes where its step runs on a GPU: its processes, pinned
    batches, and the copy of weights, moments and averages that a checkpoint is written from."""
    rows = -(-config.batch_size // gpus)
    processes = (1 + config.data.num_workers) * PROCESS["cpu"]
    pinned = 2 * rows * (config.geometry.clip_bytes + record_bytes)
    return processes + pinned + checkpoint_bytes(config, target_dim)


def checkpoint_bytes(config: TrainConfig, target_dim: int) -> int:
    """Of weights, two moments each, and averages, in float32."""
    p = parameters(config, target_dim)
    averages = p.total * bool(config.optimizer.average) + p.encoder * (config.target.provider == "ema")
    return (3 * p.total + averages) * FLOAT
