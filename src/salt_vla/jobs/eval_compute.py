"""What an encoder costs: parameters, floating-point operations a clip, and what was spent on it.

Knows networks and processes, not what is measured with them.
"""

from __future__ import annotations

import resource
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from salt_vla.evaluation.features import TokenModel
from salt_vla.teachers import Teacher

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def cost_of(model: TokenModel) -> dict[str, float]:
    """`parameters` of the whole network, and `flops_a_clip` of the part that is run; zeros for pixels."""
    if not isinstance(model, Teacher):
        return {"parameters": 0, "flops_a_clip": 0}
    return {"parameters": model.num_parameters, "flops_a_clip": forward_flops(model)}


def forward_flops(model: Teacher) -> int:
    """Of one clip through the network, counted while it runs: products of matrices, a multiply-add being two.

    Attention is run as plain products for it: torch counts none of a fused kernel on a processor.
    """
    geometry = model.geometry
    side = geometry.image_size
    clip = torch.zeros(1, geometry.num_frames, side, side, 3, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model.latents(clip)
    return int(counter.get_total_flops())


def peak_memory_gb() -> float:
    """The most that this process has held so far, of the computer's memory and of the GPU's, where it has
    one."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(host, gpu) / 1e9
