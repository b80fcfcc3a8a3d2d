"""Attention under a column mask on the GPU: launches, tile sizes, and what is compiled ahead of time.

A mask hides from every key column j up to two intervals of rows, [lts_j, lte_j) and [uts_j, ute_j), and
with `causal` the rows before j - (Nk - Nq). Bounds are int32 [B, Hm, Nk], Hm in {1, Hk, Hq}. A mask without
lte masks from lts to the end, one without uts and ute has no upper interval: pass None and the kernels are
compiled without them. Tiles that are wholly masked are never loaded, and only those masked in part compare
elements (`attention_forward.py`, `attention_backward.py`). B batch, Nq rows, Nk keys, Hq and Hk heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton

from ..dispatch import KernelError
from .artifact import Variant
from .attention_backward import attention_backward_keys, attention_backward_rows, attention_delta
from .attention_forward import attention_forward
from .tiles import Tile, nearest_architecture

# Tiles by (architecture, head size padded to a power of two); rows are queries, columns keys. Chosen among
# tiles of 16 to 128 x 16 to 128 with 4 or 8 warps and 1 to 3 stages by what the compiler says of them:
# nothing spilled whichever bounds are in use, the tensor core instruction of the architecture, then the
# largest tile, as each key block is read once a row tile, then the most stages. Registers decide before
# shared memory does: one block of 8 warps or two of 4 fill a multiprocessor. Not timed on devices.
# 80 stays below 99 KiB, which later consumer cards of its instruction set have.
FORWARD: dict[tuple[int, int], Tile] = {
    # the accumulator is rows x head in registers: narrower keys from head 128 on make room for it
    (80, 64): Tile(rows=128, columns=64, num_warps=8, num_stages=2),
    (80, 128): Tile(rows=128, columns=32, num_warps=8, num_stages=3),
    (80, 256): Tile(rows=64, columns=32, num_warps=8, num_stages=2),
    # two groups of four warps multiply 64 rows each, as wgmma does; it reads keys from shared memory
    (90, 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    (90, 128): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    (90, 256): Tile(rows=64, columns=32, num_warps=8, num_stages=2),
    # accumulators live in tensor memory and come to registers to be rescaled: wider keys in stages spill
    (100, 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    (100, 128): Tile(rows=128, columns=32, num_warps=8, num_stages=3),
    (100, 256): Tile(rows=64, columns=64, num_warps=8, num_stages=1),
}
BACKWARD_KEYS: dict[tuple[int, int], Tile] = {
    # dk and dv are held, both keys x head, while walking over rows, on 80 keys and values too: few rows
    (80, 64): Tile(rows=16, columns=64, num_warps=4, num_stages=3),
    (80, 128): Tile(rows=32, columns=64, num_warps=8, num_stages=3),
    (80, 256): Tile(rows=32, columns=32, num_warps=8, num_stages=1),
    (90, 64): Tile(rows=64, columns=128, num_warps=8, num_stages=3),
    (90, 128): Tile(rows=32, columns=128, num_warps=8, num_stages=3),
    # 64 keys, which wgmma and tcgen05 need at least, would spill: 32 go through mma.sync there
    (90, 256): Tile(rows=32, columns=32, num_warps=8, num_stages=1),
    (100, 64): Tile(rows=64, columns=128, num_warps=8, num_stages=2),
    (100, 128): Tile(rows=32, columns=64, num_warps=8, num_stages=2),
    (100, 256): Tile(rows=32, columns=32, num_warps=8, num_stages=1),
}
BACKWARD_ROWS: dict[tuple[int, int], Tile] = {
    # dq is the one accumulator, but scores and their gradients are both there at once: smaller than forward
    (80, 64): Tile(rows=64, columns=32, num_warps=4, num_stages=3),
    (80, 128): Tile(rows=64, columns=32, num_warps=4, num_stages=3),
    (80, 256): Tile(rows=64, columns=32, num_warps=8, num_stages=1),
    (90, 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    (90, 128): Tile(rows=128, columns=64, num_warps=8, num_stages=2),
    (90, 256): Tile(rows=64, columns=16, num_warps=8, num_stages=2),
    (100, 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    (100, 128): Tile(rows=128, columns=32, num_warps=8, num_stages=3),
    (100, 256): Tile(rows=64, columns=32, num_warps=8, num_stages=1),
}
DELTA = Tile(rows=32, columns=0, num_warps=4, num_stages=1)  # bound by memory: 16 values a thread at head 64

Bounds = torch.Tensor | None
ROWS_MAX = 2**31 - 1


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lts: torch.Tensor,
    lte: Bounds,
    uts: Bounds,
    ute: Bounds,
    *,
    causal: bool,
    scale: float,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Nq, Hq, D], k [B, Nk, Hk, D], v [B, Nk, Hk, Dv] -> out [B, Nq, Hq, Dv], lse [B, Hq, Nq] fp32.

    A row that sees no key has out 0 and lse -inf. Raises KernelError when scale is not positive.
    """
    if scale <= 0:
        raise KernelError(
            f"scale = {scale} is not positive: the running maximum needs the order of the scores"
        )
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    batch, rows, heads, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if not out.numel():
        return out, lse
    tile = tile or _tile(FORWARD, q, v)
    bounds, stats = prescan((lts, lte, uts, ute), tile.columns)
    with torch.cuda.device_of(q):
        attention_forward[(triton.cdiv(rows, tile.rows), heads, batch)](
            q, k, v, out, lse, bounds, stats, *_strides(q, k, v),
            rows, k.shape[1], k.shape[2], lts.shape[1], scale,
            **_constants(q, v, lte, uts, causal, tile), **_run(tile),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lts: torch.Tensor,
    lte: Bounds,
    uts: Bounds,
    ute: Bounds,
    *,
    causal: bool,
    scale: float,
    grad_lse: torch.Tensor | None = None,
    kept: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of out, and of lse if it has one [B, H, Nq].

    out and lse may be those of a softmax over more keys: the gradients are then parts of sums, which `kept`
    (else q's dtype) keeps in fp32.
    """
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    batch, rows, heads, _ = q.shape
    columns, kv_heads = k.shape[1:3]
    # new tensors, not empty_like: the kernels write [B, N, H, D] whatever the strides of the inputs are
    dq, dk, dv = (x.new_empty(x.shape, dtype=kept or x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    names = (lts, lte, uts, ute)
    by_rows, by_keys = tile or _tile(BACKWARD_ROWS, q, v), tile or _tile(BACKWARD_KEYS, q, v)
    row_mask = prescan(names, by_rows.columns)
    key_mask = row_mask if by_keys.columns == by_rows.columns else prescan(names, by_keys.columns)
    inputs = (q, k, v, grad_out, lse, delta)
    with torch.cuda.device_of(q):
        if lse.numel():
            attention_delta[(triton.cdiv(rows, DELTA.rows), heads, batch)](
                out, grad_out, delta, rows, HEAD_V=v.shape[-1], PAD_V=_pad(v), BR=DELTA.rows, **_run(DELTA)
            )
            if grad_lse is not None:
                # the gradient of a score is p * (dP - delta + d lse); a row that sees nothing has no p
                delta -= grad_lse.masked_fill(lse.isinf(), 0.0)
            attention_backward_rows[(triton.cdiv(rows, by_rows.rows), heads, batch)](
                *inputs, dq, *row_mask, *_strides(q, k, v),
                rows, columns, kv_heads, lts.shape[1], scale,
                **_constants(q, v, lte, uts, causal, by_rows), **_run(by_rows),
            )  # fmt: skip
        if dk.numel():
            attention_backward_keys[(triton.cdiv(columns, by_keys.columns), kv_heads, batch)](
                *inputs, dk, dv, *key_mask, *_strides(q, k, v),
                rows, columns, heads, lts.shape[1], scale,
                **_constants(q, v, lte, uts, causal, by_keys), **_run(by_keys),
            )  # fmt: skip
    return dq, dk, dv


def prescan(
    names: tuple[torch.Tensor, Bounds, Bounds, Bounds], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The P bounds in use, as whole blocks [B, Hm, P, blocks * width]; their least and most in each block.

    The second is [B, Hm, P, 2, blocks].
    """
    blocks = triton.cdiv(names[0].shape[-1], width)
    fill = (0, blocks * width - names[0].shape[-1])
    # columns past the end are masked in every row: the kernels need no other test for them
    ends = (0, ROWS_MAX, 0, ROWS_MAX)
    bounds = [F.pad(x, fill, value=end) for x, end in zip(names, ends, strict=True) if x is not None]
    together = torch.stack(bounds, dim=2)
    by_block = together.unflatten(-1, (blocks, width))
    return together, torch.stack(torch.aminmax(by_block, dim=-1), dim=3)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x, copied if the values of a head are not side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _pad(x: torch.Tensor) -> int:
    """Head size of x as the kernels see it: a power of two, 16 at least for the tensor cores."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _tile(table: dict[tuple[int, int], Tile], q: torch.Tensor, v: torch.Tensor) -> Tile:
    arch = nearest_architecture(torch.cuda.get_device_capability(q.device)) if q.is_cuda else 80
    head = max(64, _pad(q), _pad(v))
    if head > 256:
        raise KernelError(
            f"a head of {max(q.shape[-1], v.shape[-1])} values is more than the 256 of the tiles"
        )
    return table[arch, head]


def _constants(
    q: torch.Tensor, v: torch.Tensor, lte: Bounds, uts: Bounds, causal: bool, tile: Tile
) -> dict[str, Any]:
    return {
        "HEAD": q.shape[-1],
        "HEAD_V": v.shape[-1],
        "PAD": _pad(q),
        "PAD_V": _pad(v),
        "CAUSAL": causal,
        "HAS_LTE": lte is not None,
        "HAS_UT": uts is not None,
        "BR": tile.rows,
        "BC": tile.columns,
    }


def _run(tile: Tile) -> dict[str, int]:
    # named, or else an environment variable would decide whether a product and a sum round once or twice
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


KINDS = {"lse": "*fp32", "delta": "*fp32", "bounds": "*i32", "stats": "*i32", "scale": "fp32"}
TENSORS = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def variants(arch: int) -> list[Variant]:
    """Every kernel for bf16 with all bounds in use, at 128 with those of causal documents; one in fp16."""
    tables = (
        (attention_forward, FORWARD),
        (attention_backward_keys, BACKWARD_KEYS),
        (attention_backward_rows, BACKWARD_ROWS),
    )
    made = [_variant(attention_delta, "bf16", 128, DELTA, arch)]
    for kernel, table in tables:
        made += [_variant(kernel, "bf16", head, table[arch, head], arch) for head in (64, 128, 256)]
        made.append(_variant(kernel, "bf16", 128, table[arch, 128], arch, full=False))
    return [*made, _variant(attention_forward, "fp16", 128, FORWARD[arch, 128], arch)]


def _variant(kernel: Any, dtype: str, head: int, tile: Tile, arch: int, *, full: bool = True) -> Variant:
    known = {
        "HEAD": head,
        "HEAD_V": head,
        "PAD": head,
        "PAD_V": head,
        "CAUSAL": True,
        "HAS_LTE": full,
        "HAS_UT": full,
        "BR": tile.rows,
        "BC": tile.columns,
    }
    names = kernel.arg_names
    signature = {n: KINDS.get(n, f"*{dtype}" if n in TENSORS else "i32") for n in names if n not in known}
    product = TENSOR_CORES[arch]
    if kernel is attention_backward_keys and tile.columns < 64:
        product = "mma.sync"
    return Variant(
        name=f"{kernel.__name__} {dtype} {head}" + ("" if full else " causal documents"),
        kernel=kernel,
        signature=signature,
        constants={n: known[n] for n in names if n in known},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=tuple(n for n in names if n.endswith(("_batch", "_row", "_head"))),
        products={} if kernel is attention_delta else {arch: product},
    )
