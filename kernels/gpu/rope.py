"""Rotary embedding on the device: one pass, in place or into new memory, forward and backward alike.

A program owns one token and some of its heads, so the angles are loaded once for all of them. The table stays
interleaved complex numbers, as it came: both halves of a cache line are used by the same program.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .artifact import Variant
from .tiles import Tile, nearest_architecture

# rows: heads of one token that a program turns; columns: pairs of a head of 128, the widest shipped.
# 32 * 64 pairs on 4 warps are 16 pairs a thread, two loads of 16 bytes a half in bf16: enough in flight to
# fill the memory bus from 8 blocks a multiprocessor. The table is read once for 32 heads. No stages: no loop.
TILES = {arch: Tile(rows=32, columns=64, num_warps=4, num_stages=1) for arch in (80, 90, 100)}


@triton.jit
def turn_kernel(  # type: ignore[no-untyped-def]
    x, out, table, length, heads, half,
    x_b, x_s, x_h, x_p, out_b, out_s, out_h, out_p, table_b, table_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One token's heads: pairs (x[i], x[i + half]) turned by the angles of the token, back if BACK."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // length, token % length
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    turned = column < half
    angle = table + b * table_b + s * table_s + 2 * column
    cos = tl.load(angle, mask=turned, other=0.0)[None, :]
    sin = tl.load(angle + 1, mask=turned, other=0.0)[None, :]
    if BACK:
        sin = -sin
    mask = (row < heads)[:, None] & turned[None, :]
    source = x + b * x_b + s * x_s + row[:, None] * x_h + column[None, :] * x_p
    target = out + b * out_b + s * out_s + row[:, None] * out_h + column[None, :] * out_p
    first = tl.load(source, mask=mask).to(tl.float32)
    second = tl.load(source + half * x_p, mask=mask).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(target + half * out_p, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


def turn(x: torch.Tensor, out: torch.Tensor, turns: torch.Tensor, *, tile: Tile | None = None) -> None:
    """Write x [B, S, H, P] turned by `turns` [B, S, 1, P / 2] into `out`, which may be x."""
    batch, length, heads, head_dim = x.shape
    if not x.numel():
        return
    tile = (
        tile or TILES[nearest_architecture(torch.cuda.get_device_capability(x.device)) if x.is_cuda else 80]
    )
    back = turns.is_conj()
    table = torch.view_as_real(turns.conj() if back else turns).expand(batch, length, 1, -1, -1)
    if table.stride(-1) != 1 or table.stride(-2) != 2:
        table = table.contiguous()
    rows = min(tile.rows, triton.next_power_of_2(heads))
    turn_kernel[batch * length, triton.cdiv(heads, rows)](
        x, out, table, length, heads, head_dim // 2,
        *x.stride(), *out.stride(), *table.stride()[:2],
        ROWS=rows, COLUMNS=triton.next_power_of_2(head_dim // 2), BACK=back,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def variants(arch: int) -> list[Variant]:
    """Heads of 128, as the Llama shapes have, forward and backward."""
    tile = TILES[arch]
    return [_variant(tile, kind, back) for kind in ("bf16", "fp16", "fp32") for back in (False, True)]


def _variant(tile: Tile, kind: str, back: bool) -> Variant:
    strides = [f"{name}_{dim}" for name in ("x", "out") for dim in "bsh"] + ["table_b", "table_s"]
    integers: dict[str, Any] = dict.fromkeys(("length", "heads", "half", *strides), "i32")
    return Variant(
        name=f"rope {kind} {'backward' if back else 'forward'}",
        kernel=turn_kernel,
        signature={"x": f"*{kind}", "out": f"*{kind}", "table": "*fp32"} | integers,
        constants={"x_p": 1, "out_p": 1, "ROWS": tile.rows, "COLUMNS": tile.columns, "BACK": back},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=("half", *strides),
    )
