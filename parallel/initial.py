"""How parameters start: said by a model, by name, and carried out on whatever shard a rank holds."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .random import normal_box


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One number everywhere."""

    value: float


Initial = Normal | Constant


@torch.no_grad()
def fill(parameter: torch.Tensor, initial: Initial, *, seed: int, name: str) -> None:
    """Start this rank's part of the parameter `name`; the numbers depend on `(seed, name, global index)`
    alone.
    """
    shape = tuple(parameter.shape)
    local, sizes, offsets = parameter, shape, (0,) * len(shape)
    if isinstance(parameter, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            shape, parameter.device_mesh, parameter.placements
        )
        local = parameter.to_local()
    if isinstance(initial, Constant):
        local.fill_(initial.value)
        return
    values = normal_box(seed, name, shape=shape, offsets=tuple(offsets), sizes=tuple(sizes))
    local.copy_(torch.from_numpy(values * initial.std))
