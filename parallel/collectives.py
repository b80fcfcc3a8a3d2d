"""The collectives of a run by name, over an `Axis`. They exchange tensors or JSON text, nothing pickled.

`gather`, `reduce_scatter` and `all_to_all` are differentiable; the backward pass of each is the reverse
exchange. That is right where ranks hold *parts* of the gradient: a rank's gradient of a gathered tensor is
what its own computation contributes, and the sum over ranks is due. On a pretended axis shapes are kept and
nothing moves.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .mesh import Axis


def sum_over(tensor: torch.Tensor, axis: Axis, *, wait: bool = True) -> dist.Work | None:
    """Sum `tensor` in place over `axis`; with `wait=False` returns the handle to wait on, if there is one."""
    return _all_reduce(tensor, axis, dist.ReduceOp.SUM, wait=wait)


def max_over(tensor: torch.Tensor, axis: Axis) -> None:
    """Take the largest of each element of `tensor` in place over `axis`."""
    _all_reduce(tensor, axis, dist.ReduceOp.MAX, wait=True)


def gather(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """Each rank's x [.., n, ..] side by side along `dim`: [.., axis.size * n, ..]. Gradients are summed."""
    return x if axis.size == 1 else _Gather.apply(x, dim, axis)


def reduce_scatter(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's part along `dim` of the sum of all ranks' x: [.., axis.size * n, ..] -> [.., n, ..]."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, dim, axis)


def all_to_all(x: torch.Tensor, split_dim: int, cat_dim: int, axis: Axis) -> torch.Tensor:
    """Part r of x along `split_dim` goes to rank r; what arrives is put side by side along `cat_dim`."""
    return x if axis.size == 1 else _AllToAll.apply(x, split_dim, cat_dim, axis)


@dataclass
class Shift:
    """Tensors on their way around a ring."""

    received: list[torch.Tensor]
    works: list[dist.Work]
    sent: list[torch.Tensor]  # held until they have left

    def wait(self) -> list[torch.Tensor]:
        """What the rank before sent."""
        for work in self.works:
            work.wait()
        return self.received


def ring_shift(tensors: list[torch.Tensor], axis: Axis) -> Shift:
    """Send `tensors` to the next rank of `axis` and receive as many, alike, from the one before."""
    sent = [tensor.contiguous() for tensor in tensors]
    if axis.size == 1 or axis.group is None:
        return Shift(sent, [], [])
    received = [torch.empty_like(tensor) for tensor in sent]
    after, before = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
    ops = [dist.P2POp(dist.isend, tensor, after, axis.group) for tensor in sent]
    ops += [dist.P2POp(dist.irecv, tensor, before, axis.group) for tensor in received]
    return Shift(received, dist.batch_isend_irecv(ops), sent)


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every rank's JSON-able `value`, in rank order, on every rank."""
    if axis.size == 1:
        # Not only for the time: gloo's thread copies long texts with OpenMP, which then has threads of two
        # users and lets them sleep between operators. Steps would be a fifth longer from then on.
        return [json.loads(json.dumps(value))]
    group = axis.group
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(axis.size)]
    dist.all_gather(lengths, torch.tensor([len(text)], dtype=torch.int64, device=device), group=group)
    longest = int(max(length.item() for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in range(axis.size)]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(n.item())].cpu().numpy())) for part, n in zip(parts, lengths, strict=True)
    ]


def share_json(value: Any, axis: Axis, device: torch.device, source: int) -> Any:
    """The JSON-able `value` of rank `source` of the axis, on every rank."""
    if axis.size == 1 or axis.group is None:
        return value
    data = json.dumps(value).encode() if axis.rank == source else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(length, group=axis.group, group_src=source)
    text = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if data:
        text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(text, group=axis.group, group_src=source)
    return json.loads(bytes(text.cpu().numpy()))


def _all_reduce(tensor: torch.Tensor, axis: Axis, op: Any, *, wait: bool) -> dist.Work | None:
    if axis.size == 1 or axis.group is None:
        return None
    return dist.all_reduce(tensor, op=op, group=axis.group, async_op=not wait)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _gathered(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _reduce_scattered(grads[0], ctx.dim, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _reduce_scattered(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gathered(grads[0], ctx.dim, ctx.axis), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split_dim: int, cat_dim: int, axis: Axis) -> torch.Tensor:
        ctx.dims, ctx.axis = (split_dim, cat_dim), axis
        return _exchanged(x, split_dim, cat_dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        split_dim, cat_dim = ctx.dims
        return _exchanged(grads[0], cat_dim, split_dim, ctx.axis), None, None, None


def _gathered(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    if axis.group is None:
        return torch.cat([x] * axis.size, dim)
    parts = x.new_empty(axis.size, *x.shape)
    dist.all_gather_single(parts.view(-1), x.contiguous().view(-1), group=axis.group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)  # a copy where there are rows before `dim`


def _reduce_scattered(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    assert x.shape[dim] % axis.size == 0, f"{list(x.shape)} splits along {dim} over {axis.size} ranks"
    parts = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0)
    if axis.group is None:
        return parts[0].contiguous()
    own = x.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(own.view(-1), parts.contiguous().view(-1), group=axis.group)
    return own


def _exchanged(x: torch.Tensor, split_dim: int, cat_dim: int, axis: Axis) -> torch.Tensor:
    assert x.shape[split_dim] % axis.size == 0, f"{list(x.shape)} splits along {split_dim} over {axis.size}"
    parts = x.unflatten(split_dim, (axis.size, -1)).movedim(split_dim, 0).contiguous()
    arrived = parts
    if axis.group is not None:
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts, group=axis.group)
    return torch.cat(arrived.unbind(0), cat_dim)
