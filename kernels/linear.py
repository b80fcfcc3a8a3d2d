"""Matrix product with a weight: x [..., K], weight [N, K] -> [..., N].

The CPU path calls oneDNN for fp32: torch's own fp32 product goes to MKL, which takes slow code on processors
of other makers (here 2.3 times slower), while oneDNN asks the processor only for its instruction sets. The
sums are fp32 on both paths; only their order differs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .config import Path
from .dispatch import choose

# looked up once, for small products come by the thousand; torch without oneDNN has none
ONEDNN_PRODUCT = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def linear(x: torch.Tensor, weight: torch.Tensor, path: Path = "auto") -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N], in x's dtype."""
    if choose("linear", x, path).path == "cpu":
        return _OneDNNLinear.apply(x, weight)
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


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        out = product(x.flatten(0, -2), weight.t())
        # not a view: FSDP hangs its hooks on what a module returns, and on a view they could be lost
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_x = product(grad, weight).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
