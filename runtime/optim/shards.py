"""The local tensors of a model and the memory that they live in.

FSDP gathers from a padded piece of memory of its own, which the model's tensor is a view of. Whoever gives a
shard another home tells both. A `Memory` that outlives the process lets a shard come home to its numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...parallel.model import Held
from ..part import local_of


class Memory(Protocol):
    """Hands out pieces of memory in the order in which it is asked, the same in every life of a rank."""

    def take(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """A tensor [numel], and whether it holds the numbers of an earlier life, which then count."""


@dataclass
class Shard:
    """One parameter that this rank holds a part of, and the plain tensor that shares its local memory."""

    held: Held
    local: torch.Tensor
    fsdp: Any = None  # what FSDP keeps of it, see `kept_by_fsdp`
    moments: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def parameter(self) -> nn.Parameter:
        """What the model computes with, as FSDP made it."""
        return self.held.parameter

    @property
    def room(self) -> int:
        """Elements that its memory must have: FSDP gathers shards of one size, the last ones padded."""
        return self.fsdp._sharded_param_data.numel() if self.fsdp is not None else self.local.numel()

    @property
    def movable(self) -> bool:
        """Whether its memory may be replaced: a plain tensor, or one of FSDP's that is nothing special."""
        if isinstance(self.parameter, DTensor):
            return self.fsdp is not None and type(self.local) is torch.Tensor and not self.fsdp.offload_to_cpu
        return type(self.parameter) is nn.Parameter

    def move(self, home: torch.Tensor, *, kept: bool = False) -> None:
        """Let everyone use the numbers in `home` [room]: those that are there if they are `kept`, else a copy
        of the ones so far in what is zero now.
        """
        local = home[: self.local.numel()].view(self.local.shape)
        if not kept:
            local.copy_(self.local)
        assert self.movable, f"the shard of {self.held.name} is contiguous, or nobody else holds it"
        if isinstance(self.parameter, DTensor):
            # both, as FSDP has them: the memory that it gathers from, and the part of it that is no padding
            self.fsdp._sharded_param_data = home
            self.parameter._local_tensor = local
        else:
            self.parameter.data = local
        self.local = local

    def settle(self, memory: Memory) -> None:
        """Move into a piece of `memory` of its own."""
        home, kept = zeros_in(memory, self.room, like=self.local)
        self.move(home, kept=kept)


def shards_of(held: Iterable[Held], parts: Iterable[nn.Module]) -> list[Shard]:
    """What this rank holds of each parameter, empty shards too."""
    kept = kept_by_fsdp(parts)
    return [Shard(each, local_of(each.parameter).detach(), kept.get(id(each.parameter))) for each in held]


def zeros_in(
    memory: Memory | None, numel: int, *, like: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, bool]:
    """(tensor [numel], whether it holds kept numbers; else it is zero), on the heap without a `memory`."""
    if memory is None:
        return like.new_zeros(numel, dtype=dtype), False
    home, kept = memory.take(numel, dtype or like.dtype)
    if not kept:
        home.zero_()
    return home, kept


def settle_buffer(buffer: torch.Tensor, memory: Memory) -> None:
    """Move a module's buffer into `memory`; whoever holds the tensor has it there."""
    home, kept = memory.take(buffer.numel(), buffer.dtype)
    home = home.view(buffer.shape)
    if not kept:
        home.copy_(buffer)
    buffer.data = home


def kept_by_fsdp(parts: Iterable[nn.Module]) -> dict[int, Any]:
    """FSDP's record of each parameter by the parameter's id, which knows the padded memory of the shard."""
    return {
        id(record.sharded_param): record
        for part in parts
        for module in part.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for record in group.fsdp_params
    }
