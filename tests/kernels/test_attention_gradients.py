"""Gradients of some keys of a softmax from its whole output: parts add up to the whole.

This is what lets context parallel ranks compute their gradients apart: out and log-sum-exp are known, keys
come by in parts.
"""

import math
from typing import Any

import pytest
import torch

from rayfold.kernels.attention import attention_gradients, flashmask_attention
from rayfold.kernels.config import Path
from rayfold.kernels.flashmask import kinds
from rayfold.kernels.flashmask.mask import ColumnMask
from rayfold.kernels.gpu import attention as gpu

Tensors = tuple[torch.Tensor, ...]


def random_inputs(n: int, heads: int, key_heads: int, width: int, dtype: torch.dtype) -> Tensors:
    """q, k, v and a gradient of the output."""
    torch.manual_seed(n + heads)
    shapes = ((n, heads), (n, key_heads), (n, key_heads), (n, heads))
    return tuple(torch.randn(2, rows, h, width).to(dtype) for rows, h in shapes)


def random_mask(n: int, heads: int) -> ColumnMask:
    """Two intervals a column, and rows that see nothing at all."""
    ends = torch.randint(0, n + 1, (2, 2, 2, heads, n)).sort(dim=1).values.to(torch.int32)
    (lts, lte), (uts, ute) = ends
    lts, lte = torch.where(lts < 5, 0, lts), torch.where(lts < 5, lte.clamp(min=5), lte)
    uts, ute = torch.zeros_like(uts), (ute // 3).clamp(min=5)
    return ColumnMask(lts=lts, lte=lte, uts=uts, ute=ute, causal=False, nq=n)


def parts_of(n: int) -> list[torch.Tensor]:
    """Three sets of keys that make up all, one of them in two stretches."""
    return [
        torch.arange(7),
        torch.cat((torch.arange(7, n // 2), torch.arange(n - 3, n))),
        torch.arange(n // 2, n - 3),
    ]


def in_parts(
    grad_out: torch.Tensor, inputs: Tensors, whole: Tensors, mask: ColumnMask, path: Path = "auto"
) -> Tensors:
    """dq, dk and dv put together from those of three sets of keys."""
    q, k, v = inputs
    rows = torch.arange(mask.nq)
    dq: Any = 0
    dk, dv = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    for keys in parts_of(mask.nk):
        more, dk_part, dv_part = attention_gradients(
            grad_out, q, k[:, keys], v[:, keys], *whole, mask.part(rows, keys), path=path
        )
        dq = dq + more
        dk[:, keys], dv[:, keys] = dk_part.to(k.dtype), dv_part.to(v.dtype)
    return dq, dk, dv


class _InParts(torch.autograd.Function):
    """Attention of which the backward pass sees a few keys at a time."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> Any:
        out, lse = flashmask_attention(q, k, v, mask, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *in_parts(grads[0], (q, k, v), (out, lse), ctx.mask), None


def test_parts_add_up_to_finite_differences() -> None:
    """fp64: the gradients of all keys, computed part by part, are those along random lines."""
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(17, 2, 1, 3, torch.float64))
    docs = torch.tensor([[0] * 9 + [1] * 8, [-1] + [0] * 10 + [1] * 6])
    for mask in (random_mask(17, 1), kinds.packed(docs)):
        assert torch.autograd.gradcheck(lambda *x, m=mask: _InParts.apply(*x, m), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_parts_add_up_to_the_gradients_of_the_whole(mask_heads: int, path: Path) -> None:
    """fp64, masks of one head, of the key heads and of the query heads, rows that nobody lets see.

    1e-12 is some thousand roundings of fp64, of sums of 200 terms.
    """
    *inputs, grad_out = random_inputs(200, 4, 2, 8, torch.float64)
    mask = random_mask(200, mask_heads)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = flashmask_attention(*leaves, mask, return_lse=True, path=path)
    assert bool((lse[:, :, :5] == -math.inf).all())
    expected = torch.autograd.grad(out, leaves, grad_out)
    with torch.no_grad():
        got = in_parts(grad_out, tuple(inputs), (out, lse), mask, path)
    for name, one, other in zip("qkv", got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


def test_a_hidden_key_of_nan_leaves_the_gradients_of_other_keys_alone() -> None:
    """One that nobody sees, in a tile with others that are seen: the same bits as with zeros, whole and in
    parts. Not so the gradient of q, for which 0 is multiplied by the key.
    """
    q, k, v, grad_out = random_inputs(90, 4, 2, 16, torch.float32)
    mask = random_mask(90, 1)
    mask.lts[..., 30], mask.lte[..., 30] = 0, 90
    results = []
    for held in (0.0, math.nan):
        k[:, 30] = held
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = flashmask_attention(*leaves, mask, return_lse=True)
        whole = torch.autograd.grad(out, leaves, grad_out)
        with torch.no_grad():
            results.append((*whole[1:], *in_parts(grad_out, tuple(leaves), (out, lse), mask)[1:]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_parts_of_bf16_gradients_are_fp32() -> None:
    """Their sum is rounded once, by whoever takes it: rounded parts would not reach the error of the whole.

    The sum of fp32 parts may be off by what the whole is, against fp64 on the same numbers, and by delta: it
    is a sum over D products with the output, which is rounded to bf16, 2^-9 of it at most.
    """
    q, k, v, grad_out = random_inputs(200, 4, 2, 8, torch.bfloat16)
    mask, rows = kinds.packed(torch.tensor([[0] * 90 + [1] * 110, [-1] * 3 + [0] * 197])), torch.arange(200)
    out, lse = flashmask_attention(q, k, v, mask, return_lse=True)
    parts = [
        attention_gradients(grad_out, q, k[:, keys], v[:, keys], out, lse, mask.part(rows, keys))
        for keys in parts_of(200)
    ]
    assert all(x.dtype == torch.float32 for part in parts for x in part)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = q.to(dtype, copy=True).requires_grad_()
        attended = flashmask_attention(leaf, k.to(dtype), v.to(dtype), mask)
        grads.append(torch.autograd.grad(attended, leaf, grad_out.to(dtype))[0].double())
    whole, truth = grads
    delta = 2.0**-9 * float((out.double() * grad_out.double()).abs().sum(-1).max())
    allowed = float((whole - truth).abs().max()) + delta * float(k.abs().max()) * 8**-0.5
    assert float((sum(part[0].double() for part in parts) - truth).abs().max()) <= allowed


@pytest.mark.usefixtures("bf16_as_on_a_device", "new_memory_holds_nan")
def test_the_kernels_keep_fp32_where_they_are_asked_to() -> None:
    """bf16 inputs: the same gradients, before they are rounded."""
    *inputs, grad_out = (x[:1] for x in random_inputs(40, 2, 1, 16, torch.bfloat16))
    mask = kinds.packed(torch.tensor([[0] * 19 + [1] * 21]))
    how: dict[str, Any] = {"causal": True, "scale": 0.25}
    out, lse = gpu.forward(*inputs, *mask.for_device, **how)
    rounded = gpu.backward(grad_out, *inputs, out, lse, *mask.for_device, **how)
    wide = gpu.backward(grad_out, *inputs, out, lse, *mask.for_device, **how, kept=torch.float32)
    for one, other in zip(wide, rounded, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.bfloat16(), other)
