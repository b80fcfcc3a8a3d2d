"""Gated activations on the device: one pass forward, one backward, which computes act(gate) again.

A program owns a piece of one row, so gate and up may be halves of one wide product. GELU's tanh form is
x sigmoid(x (a + b x^2)), as on the CPU.
"""

import torch
import triton
import triton.language as tl

from .artifact import Variant
from .tiles import Tile, nearest_architecture

# columns: piece of a row; 8 numbers a thread on 4 warps, one load of 16 bytes a tensor in bf16. The backward
# pass has five tensors in flight and needs no more to fill the bus; wider pieces waste more at a row's end.
TILES = {arch: Tile(rows=1, columns=1024, num_warps=4, num_stages=1) for arch in (80, 90, 100)}

TANH_A = tl.constexpr(2 * (2 / 3.141592653589793) ** 0.5)
TANH_B = tl.constexpr(2 * (2 / 3.141592653589793) ** 0.5 * 0.044715)
HALF_ROOT = tl.constexpr(0.5**0.5)
NORMAL = tl.constexpr((2 * 3.141592653589793) ** -0.5)


@triton.jit
def _share(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(x) / x, between 0 and 1."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * HALF_ROOT)
    else:
        share = tl.sigmoid(x * (TANH_A + TANH_B * x * x))
    return share


@triton.jit
def gate_forward_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, width, gate_row, up_row, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """out = act(gate) * up for a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    x = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    y = x * _share(x, ACTIVATION) * u
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(  # type: ignore[no-untyped-def]
    grad, gate, up, grad_gate, grad_up, width, grad_row, gate_row, up_row,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Both gradients of a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    d = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    share = _share(x, ACTIVATION)
    if ACTIVATION == "silu":
        slope = share + x * share * (1.0 - share)
    elif ACTIVATION == "gelu":
        slope = share + x * NORMAL * tl.exp(-0.5 * x * x)
    else:
        slope = share + x * share * (1.0 - share) * (TANH_A + 3.0 * TANH_B * x * x)
    tl.store(grad_gate + row * width + column, (d * u * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + row * width + column, (d * x * share).to(grad_up.dtype.element_ty), mask=mask)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, *, tile: Tile | None = None) -> torch.Tensor:
    """act(gate) * up: two [..., F] -> [..., F]."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel():
        (gate_rows, up_rows), grid, tile = _rows(tile, gate, up)
        gate_forward_kernel[grid](
            gate_rows, up_rows, out, out.shape[-1], gate_rows.stride(0), up_rows.stride(0),
            COLUMNS=tile.columns, ACTIVATION=activation, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, *, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    if grad.numel():
        rows, grid, tile = _rows(tile, grad, gate, up)
        gate_backward_kernel[grid](
            *rows, grad_gate, grad_up, grad.shape[-1], *(t.stride(0) for t in rows),
            COLUMNS=tile.columns, ACTIVATION=activation, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return grad_gate, grad_up


def _rows(tile: Tile | None, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, int], Tile]:
    """Every tensor as rows of neighbouring numbers, the grid over their pieces, the tile of the device."""
    first = tensors[0]
    on = nearest_architecture(torch.cuda.get_device_capability(first.device)) if first.is_cuda else 80
    tile = tile or TILES[on]
    rows = [t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in tensors]
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in rows]
    return rows, (len(rows[0]), triton.cdiv(rows[0].shape[1], tile.columns)), tile


def variants(arch: int) -> list[Variant]:
    """Each activation and dtype, forward and backward."""
    return [
        _variant(TILES[arch], activation, kind, backward)
        for activation in ("silu", "gelu", "gelu_tanh")
        for kind in ("bf16", "fp16", "fp32")
        for backward in (False, True)
    ]


def _variant(tile: Tile, activation: str, kind: str, backward: bool) -> Variant:
    tensors = ("grad", "gate", "up", "grad_gate", "grad_up") if backward else ("gate", "up", "out")
    integers = ("width", "grad_row", "gate_row", "up_row") if backward else ("width", "gate_row", "up_row")
    return Variant(
        name=f"{activation} gate {kind} {'backward' if backward else 'forward'}",
        kernel=gate_backward_kernel if backward else gate_forward_kernel,
        signature=dict.fromkeys(tensors, f"*{kind}") | dict.fromkeys(integers, "i32"),
        constants={"COLUMNS": tile.columns, "ACTIVATION": activation},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=integers,
    )
