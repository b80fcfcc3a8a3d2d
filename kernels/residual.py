"""Bias, gate, dropout and residual addition in one step: residual + dropout(gate * (x + bias)).

The step behind every attention and product of an Evoformer, whose dropout masks are shared along an axis
(`shared_dim`: all rows, or all columns, are dropped alike), and of transformers, whose masks are not. The
mask is never stored (`dropout.py`): without a gate the backward pass needs the seed and nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .config import Path
from .dispatch import KernelError, at_least_fp32, choose
from .dropout import Dropout, draw, make_dropout, mask_reference

Maybe = torch.Tensor | None
STRETCH = 2**18  # numbers at a time on the CPU, 1 MB in fp32: what a core's cache holds


def bias_dropout_residual_reference(
    x: torch.Tensor, bias: Maybe, residual: torch.Tensor, gate: Maybe, dropout: Dropout
) -> torch.Tensor:
    """residual + mask * scale * gate * (x + bias), in fp32 at least; [..., D]."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    wide = at_least_fp32(dtype)
    found = x.to(wide)
    if bias is not None:
        found = found + bias.to(wide)
    if gate is not None:
        found = found * gate.to(wide)
    if dropout.kept < 2**32:
        mask = mask_reference(dropout, x.device).to(wide) * dropout.scale
        found = (found.reshape(dropout.shape) * mask).view(x.shape)
    return (residual.to(wide) + found).to(dtype)


def bias_dropout_residual(
    x: torch.Tensor,
    bias: Maybe,
    residual: torch.Tensor,
    *,
    p: float,
    training: bool,
    seed: int,
    shared_dim: int | None = None,
    gate: Maybe = None,
    path: Path = "auto",
) -> torch.Tensor:
    """residual + dropout(gate * (x + bias)): x, residual, gate [..., D], bias [D]. One seed, one mask."""
    dropout = make_dropout(tuple(x.shape), p=p, training=training, seed=seed, shared_dim=shared_dim)
    same = [t for t in (residual, gate) if t is not None]
    if any(t.shape != x.shape for t in same) or (bias is not None and bias.shape != x.shape[-1:]):
        raise KernelError(
            f"x is {list(x.shape)}, residual and gate are {[list(t.shape) for t in same]}: they need one "
            f"shape, and the bias {list(x.shape[-1:])}"
        )
    chosen = choose("residual", x, path).path
    # a compiler fuses the reference into its neighbours, and cannot look into the other paths
    if chosen == "reference" or torch.compiler.is_compiling():
        return bias_dropout_residual_reference(x, bias, residual, gate, dropout)
    if chosen == "cpu":
        return _Residual.apply(x, bias, residual, gate, dropout, CPU)
    from .gpu.residual import backward, forward  # triton is optional

    return _Residual.apply(x, bias, residual, gate, dropout, Passes(forward, backward))


@dataclass(frozen=True)
class Passes:
    """The two passes of one path."""

    # (x, bias, residual, gate, dropout) -> the result
    forward: Callable[[torch.Tensor, Maybe, torch.Tensor, Maybe, Dropout], torch.Tensor]
    # (grad, x, bias, gate, dropout, is bias's wanted) -> grads of x, bias, gate; without a gate x is None
    backward: Callable[[torch.Tensor, Maybe, Maybe, Maybe, Dropout, bool], tuple[torch.Tensor, Maybe, Maybe]]


class _Residual(torch.autograd.Function):
    """The passes of one path as a step of autograd. Without a gate nothing is kept: the seed is enough."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: Maybe,
        residual: torch.Tensor,
        gate: Maybe,
        dropout: Dropout,
        passes: Passes,
    ) -> torch.Tensor:
        gated = (x, bias, gate) if gate is not None else (None, None, None)
        ctx.save_for_backward(*gated)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, bias, residual, gate))
        ctx.dropout, ctx.backward_pass = dropout, passes.backward
        return passes.forward(x, bias, residual, gate, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        x, bias, gate = ctx.saved_tensors
        for_x, for_bias, for_gate = ctx.backward_pass(
            grad, x, bias, gate, ctx.dropout, ctx.needs_input_grad[1]
        )
        wanted = zip((for_x, for_bias, grad, for_gate), ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(g.to(dtype) if g is not None and needed else None for g, dtype, needed in wanted), None, None


def cpu_forward(
    x: torch.Tensor, bias: Maybe, residual: torch.Tensor, gate: Maybe, dropout: Dropout
) -> torch.Tensor:
    """See `Passes`."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    wide = at_least_fp32(out.dtype)
    bias = None if bias is None else bias.to(wide)
    for part, factor, base, target, mask in _stretches(dropout, wide, x, gate, residual, out):
        part, base = part.to(wide), base.to(wide)
        into = target if target.dtype == wide else part  # which then is a copy
        if bias is not None:
            part = torch.add(part, bias, out=into)
        if factor is not None:
            part = torch.mul(part, factor.to(wide), out=into)
        if mask is None:
            torch.add(base, part, out=into)
        else:
            torch.addcmul(base, part, mask, out=into)
        if into is not target:
            target.copy_(into)
    return out


def cpu_backward(
    grad: torch.Tensor, x: Maybe, bias: Maybe, gate: Maybe, dropout: Dropout, bias_wanted: bool
) -> tuple[torch.Tensor, Maybe, Maybe]:
    """See `Passes`."""
    wide = at_least_fp32(grad.dtype)
    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    grad_gate = None if gate is None else torch.empty_like(grad_x)
    grad_bias = torch.zeros(grad.shape[-1], dtype=wide, device=grad.device) if bias_wanted else None
    tensors = (grad, x, gate, grad_x, grad_gate)
    for part, number, factor, target, gate_target, mask in _stretches(dropout, wide, *tensors):
        found, last = part.to(wide), target if target.dtype == wide else None
        if mask is not None:
            found = torch.mul(found, mask, out=last if factor is None else None)
        if factor is not None:
            number = number.to(wide) if bias is None else torch.add(number.to(wide), bias.to(wide))
            gate_target.copy_(number * found)
            found = torch.mul(found, factor.to(wide), out=last)
        if grad_bias is not None:
            grad_bias += found.sum((0, 1, 2))
        if found is not target:
            target.copy_(found)
    return grad_x, grad_bias, grad_gate


CPU = Passes(cpu_forward, cpu_backward)


def _stretches(dropout: Dropout, wide: torch.dtype, *tensors: Maybe) -> Iterator[tuple[Any, ...]]:
    """The same part [a, l, I, D] of every tensor, and its mask times the scale, None where all is kept."""
    (groups, length, inner, dim), width = dropout.shape, dropout.width
    views = [None if t is None else t.reshape(dropout.shape) for t in tensors]
    device = next(t.device for t in tensors if t is not None)
    size = max(1, inner * dim)
    a_step, l_step = max(1, STRETCH // (size * max(1, length))), max(1, STRETCH // size)
    for a in range(0, groups, a_step):
        mask = None
        if dropout.kept < 2**32:
            mask = torch.empty(min(a_step, groups - a), 1, inner, width, dtype=wide, device=device)
            draw(mask.view(-1), a * inner * width, dropout)
        for at in range(0, length, l_step):
            yield *(None if t is None else t[a : a + a_step, at : at + l_step] for t in views), mask
