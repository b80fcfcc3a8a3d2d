"""RMSNorm and LayerNorm, alone or behind the addition of a residual.

RMSNorm: arXiv 1910.07467, LayerNorm: arXiv 1607.06450. With n = (x - mean) * rstd, where RMSNorm has no mean,
and h = weight * grad, both have one closed backward pass:

    grad_x = rstd * (h - n * mean(h * n) - mean(h)),  grad_weight = sum of grad * n,  grad_bias = sum of grad

(RMSNorm without mean(h)), so all that is kept is x, or its sum with the residual, and a number or two a row.
The CPU path runs torch's fused pass of LayerNorm, for both, over stretches of rows that the cache holds, in
fp32 at least. Given bf16, that pass would sum the gradients of weights in bf16: off by 7% after 4,096 rows.
Only the reference can be differentiated twice. Shapes: D model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .config import Path
from .dispatch import KernelError, at_least_fp32, choose

Maybe = torch.Tensor | None
# (x, residual, weight, bias, eps) -> (normed, sum or None, mean or None, rstd); without a bias it is RMSNorm
Forward = Callable[
    [torch.Tensor, Maybe, torch.Tensor, Maybe, float], tuple[torch.Tensor, Maybe, Maybe, torch.Tensor]
]
# (grad, grad of the sum or None, x or the sum, weight, mean or None, rstd) -> grads of x, weight, bias
Backward = Callable[
    [torch.Tensor, Maybe, torch.Tensor, torch.Tensor, Maybe, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor, Maybe],
]

# Numbers at a time on the CPU, 1 MB in fp32: larger ones leave the cache, smaller ones pay for more calls.
STRETCH = 2**18
WIDEST = 16_384  # columns that a program on the device holds in registers


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] scaled to unit root-mean-square in fp32, in x's dtype again, times weight [D]."""
    wide = x.to(at_least_fp32(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.type_as(x) * weight


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """x [..., D] to mean 0 and variance 1, times weight [D] plus bias [D], all in fp32; x's dtype."""
    wide = x.to(at_least_fp32(x.dtype))
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.to(wide.dtype) + bias.to(wide.dtype)).type_as(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, path: Path = "auto") -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D], of the dtype that x and weight promote to."""
    passes = _passes(x, None, weight, path)
    return _Norm.apply(x, None, weight, None, eps, passes) if passes else rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, path: Path = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual), both [..., D]; gradients flow through both."""
    if passes := _passes(x, residual, weight, path):
        return _Norm.apply(x, residual, weight, None, eps, passes)
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, path: Path = "auto"
) -> torch.Tensor:
    """x [..., D], weight and bias [D] -> [..., D], x's dtype."""
    if passes := _passes(x, None, weight, path):
        return _Norm.apply(x, None, weight, bias, eps, passes)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    path: Path = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LayerNorm of x + residual, x + residual), both [..., D]; gradients flow through both."""
    if passes := _passes(x, residual, weight, path):
        return _Norm.apply(x, residual, weight, bias, eps, passes)
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed


@dataclass(frozen=True)
class Passes:
    """The two passes of one path."""

    forward: Forward
    backward: Backward


def _passes(x: torch.Tensor, residual: Maybe, weight: torch.Tensor, path: Path) -> Passes | None:
    """What computes it, None for the reference."""
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise KernelError(
            f"x is {list(x.shape)}, the residual {'none' if residual is None else list(residual.shape)}, the "
            f"weight {list(weight.shape)}: x and residual need one shape, and the weight a number a column"
        )
    chosen = choose("norm", x, path).path
    # a compiler fuses the reference into its neighbours, and cannot look into the other paths
    if chosen == "reference" or torch.compiler.is_compiling():
        return None
    if chosen == "cpu":
        return CPU
    if x.shape[-1] > WIDEST:
        if path == "triton":
            raise KernelError(
                f'kernels.norm = "triton" has rows of at most {WIDEST}, not {x.shape[-1]}; use "reference"'
            )
        return None
    from .gpu.norm import backward, forward  # triton is optional

    return Passes(forward, backward)


class _Norm(torch.autograd.Function):
    """The passes of one path as a step of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: Maybe,
        weight: torch.Tensor,
        bias: Maybe,
        eps: float,
        passes: Passes,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        normed, summed, mean, rstd = passes.forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(x if summed is None else summed, weight, mean, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias))
        ctx.backward_pass = passes.backward
        ctx.set_materialize_grads(False)
        return normed if summed is None else (normed, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Maybe, grad_summed: Maybe = None) -> tuple[Maybe, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if grad is None:  # only the sum was used
            found: tuple[Maybe, ...] = (grad_summed, grad_summed, None, None)
        else:
            grad_x, grad_weight, grad_bias = ctx.backward_pass(grad, grad_summed, x, weight, mean, rstd)
            found = (grad_x, grad_x, grad_weight, grad_bias)
        wanted = zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(g.to(dtype) if g is not None and needed else None for g, dtype, needed in wanted), None, None


def result_dtype(x_dtype: torch.dtype, weight: torch.Tensor, bias: Maybe) -> torch.dtype:
    """RMSNorm multiplies its result with the weight and promotes; LayerNorm keeps x's dtype."""
    return torch.promote_types(x_dtype, weight.dtype) if bias is None else x_dtype


def cpu_forward(
    x: torch.Tensor, residual: Maybe, weight: torch.Tensor, bias: Maybe, eps: float
) -> tuple[torch.Tensor, Maybe, Maybe, torch.Tensor]:
    """See `Forward`."""
    dim = x.shape[-1]
    x_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    summed = None if residual is None else torch.empty(x.shape, dtype=x_dtype, device=x.device)
    out = torch.empty(x.shape, dtype=result_dtype(x_dtype, weight, bias), device=x.device)
    wide = at_least_fp32(out.dtype)
    rstd = torch.empty(x.numel() // dim, 1, dtype=wide, device=x.device)
    mean = None if bias is None else torch.empty_like(rstd)
    scale, shift = weight.to(wide), None if bias is None else bias.to(wide)
    for part, added, total, target, average, factor in _stretches(x, residual, summed, out, mean, rstd):
        if total is not None:
            part = torch.add(part, added, out=total)
        numbers = part.to(wide)
        if average is None:
            torch.linalg.vector_norm(numbers, dim=-1, keepdim=True, out=factor)
            factor.square_().mul_(1 / dim).add_(eps).rsqrt_()
            into = target if target.dtype == wide else numbers
            torch.mul(numbers, factor, out=into).mul_(scale)
        else:
            into, *row = torch.native_layer_norm(numbers, (dim,), scale, shift, eps)
            average.copy_(row[0]), factor.copy_(row[1])
        if into is not target:
            target.copy_(into)
    return out, summed, mean, rstd


def cpu_backward(
    grad: torch.Tensor,
    grad_summed: Maybe,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: Maybe,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Maybe]:
    """See `Backward` and the formula on top."""
    dim, wide = x.shape[-1], rstd.dtype
    scale = weight.to(wide)
    level = torch.zeros_like(rstd) if mean is None else mean
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = torch.zeros_like(scale), torch.zeros_like(scale)
    for g, g_sum, part, average, factor, target in _stretches(grad, grad_summed, x, level, rstd, grad_x):
        g = g.to(wide)
        found, for_weight, for_bias = torch.ops.aten.native_layer_norm_backward(
            g, part.to(wide), (dim,), average, factor, scale, scale, (True, True, mean is not None)
        )
        grad_weight += for_weight
        if mean is not None:
            grad_bias += for_bias
        else:  # torch's pass has taken off mean(h), which a norm without a mean does not
            found += (g @ scale).unsqueeze(1).mul_(factor).mul_(1 / dim)
        if g_sum is not None:
            found += g_sum
        target.copy_(found)
    return grad_x, grad_weight, None if mean is None else grad_bias


CPU = Passes(cpu_forward, cpu_backward)


def _stretches(*tensors: Maybe) -> Iterator[tuple[Any, ...]]:
    """The same rows of all tensors [..., D or 1], as [rows, D or 1], a stretch at a time; None stays None."""
    first = tensors[0]
    assert first is not None, "the first tensor tells how many rows there are"
    dim = first.shape[-1]
    rows, length = first.numel() // dim, max(1, STRETCH // dim)
    flat = [None if t is None else t.reshape(rows, t.shape[-1]) for t in tensors]
    for start in range(0, rows, length):
        yield tuple(None if t is None else t[start : start + length] for t in flat)
