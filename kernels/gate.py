"""Gated activations: act(gate) * up, for SwiGLU and GEGLU (arXiv 2002.05202).

Autograd on the formula keeps three tensors as large as the widest of the model, act(gate) among them. The
CPU path keeps the two that come in and computes act(gate) again, cheaper than the memory it takes; every
temporary is a stretch of rows that the cache holds. Each step is one of torch's own for the dtype, fp32
inside and rounded once. GELU's tanh form is computed as x sigmoid(x (a + b x^2)), the same function, because
torch's sigmoid is ten times faster than its tanh. Shapes: any leading ones, F the width.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .config import Path
from .dispatch import at_least_fp32, choose

Activation = Literal["silu", "gelu", "gelu_tanh"]
Gate = Callable[[torch.Tensor, torch.Tensor, Activation], torch.Tensor]
GateBackward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Activation], tuple[torch.Tensor, torch.Tensor]
]

# Numbers of a stretch on the CPU: half a MB of fp32 a tensor, so the six at work stay in a core's caches.
STRETCH = 2**17
TANH_A = 2 * (2 / torch.pi) ** 0.5  # tanh(z) = 2 sigmoid(2 z) - 1, with z = sqrt(2 / pi) (x + 0.044715 x^3)
TANH_B = TANH_A * 0.044715


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, path: Path = "auto") -> torch.Tensor:
    """silu(gate) * up: two [..., F] -> [..., F] in their dtype."""
    return _gated(gate, up, "silu", path)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    path: Path = "auto",
) -> torch.Tensor:
    """gelu(gate) * up, exact or by its tanh approximation: two [..., F] -> [..., F] in their dtype."""
    return _gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh", path)


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The definition, left to autograd."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation, path: Path) -> torch.Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)}, up is {up.dtype} {list(up.shape)}; they are "
            "multiplied number by number, so give both the same shape and dtype"
        )
    chosen = choose("gate", gate, path).path
    # a compiler fuses the reference into its neighbours, and cannot look into the other paths
    if chosen == "reference" or torch.compiler.is_compiling():
        return gated_reference(gate, up, activation)
    if chosen == "triton":
        from .gpu.gate import gated, gated_backward  # triton is optional

        return _Gated.apply(gate, up, activation, gated, gated_backward)
    return _Gated.apply(gate, up, activation, gated_stretches, gated_stretches_backward)


class _Gated(torch.autograd.Function):
    """A pair of functions as a step of autograd that saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: Activation,
        forward: Gate,
        backward: GateBackward,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.compute_backward = activation, backward
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        return *ctx.compute_backward(grad, *ctx.saved_tensors, ctx.activation), None, None, None


def gated_stretches(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up, one stretch of rows after another."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for g, u, o in _stretches(gate, up, out):
        torch.mul(_value(g, activation), u, out=o)
    return out


def gated_stretches_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, one stretch of rows after another."""
    grad_gate, grad_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    for d, g, u, d_g, d_u in _stretches(grad, gate, up, grad_gate, grad_up):
        torch.mul(_value(g, activation), d, out=d_u)
        _times_slope(torch.mul(d, u, out=d_g), g, activation)
    return grad_gate, grad_up


def _stretches(*tensors: torch.Tensor) -> zip:
    """The same rows of every tensor, as many as make a stretch."""
    shape = tensors[0].shape
    width = shape[-1] if shape else 1
    rows = max(1, STRETCH // max(1, width))
    return zip(*(t.reshape(shape[:-1].numel(), width).split(rows) for t in tensors), strict=True)


def _value(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(x)."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    wide = x.to(at_least_fp32(x.dtype))  # 8 bits of x^2 would not do under an exponent
    return _tanh_sigmoid(wide, wide.square()).mul_(wide).to(x.dtype)


def _times_slope(grad: torch.Tensor, x: torch.Tensor, activation: Activation) -> None:
    """Multiply `grad` by the derivative of act at x, in place."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    else:
        wide = x.to(at_least_fp32(x.dtype))
        square = wide.square()
        s = _tanh_sigmoid(wide, square)
        inner = square.mul_(3 * TANH_B).add_(TANH_A).mul_(wide)  # x times the derivative of the argument
        grad.mul_(torch.ops.aten.sigmoid_backward(inner, s).add_(s))  # s + x s'


def _tanh_sigmoid(x: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """(1 + tanh(...)) / 2 of GELU's approximation, given x and x^2."""
    return (square * TANH_B).add_(TANH_A).mul_(x).sigmoid_()
