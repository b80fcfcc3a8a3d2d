"""Core of gated attention on the device: launches of `gated_attention_kernels`, and how they are shipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .artifact import Variant
from .gated_attention_kernels import attend_kernel, gate_kernel, keys_kernel, pairs_kernel, queries_kernel
from .tiles import Tile, nearest_architecture

HEAD_DIMS = (16, 32, 64)

# (architecture, head size) -> queries x keys. Of 64 x 64 scores on 4 warps a thread holds 32, and backward
# kernels hold three such tiles beside their sums: mma.sync takes its operands from registers and spills from
# heads of 32 on, wgmma reads shared memory and spills at 64; half the keys fit both, at twice the blocks a
# multiprocessor. tcgen05 keeps its sums in tensor memory and has room. Shared memory is far from full.
WIDE = Tile(rows=64, columns=64, num_warps=4, num_stages=2)
NARROW = Tile(rows=64, columns=32, num_warps=4, num_stages=2)
TILES = {
    **{(80, head_dim): NARROW for head_dim in HEAD_DIMS},
    **{(90, head_dim): NARROW if head_dim == 64 else WIDE for head_dim in HEAD_DIMS},
    **{(100, head_dim): WIDE for head_dim in HEAD_DIMS},
}


@dataclass(frozen=True)
class _Call:
    """What every kernel of one call shares."""

    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v as [rows, H, P], heads side by side
    biases: tuple[torch.Tensor, torch.Tensor]  # mask, pair; q where there is none, never read
    sizes: tuple[int | float, ...]  # row strides of q, k, v; N, R, K, scale
    options: dict[str, Any]
    shape: tuple[int, int, int, int]  # B, N, R, K

    @property
    def grid(self) -> tuple[int, int, int]:
        """(N, blocks of queries, B * H) of the kernels that own queries."""
        batch, rows, queries, _ = self.shape
        return rows, triton.cdiv(queries, self.options["ROWS"]), batch * self.options["HEADS"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    mask: torch.Tensor | None,
    pair: torch.Tensor | None,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gated result [B, N, R, H, P], what it was before the gate, softmax's maxima and divisors."""
    call = _prepare(q, k, v, mask, pair, tile)
    batch, rows, queries, heads, _ = q.shape
    out, attended = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    top, total = (q.new_empty(batch, rows, heads, queries, dtype=torch.float32) for _ in range(2))
    gates = _table(gate)
    attend_kernel[call.grid](
        *call.tables, gates, gate_bias.contiguous(), *call.biases, out, attended, top, total,
        *call.sizes[:3], gates.stride(0), *call.sizes[3:], **call.options,
    )  # fmt: skip
    return out, attended, top, total


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    mask: torch.Tensor | None,
    pair: torch.Tensor | None,
    attended: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    *,
    need_pair: bool,
    tile: Tile | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, the gate and, if needed, the pair bias."""
    call = _prepare(q, k, v, mask, pair, tile)
    grad_gate, grad_attended, grad_q = (torch.empty_like(attended) for _ in range(3))
    grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    delta = torch.empty_like(top)
    _through_gate(call, grad, attended, gate, gate_bias, grad_attended, grad_gate, delta)
    inputs = (*call.tables, *call.biases, grad_attended, top, total, delta)
    table_rows, row_blocks, planes = call.grid
    key_blocks = triton.cdiv(k.shape[2], call.options["COLUMNS"])
    queries_kernel[call.grid](*inputs, grad_q, *call.sizes, **call.options)
    keys_kernel[table_rows, key_blocks, planes](*inputs, grad_k, grad_v, *call.sizes, **call.options)
    if pair is None or not need_pair:
        return grad_q, grad_k, grad_v, grad_gate, None
    grad_pair = torch.empty_like(pair, memory_format=torch.contiguous_format)
    options = {name: value for name, value in call.options.items() if name != "HAS_PAIR"}
    pairs_kernel[key_blocks, row_blocks, planes](*inputs, grad_pair, *call.sizes, **options)
    return grad_q, grad_k, grad_v, grad_gate, grad_pair


def _through_gate(
    call: _Call,
    grad: torch.Tensor,
    attended: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    *results: torch.Tensor,
) -> None:
    names = ("HEADS", "HEAD", "ROWS", "num_warps", "num_stages")
    options = {name: call.options[name] for name in names}
    grads, gates = _table(grad), _table(gate)
    batch, rows, queries, _ = call.shape
    gate_kernel[batch * rows, call.grid[1], options["HEADS"]](
        grads, attended, gates, gate_bias.contiguous(), *results,
        grads.stride(0), gates.stride(0), queries, **options,
    )  # fmt: skip


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pair: torch.Tensor | None,
    tile: Tile | None,
) -> _Call:
    batch, rows, queries, heads, head_dim = q.shape
    on = nearest_architecture(torch.cuda.get_device_capability(q.device)) if q.is_cuda else 80
    tile = tile or TILES[on, head_dim]
    tables = _table(q), _table(k), _table(v)
    sizes = (*(t.stride(0) for t in tables), rows, queries, k.shape[2], head_dim**-0.5)
    options = {
        "HEADS": heads, "HEAD": head_dim, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "HAS_MASK": mask is not None, "HAS_PAIR": pair is not None,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    biases = tuple(q if bias is None else bias.contiguous() for bias in (mask, pair))
    return _Call(tables, (biases[0], biases[1]), sizes, options, (batch, rows, queries, k.shape[2]))


def _table(data: torch.Tensor) -> torch.Tensor:
    """[B, N, R, H, P] as [B * N * R, H, P] whose heads lie side by side; a view where they do."""
    flat = data.flatten(0, 2)
    return flat if flat.stride()[1:] == (flat.shape[2], 1) else flat.contiguous()


KERNELS = {
    "forward": (attend_kernel, ("gate", "gate_bias", "out", "attended"), ("top", "total")),
    "gate": (
        gate_kernel,
        ("grad", "attended", "gate", "gate_bias", "grad_attended", "grad_gate"),
        ("delta",),
    ),
    "queries": (queries_kernel, ("grad", "grad_q"), ("top", "total", "delta")),
    "keys": (keys_kernel, ("grad", "grad_k", "grad_v"), ("top", "total", "delta")),
    "pairs": (pairs_kernel, ("grad", "grad_pair"), ("top", "total", "delta")),
}
MULTIPLIES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def variants(arch: int) -> list[Variant]:
    """Every kernel for each head size with both biases, in bf16; in fp16 for the widest head."""
    return [
        _variant(name, arch, head_dim, kind)
        for name in KERNELS
        for head_dim, kind in (*((size, "bf16") for size in HEAD_DIMS), (HEAD_DIMS[-1], "fp16"))
    ]


def _variant(name: str, arch: int, head_dim: int, kind: str) -> Variant:
    kernel, tensors, statistics = KERNELS[name]
    tile = TILES[arch, head_dim]
    constants: Mapping[str, Any] = {
        "HEADS": 8, "HEAD": head_dim, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "HAS_MASK": True, "HAS_PAIR": True,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    if name != "gate":
        tensors = ("q", "k", "v", "mask", "pair", *tensors)
    signature = dict.fromkeys(tensors, f"*{kind}") | dict.fromkeys(statistics, "*fp32")
    integers = [n for n in kernel.arg_names if n not in signature and n not in constants and n != "scale"]
    signature |= dict.fromkeys(integers, "i32") | ({"scale": "fp32"} if "scale" in kernel.arg_names else {})
    return Variant(
        name=f"gated attention {name} {kind} head {head_dim}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=tuple(n for n in integers if n != "table_rows"),
        products={} if name == "gate" else {arch: MULTIPLIES[arch]},
    )
