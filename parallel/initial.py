"""How parameters start: said by a model, by name, and carried out on whatever shard a rank holds."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

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
def fill(
    parameter: torch.Tensor,
    initial: Initial,
    *,
    seed: int,
    name: str,
    shape: tuple[int, ...] | None = None,
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> None:
    """Start this rank's part of the parameter `name`; the numbers depend on `(seed, name, global index)`
    alone.

    `box` (offsets, sizes) says where the local numbers lie in the whole of `shape`; without it they are all.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if isinstance(initial, Constant):
        local.fill_(initial.value)
        return
    offsets, sizes = box or ((0,) * local.ndim, tuple(local.shape))
    values = normal_box(seed, name, shape=shape or tuple(local.shape), offsets=offsets, sizes=sizes)
    local.copy_(torch.from_numpy(values * initial.std))
