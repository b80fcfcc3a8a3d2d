"""Bias, gate, dropout and residual addition on the device: one pass forward, one backward.

A program owns a stretch of flat numbers. Where each lies in the mask is divided out of its flat index, in 32
bits as long as the tensor allows. The mask itself is drawn in both passes, ten instructions that hide behind
the loads, and never stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..dropout import FACTORS, GOLDEN, Dropout, signed
from .artifact import Variant
from .tiles import Tile, nearest_architecture

Maybe = torch.Tensor | None

# columns: flat numbers of a program, 8 a thread on 4 warps: one load of 16 bytes an array in bf16, and few
# enough registers for full occupancy, which is what keeps the bus busy. No stages: no loop.
TILES = {arch: Tile(rows=1, columns=1024, num_warps=4, num_stages=1) for arch in (80, 90, 100)}

# the constants of kernels/dropout.py, as a kernel may see them
FACTOR_0, FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for factor in FACTORS)
SPREAD = tl.constexpr(GOLDEN)


@triton.jit
def _places(count, COLUMNS: tl.constexpr, LARGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Flat indices of this program, in 64 bits if LARGE, and which of them exist."""
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    at = program * COLUMNS + tl.arange(0, COLUMNS)
    return at, at < count


@triton.jit
def _mask(  # type: ignore[no-untyped-def]
    at, shared, inner, first, second, limit, scale,
    SHARED: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """The mask times the scale for flat indices `at`; see `mask_reference` in kernels/dropout.py."""
    index = at // (shared * inner) * inner + at % inner if SHARED else at
    word = index.to(tl.int32).to(tl.uint32, bitcast=True) ^ first.to(tl.uint32, bitcast=True)
    word = (word ^ (word >> 16)) * FACTOR_0
    word = word ^ (word >> 15) ^ second.to(tl.uint32, bitcast=True)
    if LARGE:
        word = word ^ ((index >> 32).to(tl.int32).to(tl.uint32, bitcast=True) * SPREAD)
    word = word * FACTOR_1
    word = (word ^ (word >> 16)) * FACTOR_2
    return tl.where(word.to(tl.int32, bitcast=True) <= limit, scale, 0.0)


@triton.jit(do_not_specialize=["first", "second", "limit"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x, bias, residual, gate, out, count, dim, shared, inner, first, second, limit, scale,
    COLUMNS: tl.constexpr, DROP: tl.constexpr, SHARED: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """out = residual + mask * scale * gate * (x + bias); a pointer that is None is left out."""
    at, there = _places(count, COLUMNS, LARGE)
    found = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        found += tl.load(bias + at % dim, mask=there, other=0.0).to(tl.float32)
    if gate is not None:
        found *= tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    if DROP:
        found *= _mask(at, shared, inner, first, second, limit, scale, SHARED, LARGE)
    found += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["first", "second", "limit"])
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, bias, gate, grad_x, grad_gate, count, dim, shared, inner, first, second, limit, scale,
    COLUMNS: tl.constexpr, DROP: tl.constexpr, SHARED: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """grad_x = mask * scale * gate * grad, and with a gate grad_gate = mask * scale * (x + bias) * grad."""
    at, there = _places(count, COLUMNS, LARGE)
    found = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    if DROP:
        found *= _mask(at, shared, inner, first, second, limit, scale, SHARED, LARGE)
    if gate is not None:
        number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        if bias is not None:
            number += tl.load(bias + at % dim, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_gate + at, (found * number).to(grad_gate.dtype.element_ty), mask=there)
        found *= tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=there)


def forward(
    x: torch.Tensor,
    bias: Maybe,
    residual: torch.Tensor,
    gate: Maybe,
    dropout: Dropout,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`Passes.forward` of kernels/residual.py."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    inputs = [None if t is None else t.contiguous() for t in (x, bias, residual, gate)]
    _launch(forward_kernel, [*inputs, out], dropout, tile)
    return out


def backward(
    grad: torch.Tensor,
    x: Maybe,
    bias: Maybe,
    gate: Maybe,
    dropout: Dropout,
    bias_wanted: bool,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, Maybe, Maybe]:
    """`Passes.backward` of kernels/residual.py; the bias's gradient is a sum over that of x."""
    inputs = [None if t is None else t.contiguous() for t in (grad, x, bias, gate)]
    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    grad_gate = None if gate is None else torch.empty_like(grad_x)
    _launch(backward_kernel, [*inputs, grad_x, grad_gate], dropout, tile)
    # torch's sum has no atomics: the same bits every time
    grad_bias = grad_x.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32) if bias_wanted else None
    return grad_x, grad_bias, grad_gate


def _launch(kernel: Any, tensors: list[Maybe], dropout: Dropout, tile: Tile | None) -> None:
    """Run a kernel over all numbers of its first tensor."""
    first = tensors[0]
    assert first is not None, "the first tensor is x or the gradient"
    count = first.numel()
    if not count:
        return
    if tile is None:
        capability = torch.cuda.get_device_capability(first.device) if first.is_cuda else (8, 0)
        tile = TILES[nearest_architecture(capability)]
    _, length, inner, dim = dropout.shape
    shared, below = (dim, 1) if dropout.width < dim else (length, inner * dim)
    kernel[(triton.cdiv(count, tile.columns),)](
        *tensors, count, dim, shared, below, signed(dropout.first), signed(dropout.second), dropout.limit,
        dropout.scale, COLUMNS=tile.columns, DROP=dropout.kept < 2**32, SHARED=shared > 1,
        LARGE=count > 2**31 - tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def variants(arch: int) -> list[Variant]:
    """With everything, which is hardest, and as a transformer has it: no gate, nothing shared, no bias."""
    made = []
    for kind in ("bf16", "fp16", "fp32"):
        for everything in (True, False):
            made.append(_variant(arch, kind, forward_kernel, ("x", "residual", "out"), everything))
            made.append(_variant(arch, kind, backward_kernel, ("grad", "grad_x"), everything))
    made.append(_variant(arch, "bf16", forward_kernel, ("x", "residual", "out"), True, large=True))
    return made


def _variant(
    arch: int, kind: str, kernel: Any, needed: tuple[str, ...], everything: bool, *, large: bool = False
) -> Variant:
    tile, way = TILES[arch], "forward" if kernel is forward_kernel else "backward"
    extra = (", gate and shared mask" if everything else "") + (", large" if large else "")
    pointers = [n for n in ("x", "bias", "gate", "grad_gate") if n in kernel.arg_names and n not in needed]
    integers = dict.fromkeys(("dim", "shared", "inner", "first", "second", "limit"), "i32")
    return Variant(
        name=f"residual {way} {kind}{extra}",
        kernel=kernel,
        signature=dict.fromkeys((*needed, *(pointers if everything else ())), f"*{kind}")
        | integers
        | {"count": "i64" if large else "i32", "scale": "fp32"},
        constants=dict.fromkeys(() if everything else pointers)
        | {"COLUMNS": tile.columns, "DROP": True, "SHARED": everything, "LARGE": large},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=("count", "dim", "inner"),
    )
