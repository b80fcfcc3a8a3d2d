"""AdamW over flat buffers, and the norms of every tensor in one: thousands of tensors, a few calls.

A call on a small tensor costs more than its arithmetic, so tensors of a kind share one buffer and are updated
in one call. AdamW is elementwise (Loshchilov and Hutter, arXiv 1711.05101): the padding between tensors is
updated along and seen by nobody. Each tensor starts at a multiple of 256 bytes, which is a whole number of
vector registers and of memory transactions, so an element's bits depend on nothing that lies beside it.

Norms: squares are summed in fp32 within blocks of 64 elements and in fp64 beyond. Vectorised over at least 8
lanes a block has a chain of at most 16 roundings, and a square root halves a relative error: 9 * 2^-24, below
1e-6 for a norm of any length. Plain fp32 sums lose that after some ten thousand elements.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .config import Path
from .dispatch import HALF, choose

ALIGNMENT = 64  # elements; 256 bytes of fp32
BUFFER_BYTES = 256 * 1024**2
GATHER_BYTES = 1024**2  # small tensors are squared this many bytes at a time: copies that stay in the cache


@dataclass(frozen=True)
class FlatLayout:
    """Where tensors lie in one buffer: tensor i fills `shapes[i]` from element `starts[i]` on."""

    shapes: tuple[torch.Size, ...]
    starts: tuple[int, ...]
    numel: int  # of the buffer, a multiple of the alignment

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], rooms: Sequence[int] | None = None) -> "FlatLayout":
        """Tensors one after the other; `rooms`: elements to keep for each, at least those of its shape."""
        rooms = [math.prod(shape) for shape in shapes] if rooms is None else rooms
        ends = list(itertools.accumulate((aligned(room) for room in rooms), initial=0))
        return cls(tuple(torch.Size(shape) for shape in shapes), tuple(ends[:-1]), ends[-1])

    @property
    def has_gaps(self) -> bool:
        """Whether some elements of the buffer belong to no tensor."""
        return self.numel > sum(shape.numel() for shape in self.shapes)

    def view(self, buffer: torch.Tensor, index: int) -> torch.Tensor:
        """Tensor `index` in `buffer` [numel], sharing its memory."""
        shape, start = self.shapes[index], self.starts[index]
        return buffer[start : start + shape.numel()].view(shape)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Every tensor in `buffer` [numel], sharing its memory."""
        return [self.view(buffer, index) for index in range(len(self.shapes))]

    def span(self, first: int, last: int) -> slice:
        """The elements of tensors `first` to `last` - 1, with the padding between and after them."""
        return slice(self.starts[first], self.starts[last] if last < len(self.starts) else self.numel)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """Tensor i has blocks `blocks[i]` to `blocks[i + 1]` of the alignment's length: [tensors + 1]."""
        return torch.tensor([*self.starts, self.numel]) // ALIGNMENT


def aligned(numel: int) -> int:
    """`numel` with the padding behind it."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def share_buffers(
    sizes: Sequence[int], kinds: Sequence[Hashable], limit_bytes: int = BUFFER_BYTES
) -> list[list[int]]:
    """Which tensors share a buffer: places of tensors of one kind, in order, of at most `limit_bytes`.

    `sizes` are bytes, padding included; a kind is all that tensors must have in common (dtype, weight decay).
    A tensor above the limit has a buffer to itself.
    """
    groups: list[list[int]] = []
    current: dict[Hashable, tuple[list[int], int]] = {}
    for place, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        group, filled = current.get(kind, ([], 0))
        if not group or filled + size > limit_bytes:
            group, filled = [], 0
            groups.append(group)
        group.append(place)
        current[kind] = group, filled + size
    return groups


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None = None,
    path: Path = "auto",
) -> None:
    """Update buffers of parameters and of both moments in place; `step` counts updates, this one too.

    Buffers i are [N_i] and contiguous, all of one dtype on one device. Gradients are divided by
    `grad_scale`, a scalar tensor, and may be overwritten. Moments of 16-bit parameters are fp32.
    """
    if not params:
        return
    options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "grad_scale": grad_scale}
    chosen = choose("adamw", params[0], path).path
    buffers = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    if chosen != "reference":  # kernels read memory as it lies, whatever the strides say
        alike = all(x.is_contiguous() and x.numel() == flat[0].numel() for flat in buffers for x in flat)
        assert alike, "buffers are contiguous and of one size"
    if chosen == "cpu":
        # one step for all; the kernel only reads it
        steps = [torch.tensor(float(step))] * len(params)
        lists: Any = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps)
        torch._fused_adamw_(*lists, beta1=betas[0], beta2=betas[1], amsgrad=False, maximize=False, **options)
        return
    update: Callable[..., None] = adamw_reference_
    if chosen == "triton":
        from .gpu.adamw import adamw_ as update
    for flat in buffers:
        update(*flat, step=step, betas=betas, **options)


def adamw_reference_(
    params: torch.Tensor,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """The formula, in the order in which torch.optim.AdamW computes it without `foreach` and `fused`."""
    wide = params.to(exp_avg.dtype)  # itself but for 16-bit parameters
    grads = grads.to(exp_avg.dtype)
    if grad_scale is not None:
        grads = grads / grad_scale
    wide.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grads, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grads, grads, value=1 - betas[1])
    first, second = (1 - beta**step for beta in betas)
    wide.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / second**0.5).add_(eps), value=-lr / first)
    if wide is not params:
        params.copy_(wide)


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the moments of parameters of `dtype`."""
    return torch.float32 if dtype in HALF else dtype


def norms(flat: torch.Tensor, layout: FlatLayout, path: Path = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of all squares, a fp64 scalar; norm of every tensor, fp64 [tensors]) of `flat` [layout.numel].

    One pass over `flat`, whose padding is zero. Same input, same bits.
    """
    assert flat.shape == (layout.numel,), "the buffer is the layout's"
    chosen = choose("adamw", flat, path).path
    if chosen == "triton":
        from .gpu.adamw import segment_squares

        squares = segment_squares(flat.contiguous(), layout.blocks.to(flat.device))
    elif chosen == "cpu" and layout.numel:
        block_squares = block_norms(flat.contiguous()).double().square()
        squares = torch.segment_reduce(block_squares, "sum", offsets=layout.blocks, initial=0.0)
    else:
        squares = flat.new_zeros(len(layout.shapes), dtype=torch.float64)
        for index, view in enumerate(layout.views(flat)):
            squares[index] = view.double().square().sum()
    return squares.sum(), squares.sqrt()


def square_sum(tensors: Sequence[torch.Tensor], path: Path = "auto") -> torch.Tensor:
    """Sum of the squares of all elements of `tensors`, at least one, all on one device: a fp64 scalar."""
    chosen = choose("adamw", tensors[0], path).path
    if chosen == "cpu" and all(tensor.dtype is torch.float32 for tensor in tensors):
        blocks = torch.cat([block_norms(flat) for flat in _gathered(tensors)])
        return torch.linalg.vector_norm(blocks, dtype=torch.float64).square()
    if chosen == "triton":  # its blocks are trees of fp32 sums, as precise as ours
        return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def block_norms(flat: torch.Tensor) -> torch.Tensor:
    """Norm of every 64 elements of `flat` [N] contiguous, the last block may be shorter: [ceil(N / 64)]."""
    whole = flat.numel() // ALIGNMENT * ALIGNMENT
    if whole == flat.numel():
        return torch.linalg.vector_norm(flat.view(-1, ALIGNMENT), dim=1)
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, ALIGNMENT), dim=1)
    return torch.cat([blocks, torch.linalg.vector_norm(flat[whole:]).view(1)])


def _gathered(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All elements of fp32 `tensors`, flat: large tensors as they lie, small ones copied together.

    What it yields holds until the next is asked for.
    """
    limit = GATHER_BYTES // 4
    stage = torch.empty(limit, device=tensors[0].device)
    small: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        numel = tensor.numel()
        if numel > limit // 16:  # worth calls of its own
            yield tensor.reshape(-1)
            continue
        if filled + numel > limit:
            yield torch.cat(small, out=stage[:filled])
            small, filled = [], 0
        small.append(tensor.reshape(-1))
        filled += numel
    if small:
        yield torch.cat(small, out=stage[:filled])
