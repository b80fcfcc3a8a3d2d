"""The model of a run as one rank holds it: its stages, and where each of its parameters lies in the whole."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .collectives import sum_over
from .context import ContextSplit
from .mesh import Axis, FoldedMesh
from .pipeline import Pipeline
from .tensor import Piece

Box = tuple[tuple[int, ...], tuple[int, ...]]


def box_of(parameter: torch.Tensor, origin: tuple[int, ...]) -> Box:
    """(offsets, sizes) of a rank's local numbers, in a whole in which its piece begins at `origin`."""
    sizes, offsets = tuple(parameter.shape), (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    return tuple(a + b for a, b in zip(origin, offsets, strict=True)), tuple(sizes)


@dataclass(frozen=True, kw_only=True)
class Held:
    """One parameter of which this rank holds a part."""

    name: str  # in the unsharded model
    parameter: nn.Parameter  # as FSDP has it: a DTensor whose shape is that of the piece
    piece: Piece
    counted: float  # share of this copy in sums over the world: copies elsewhere are counted there

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.piece.shape

    def box(self) -> Box:
        """(offsets, sizes) of the local numbers in the whole; sizes may hold 0."""
        return box_of(self.parameter, self.piece.offsets)


def kept_buffers(part: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module that belong to its state; what it computes anew is none of them."""
    kept = part.state_dict().keys()
    return {name: buffer for name, buffer in part.named_buffers() if name in kept}


@dataclass
class Sharded:
    """The model of a run on this rank: one part, or the stages of a pipeline that it runs.

    `held` names a parameter twice where two stages on this rank share it.
    """

    parts: list[nn.Module]
    held: list[Held]
    mesh: FoldedMesh
    context: ContextSplit
    tied: frozenset[str] = frozenset()  # names that the first and the last stage both hold
    pipeline: Pipeline | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def train(self, mode: bool = True) -> None:
        """Put all parts into training mode, or out of it."""
        for part in self.parts:
            part.train(mode)

    def modules(self) -> Iterator[nn.Module]:
        """Of all parts."""
        for part in self.parts:
            yield from part.modules()

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Complete the gradients of which several ranks hold parts beside the ones that FSDP sums.

        Parameters that tensor parallel ranks all hold whole are few and small (norms): their gradients
        travel together. Those that two stages share meet between the ends of the pipeline.
        """
        if self.mesh.tp.size > 1:
            _sum_together([held for held in self.held if not held.piece.split], self.mesh.tp)
        shared = defaultdict(list)
        for held in self.held:
            if held.name in self.tied:
                shared[held.name].append(held)
        for copies in shared.values():
            grads = _local_gradients(copies)
            for other in grads[1:]:  # both stages on this rank
                grads[0] += other
            if self.mesh.ends is not None and len(copies) == 1:
                sum_over(grads[0], self.mesh.ends)
            for other in grads[1:]:
                other.copy_(grads[0])


def _sum_together(held: list[Held], axis: Axis) -> None:
    """Sum gradients over `axis` in one exchange a dtype."""
    by_dtype = defaultdict(list)
    for grad in _local_gradients(held):
        by_dtype[grad.dtype].append(grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        sum_over(flat, axis)
        views = [v.view(g.shape) for v, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        torch._foreach_copy_(grads, views)


def _local_gradients(held: list[Held]) -> list[torch.Tensor]:
    grads: list[Any] = [each.parameter.grad for each in held]
    return [g._local_tensor if isinstance(g, DTensor) else g for g in grads if g is not None]
