"""What a rank holds of the named tensors of a run, as boxes of whole tensors.

Whatever cut a tensor of the unsharded model (tensor parallelism, FSDP, one inside the other), what a rank
holds of it is one box. State at rest is said in such boxes alone, so it knows no axis and no layout.
"""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ..parallel.model import Held


@dataclass(frozen=True)
class Part:
    """One box of the tensor `name`, which may be empty. A rank may hold one name twice."""

    name: str
    tensor: torch.Tensor  # plain, of the box's sizes; shares its memory with the run
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]  # of the box in the whole

    @staticmethod
    def of(held: Held, name: str) -> "Part":
        """This rank's box of a parameter, under the `name` that it has at rest."""
        offsets, sizes = held.box()
        tensor = local_of(held.parameter).detach()
        assert tuple(tensor.shape) == sizes, f"{name}: {list(tensor.shape)} held of a box of {list(sizes)}"
        return Part(name, tensor, held.shape, offsets)

    @staticmethod
    def whole(name: str, tensor: torch.Tensor) -> "Part":
        """A tensor that this rank holds all of."""
        return Part(name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(self.tensor.shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as an index into the whole."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    @property
    def at_rest(self) -> bool:
        """Whether there is something to write; an empty box counts only where the whole is empty."""
        return self.tensor.numel() > 0 or 0 in self.shape


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory; autograd does not see it taken."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
