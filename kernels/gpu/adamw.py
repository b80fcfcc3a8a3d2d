"""AdamW and sums of squares over flat buffers, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl

from .artifact import Variant
from .tiles import ARCHITECTURES, Tile, nearest_architecture

# Seven streams of fp32 and no reuse: only bytes in flight count. 512 elements over 4 warps are one 16-byte
# load a thread and stream, few enough registers that a multiprocessor holds nearly all its threads.
UPDATE = {arch: Tile(1, 512, num_warps=4, num_stages=1) for arch in ARCHITECTURES}
# Rows are the blocks of 64 elements that the layout aligns tensors to: 16 threads load 4 elements each.
SQUARES = {arch: Tile(32, 64, num_warps=4, num_stages=1) for arch in ARCHITECTURES}
# One program a tensor: the blocks of one of 256 KiB are read at once, and one block does not cost much more.
SEGMENTS = {arch: Tile(1, 1024, num_warps=4, num_stages=1) for arch in ARCHITECTURES}


@triton.jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    params,
    grads,
    exp_avg,
    exp_avg_sq,
    grad_scale,
    numel,
    keep,  # 1 - lr * weight_decay
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    step_size,  # lr / (1 - beta1^step)
    correction,  # sqrt(1 - beta2^step)
    eps,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < numel
    g = tl.load(grads + places, inside, other=0.0)
    if SCALED:
        g = g / tl.load(grad_scale)
    p = tl.load(params + places, inside, other=0.0)
    m = tl.load(exp_avg + places, inside, other=0.0)
    v = tl.load(exp_avg_sq + places, inside, other=0.0)
    m += weight1 * (g - m)
    v = v * beta2 + weight2 * g * g
    p = p * keep - step_size * m / (tl.sqrt_rn(v) / correction + eps)
    tl.store(params + places, p, inside)
    tl.store(exp_avg + places, m, inside)
    tl.store(exp_avg_sq + places, v, inside)


@triton.jit
def _block_squares_kernel(flat, squares, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < blocks
    x = tl.load(flat + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], inside[:, None], other=0.0)
    tl.store(squares + rows, tl.sum(x * x, axis=1), inside)


@triton.jit
def _segments_kernel(squares, bounds, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # a tensor's blocks are added by one program in one order: same bits every time
    tensor = tl.program_id(0)
    first = tl.load(bounds + tensor)
    last = tl.load(bounds + tensor + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(squares + places, places < last, other=0.0).to(tl.float64)
    tl.store(sums + tensor, tl.sum(total, axis=0))


def adamw_(
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
    tile: Tile | None = None,
) -> None:
    """One launch over [N] contiguous fp32 buffers; gradients are left as they are."""
    flat = (params, grads, exp_avg, exp_avg_sq)
    assert all(x.is_contiguous() and x.numel() == params.numel() for x in flat), "buffers are flat and equal"
    if not params.numel():
        return
    tile = tile or _tile(UPDATE, params)
    _adamw_kernel[(triton.cdiv(params.numel(), tile.columns),)](
        *flat,
        params if grad_scale is None else grad_scale,  # a pointer that is not read
        params.numel(),
        1 - lr * weight_decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        lr / (1 - betas[0] ** step),
        (1 - betas[1] ** step) ** 0.5,
        eps,
        SCALED=grad_scale is not None,
        BLOCK=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def segment_squares(
    flat: torch.Tensor, bounds: torch.Tensor, tile: Tile | None = None, segment_tile: Tile | None = None
) -> torch.Tensor:
    """Sums of squares of `flat` [N] fp32 from block `bounds[i]` to `bounds[i + 1]`, fp64 [tensors]."""
    tile, segment_tile = tile or _tile(SQUARES, flat), segment_tile or _tile(SEGMENTS, flat)
    blocks, tensors = flat.numel() // tile.columns, bounds.numel() - 1
    squares = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    sums = torch.empty(tensors, dtype=torch.float64, device=flat.device)
    if blocks:
        _block_squares_kernel[(triton.cdiv(blocks, tile.rows),)](
            flat,
            squares,
            blocks,
            ROWS=tile.rows,
            WIDTH=tile.columns,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if tensors:
        _segments_kernel[(tensors,)](
            squares,
            bounds,
            sums,
            BLOCK=segment_tile.columns,
            num_warps=segment_tile.num_warps,
            num_stages=segment_tile.num_stages,
        )
    return sums


def variants(arch: int) -> list[Variant]:
    """The kernels as shipped for `arch`."""
    update, squares, segments = UPDATE[arch], SQUARES[arch], SEGMENTS[arch]
    scalars = ("keep", "weight1", "beta2", "weight2", "step_size", "correction", "eps")
    pointers = ("params", "grads", "exp_avg", "exp_avg_sq", "grad_scale")
    signature = dict.fromkeys(pointers, "*fp32") | {"numel": "i64"} | dict.fromkeys(scalars, "fp32")
    return [
        *(
            Variant(
                name="adamw scaled" if scaled else "adamw",
                kernel=_adamw_kernel,
                signature=signature,
                constants={"SCALED": scaled, "BLOCK": update.columns},
                num_warps=update.num_warps,
                num_stages=update.num_stages,
                aligned=("numel",),
            )
            for scaled in (False, True)
        ),
        Variant(
            name="block squares",
            kernel=_block_squares_kernel,
            signature={"flat": "*fp32", "squares": "*fp32", "blocks": "i32"},
            constants={"ROWS": squares.rows, "WIDTH": squares.columns},
            num_warps=squares.num_warps,
            num_stages=squares.num_stages,
        ),
        Variant(
            name="segment squares",
            kernel=_segments_kernel,
            signature={"squares": "*fp32", "bounds": "*i64", "sums": "*fp64"},
            constants={"BLOCK": segments.columns},
            num_warps=segments.num_warps,
            num_stages=segments.num_stages,
        ),
    ]


def _tile(table: dict[int, Tile], tensor: torch.Tensor) -> Tile:
    on_device: Any = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)
    return table[nearest_architecture(on_device)]
