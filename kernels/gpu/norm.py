"""RMSNorm and LayerNorm on the device, with the residual's addition: one pass forward, one backward.

A program owns whole rows and holds them in registers. Going backward it walks over many blocks of rows and
keeps its share of the weight's gradient in registers, written once as a row of [programs, D] that torch then
sums: no atomics, so the same bits every time. Rows wider than `ONE_PASS` would not leave registers for that
share; there one kernel reduces each row to its two means, and another applies them to blocks of columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .artifact import Variant
from .tiles import Tile, nearest_architecture

Maybe = torch.Tensor | None

WIDTHS = tuple(2**power for power in range(5, 15))
# (architecture, columns) -> tile. 16 numbers a thread an array: four loads of 16 bytes in bf16 keep the bus
# busy, and forward's two or three arrays fit the 64 registers of a thread in a block of 32 warps. Narrow rows
# share a program. All three architectures are bound by bandwidth here and have the same registers.
TILES = {
    (arch, columns): Tile(
        rows=max(1, 2048 // columns), columns=columns, num_warps=max(4, columns // 512), num_stages=1
    )
    for arch in (80, 90, 100)
    for columns in WIDTHS
}
ONE_PASS = 8192  # columns: 16 warps, 128 registers a thread for x, grad, weight and two shares of 16 each
SPLIT = 2048  # columns of a block where rows are wider: any size fills the bus, small ones balance the load
# Of the A100, H100 and B200. The backward pass has as many programs as fit them at once: 16 warps each, of
# 128 registers a thread. A rule, not asked of the device: the order of sums must not change with it.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, out, summed, mean, rstd, rows, dim, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: x, or its sum with the residual if ADD, normed; less its mean if CENTRE."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present, inside = row < rows, column < dim
    mask = present[:, None] & inside[None, :]
    at = row[:, None] * dim + column[None, :]
    numbers = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        numbers += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        kept = numbers.to(summed.dtype.element_ty)
        tl.store(summed + at, kept, mask=mask)
        numbers = kept.to(tl.float32)  # what the backward pass will see
    if CENTRE:
        average = tl.sum(numbers, 1) / dim
        tl.store(mean + row, average, mask=present)
        numbers = tl.where(mask, numbers - average[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(numbers * numbers, 1) / dim + eps)
    tl.store(rstd + row, factor, mask=present)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    numbers = numbers * factor[:, None] * scale[None, :]
    if CENTRE:
        numbers += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_means_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, mean, rstd, means, dim, COLUMNS: tl.constexpr, CENTRE: tl.constexpr
):  # fmt: skip
    """One row's mean(h * n) and mean(h), h = weight * grad, into means [rows, 2]."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(rstd + row)
    average = tl.load(mean + row) if CENTRE else 0.0
    along = tl.zeros([COLUMNS], tl.float32)
    level = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < dim
        at = row * dim + column
        scaled = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        along += scaled * ((numbers - average) * factor)
        level += scaled
    tl.store(means + 2 * row, tl.sum(along, 0) / dim)
    tl.store(means + 2 * row + 1, tl.sum(level, 0) / dim)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, grad_summed, x, weight, mean, rstd, means, grad_x, weight_shares, bias_shares, rows, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Every so many blocks of ROWS rows, or COLUMNS of them: grad_x, and shares of the other gradients."""
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        present = row < rows
        mask = present[:, None] & inside[None, :]
        at = row[:, None] * dim + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(rstd + row, mask=present, other=0.0)
        if CENTRE:
            normed -= tl.load(mean + row, mask=present, other=0.0)[:, None]
            for_bias += g
        normed *= factor[:, None]
        for_weight += g * normed
        g *= scale[None, :]
        along = tl.sum(g * normed, 1) / dim if WHOLE else tl.load(means + 2 * row, mask=present, other=0.0)
        found = g - normed * along[:, None]
        if CENTRE:
            if WHOLE:
                found -= (tl.sum(g, 1) / dim)[:, None]
            else:
                found -= tl.load(means + 2 * row + 1, mask=present, other=0.0)[:, None]
        found *= factor[:, None]
        if ADD:
            found += tl.load(grad_summed + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=mask)
    share = program.to(tl.int64) * dim + column
    tl.store(weight_shares + share, tl.sum(for_weight, 0), mask=inside)
    if CENTRE:
        tl.store(bias_shares + share, tl.sum(for_bias, 0), mask=inside)


def forward(
    x: torch.Tensor,
    residual: Maybe,
    weight: torch.Tensor,
    bias: Maybe,
    eps: float,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, Maybe, Maybe, torch.Tensor]:
    """`Forward` of kernels/norm.py."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    x_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    summed = None if residual is None else torch.empty_like(x, dtype=x_dtype)
    out = torch.empty_like(
        x, dtype=x_dtype if bias is not None else torch.promote_types(x_dtype, weight.dtype)
    )
    rstd = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    mean = None if bias is None else torch.empty_like(rstd)
    tile = tile or TILES[architecture(x), columns_for(dim)]
    if rows:
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            x, residual, weight.contiguous(), None if bias is None else bias.contiguous(),
            out, summed, mean, rstd, rows, dim, eps,
            ROWS=tile.rows, COLUMNS=tile.columns, ADD=residual is not None, CENTRE=bias is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, summed, mean, rstd


def backward(
    grad: torch.Tensor,
    grad_summed: Maybe,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: Maybe,
    rstd: torch.Tensor,
    *,
    tile: Tile | None = None,
    programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Maybe]:
    """`Backward` of kernels/norm.py; a tile narrower than the rows takes them in blocks of columns."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    tile = tile or TILES[architecture(x), columns_for(dim) if dim <= ONE_PASS else SPLIT]
    programs = programs or MULTIPROCESSORS[architecture(x)] * max(1, 16 // tile.num_warps)
    programs = min(programs, triton.cdiv(rows, tile.rows))
    whole, centre = tile.columns >= dim, mean is not None
    grad_x = torch.empty_like(x)
    shares = torch.empty(1 + centre, programs, dim, dtype=torch.float32, device=x.device)
    run = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    means = None
    if rows and not whole:
        means = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
        row_means_kernel[(rows,)](
            grad, x, weight, mean, rstd, means, dim, COLUMNS=tile.columns, CENTRE=centre, **run
        )  # fmt: skip
    if rows:
        backward_kernel[programs, triton.cdiv(dim, tile.columns)](
            grad, grad_summed, x, weight, mean, rstd, means, grad_x, shares[0], shares[1] if centre else None,
            rows, dim, ROWS=tile.rows, COLUMNS=tile.columns, ADD=grad_summed is not None, CENTRE=centre,
            WHOLE=whole, **run,
        )  # fmt: skip
    totals = shares.sum(1)
    return grad_x, totals[0], totals[1] if centre else None


def architecture(tensor: torch.Tensor) -> int:
    """The table to use; the interpreter, on CPU tensors, takes the oldest."""
    return nearest_architecture(torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0))


def columns_for(dim: int) -> int:
    """The narrowest tile that holds a row."""
    return next(columns for columns in WIDTHS if columns >= dim)


def variants(arch: int) -> list[Variant]:
    """Both norms with the residual, which only adds to the plain ones, at the widths that are hardest."""
    made = []
    for kind in ("bf16", "fp32"):
        for centre, columns in ((False, 4096), (False, 16_384), (True, 256), (True, 16_384)):
            made.append(_forward_variant(arch, kind, centre, columns))
        for centre, columns in ((False, 4096), (False, ONE_PASS), (True, 256), (True, ONE_PASS)):
            made.append(_backward_variant(arch, kind, centre, columns, whole=True))
        made.append(_backward_variant(arch, kind, True, SPLIT, whole=False))
        made.append(_means_variant(arch, kind))
    return made


def _forward_variant(arch: int, kind: str, centre: bool, columns: int) -> Variant:
    optional = {"bias": f"*{kind}", "mean": "*fp32"}
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "summed"), f"*{kind}") | {"rstd": "*fp32"}
    return _variant(
        f"add {_norm(centre)} forward {kind} {columns}",
        forward_kernel,
        TILES[arch, columns],
        pointers | (optional if centre else {}) | {"rows": "i32", "eps": "fp32"},
        ({} if centre else dict.fromkeys(optional)) | {"ADD": True, "CENTRE": centre},
    )


def _backward_variant(arch: int, kind: str, centre: bool, columns: int, *, whole: bool) -> Variant:
    pointers = dict.fromkeys(("grad", "grad_summed", "x", "weight", "grad_x"), f"*{kind}")
    pointers |= dict.fromkeys(("rstd", "weight_shares"), "*fp32")
    optional = {"mean": centre, "bias_shares": centre, "means": not whole}
    return _variant(
        f"add {_norm(centre)} backward {kind} {columns}{'' if whole else ' split'}",
        backward_kernel,
        TILES[arch, columns],
        pointers | {name: "*fp32" for name, there in optional.items() if there} | {"rows": "i32"},
        {name: None for name, there in optional.items() if not there}
        | {"ADD": True, "CENTRE": centre, "WHOLE": whole},
    )


def _means_variant(arch: int, kind: str) -> Variant:
    pointers = dict.fromkeys(("grad", "x", "weight"), f"*{kind}") | dict.fromkeys(
        ("mean", "rstd", "means"), "*fp32"
    )
    return _variant(
        f"norm row means {kind}", row_means_kernel, TILES[arch, SPLIT], pointers, {"CENTRE": True}
    )


def _variant(
    name: str, kernel: Any, tile: Tile, signature: dict[str, str], constants: dict[str, Any]
) -> Variant:
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature | {"dim": "i32"},
        constants=constants | {n: size for n, size in sizes.items() if n in kernel.arg_names},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=("dim",),
    )


def _norm(centre: bool) -> str:
    return "LayerNorm" if centre else "RMSNorm"
