"""Memory that runs out in the midst of a run, said with the arithmetic of a step.

Knows how allocators say it; not what is done about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from salt_vla.config import TrainConfig, parse_bytes
from salt_vla.errors import ResourceError
from salt_vla.masks import build_masks
from salt_vla.training.memory import largest_sizes, step_memory

# How torch's allocators say it where they raise no kind of error of its own.
SAID = ("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID)


def explain_out_of_memory(
    config: TrainConfig, target_dim: int, error: BaseException, ranks: int = 1
) -> ResourceError:
    """The sentence for `error`, which `is_out_of_memory`: what a step takes, part by part, and the cures."""
    masks = build_masks(config.masks, config.geometry)
    sizes = largest_sizes(masks, config.batch_size, config.seed)
    needed = step_memory(config, target_dim, sizes, gpus=ranks)
    rows = config.batch_size // ranks
    said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return ResourceError(
        f"memory ran out ({said[:200]}): a step of {rows} clips, {-(-rows // config.grad_accum_steps)} at "
        f"once, takes about {needed}, and others may use the same device; lower batch_size, raise "
        f"grad_accum_steps (a clip less at once saves {needed.of_clip / 1e9:.3f} GB) or set "
        "encoder.grad_checkpointing=true, with --allow-change for this run or under another --name"
    )


@contextmanager
def memory_explained(config: TrainConfig, target_dim: int, ranks: int = 1) -> Iterator[None]:
    """Within the block a GPU is held to `runtime.memory_limit`; memory that runs out is a `ResourceError`."""
    if config.runtime.memory_limit and config.runtime.device.startswith("cuda"):
        _, whole = torch.cuda.mem_get_info(config.runtime.device)
        share = min(parse_bytes(config.runtime.memory_limit) / whole, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, config.runtime.device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(config, target_dim, error, ranks) from error
