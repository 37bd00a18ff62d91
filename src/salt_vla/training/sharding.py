"""Networks that several processes hold: each a copy of them, or each some rows of every parameter.

Knows torch's DDP, FSDP2 and DTensor, not what is learned; what every process has whole passes
unchanged.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from salt_vla.training.networks import Networks


def replicate(networks: Networks) -> DistributedDataParallel:
    """Let every process keep all parameters, and add up gradients while they are computed."""
    with warnings.catch_warnings():
        # The keyword's successor is younger than the oldest torch that we take.
        warnings.filterwarnings("ignore", message=".*forward_sync_buffers", category=FutureWarning)
        return DistributedDataParallel(networks, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(networks: Networks, device: str, processes: int) -> None:
    """Let each process keep its rows of every parameter, and gather a block's while it computes.

    In place: `networks` is then called as before, by all processes together, and names stay plain.
    """
    # Said of tensors that are changed in place, of which there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(torch.device(device).type, (processes,))
    for block in (*networks.encoder.blocks, *networks.predictor.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(networks, mesh=mesh, reshard_after_forward=True)  # Between two steps nothing is whole.
    register_fsdp_forward_method(networks, "look")


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> Tensor:
    """The rows that this process keeps, as a plain tensor over the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def alike(full: Tensor, model: Tensor) -> Tensor:
    """`full`, which every process has whole, cut and placed as `model` is."""
    if not isinstance(model, DTensor):
        return full
    return distribute_tensor(full.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
