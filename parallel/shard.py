"""Sharded and replicated data parallelism with FSDP2.

Gradients are summed over ranks, never averaged: the loss is divided once, by the global number of valid
tokens, before the backward pass. A replicated layout is the hybrid one with shards of one rank, so all three
are one path.
"""

from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .mesh import FoldedMesh


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units of sharding and recompute: the members of the outermost `nn.ModuleList`s."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def apply_sharding(model: nn.Module, mesh: FoldedMesh, *, compute: Literal["fp32", "bf16"]) -> None:
    """Shard `model` in place over `mesh`; every parameter becomes a DTensor named as before."""
    assert mesh.sharding is not None, "a pretended mesh shards nothing"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute == "bf16" else None, reduce_dtype=torch.float32
    )
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh.sharding, mp_policy=policy)
    fully_shard(model, mesh=mesh.sharding, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no pre-multiplied sum, and the loss is divided already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
