"""Matrix product with a weight: x [..., K], weight [N, K] -> [..., N].

The CPU path calls oneDNN for fp32: torch's own fp32 product goes to MKL, which takes slow code on processors
of other makers (here 2.3 times slower), while oneDNN asks the processor only for its instruction sets. The
sums are fp32 on both paths; only their order differs.

The backward pass makes two products, and only one of them, the gradient of x, is waited for. The other can be
put off (`Deferred`): schedules of a pipeline without bubbles do it when a rank would be idle.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .config import Path
from .dispatch import choose

# looked up once, for small products come by the thousand; torch without oneDNN has none
ONEDNN_PRODUCT = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


@dataclass
class Deferred:
    """Gradients of weights that are put off while `collecting`: (weight, gradient of the output [M, N], input
    [M, K]). Whoever takes them adds them to the weights (`add_weight_gradients`).
    """

    collecting: bool = False
    waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What has come together since the last time."""
        waiting, self.waiting = self.waiting, []
        return waiting


@torch.no_grad()
def add_weight_gradients(waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Compute what was put off and add it to the weights' `grad`, as the backward pass would have."""
    for weight, grad, x in waiting:
        own = _weight_gradient(grad, x)
        weight.grad = own if weight.grad is None else weight.grad.add_(own)


def linear(
    x: torch.Tensor, weight: torch.Tensor, path: Path = "auto", deferred: Deferred | None = None
) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N], in x's dtype.

    With `deferred` the weight is a parameter whose gradient may be put off.
    """
    if choose("linear", x, path).path == "cpu":
        return _OneDNNLinear.apply(x, weight, deferred)
    if deferred is not None:
        return _DeferredLinear.apply(x, weight, deferred)
    return F.linear(x, weight)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N] by oneDNN where torch has it, fp32; either may be a transposed view."""
    if not (a.numel() and b.numel()):
        return a @ b  # oneDNN has no product of nothing
    return dense_product(_dense(a), _dense(b))


def dense_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`product` for those who know that neither is empty or has gaps between its rows or columns."""
    if ONEDNN_PRODUCT is None:
        return a @ b
    return ONEDNN_PRODUCT(a, b.t(), None, "none", [], "")


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` without gaps between rows or columns: with them oneDNN takes code a thousand times slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the output [M, N] and the input [M, K] -> [N, K], by the path that made the output."""
    return product(grad.t(), x) if grad.dtype == torch.float32 and grad.device.type == "cpu" else grad.t() @ x


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, deferred: Deferred | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.deferred = deferred
        if deferred is not None:
            ctx.weight = weight  # itself: what is saved comes back as another tensor after recompute
        out = product(x.flatten(0, -2), weight.t())
        # not a view: FSDP hangs its hooks on what a module returns, and on a view they could be lost
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_x = product(grad, weight).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, _grad_weight(ctx, grad, x.flatten(0, -2)), None


class _DeferredLinear(torch.autograd.Function):
    """F.linear whose weight gradient may be put off."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, deferred: Deferred) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.deferred, ctx.weight = deferred, weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, _grad_weight(ctx, grad.flatten(0, -2), x.flatten(0, -2)), None


def _grad_weight(ctx: Any, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a weight, unless it is not wanted or not yet."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.deferred is not None and ctx.deferred.collecting:
        ctx.deferred.waiting.append((ctx.weight, grad, x.detach()))  # x alone, without the graph behind it
        return None
    return _weight_gradient(grad, x)
