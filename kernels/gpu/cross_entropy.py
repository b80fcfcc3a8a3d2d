"""A chunk of logits on the device becomes its gradient in its place, and gives its losses.

One program a row. It sweeps the row once for the maximum and the sum of exponentials, which it corrects
whenever the maximum rises, and once more to write each logit's gradient over it; of 32k bf16 logits the
second sweep finds most in the cache. With the vocabulary split over ranks the sweeps are two kernels, as the
sums of all ranks are needed between them. Shapes: n tokens of a chunk, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..cross_entropy_cpu import IGNORED, RowSteps
from .artifact import Variant
from .tiles import Tile, nearest_architecture

# 16 logits a thread: two loads of 16 bytes in bf16, four in fp32, and as many maxima and sums in registers,
# so that half of all threads of a multiprocessor fit and keep its bus busy. Bandwidth binds all three alike.
TILES = {arch: Tile(rows=1, columns=4096, num_warps=8, num_stages=1) for arch in (80, 90, 100)}
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # below any logit; -inf less itself would be NaN
_IGNORED: tl.constexpr = tl.constexpr(IGNORED)


@triton.jit
def sweep(row, columns, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(maximum, sum of exp(logit - maximum)) of one row, each thread on its own until the end."""
    top = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, logit)
        total = total * tl.exp(top - higher) + tl.exp(logit - higher)
        top = higher
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def label_logit(row, place):  # type: ignore[no-untyped-def]
    """The logit at `place`, or 0 where that is no column."""
    return tl.load(row + place, mask=place >= 0, other=0.0).to(tl.float32)


@triton.jit
def overwrite(row, columns, place, lse, z_loss, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits become p * (1 + 2 * z_loss * lse), less 1 at the label, or 0 in an ignored row."""
    scale = tl.where(place == _IGNORED, 0.0, 1.0 + 2.0 * z_loss * lse)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logit - lse) * scale - tl.where(column == place, 1.0, 0.0)
        tl.store(row + column, gradient.to(row.dtype.element_ty), mask=column < columns)


@triton.jit
def loss_and_gradient_kernel(logits, places, losses, stride, columns, z_loss, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both sweeps, where the row holds the whole vocabulary."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride
    place = tl.load(places + at)
    label = label_logit(row, place)
    highest, total = sweep(row, columns, COLUMNS)  # its reductions wait for all threads, the label's load too
    lse = highest + tl.log(total)
    loss = lse - label + z_loss * lse * lse
    tl.store(losses + at, tl.where(place == _IGNORED, 0.0, loss))
    overwrite(row, columns, place, lse, z_loss, COLUMNS)


@triton.jit
def statistics_kernel(logits, places, tops, totals, labels, stride, columns, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first sweep: what the ranks add up."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride
    highest, total = sweep(row, columns, COLUMNS)
    tl.store(tops + at, highest)
    tl.store(totals + at, total)
    tl.store(labels + at, label_logit(row, tl.load(places + at)))


@triton.jit
def gradient_kernel(logits, places, lses, stride, columns, z_loss, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second sweep, from the logsumexp over all ranks."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride
    overwrite(row, columns, tl.load(places + at), tl.load(lses + at), z_loss, COLUMNS)


def loss_and_gradient(
    logits: torch.Tensor, places: torch.Tensor, z_loss: float, *, tile: Tile | None = None
) -> torch.Tensor:
    """Losses [n] of logits [n, V], which become their gradient; `places` as in `cross_entropy_cpu.py`."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _launch(loss_and_gradient_kernel, tile, logits, places, losses, z_loss=z_loss)
    return losses


def statistics(
    logits: torch.Tensor, places: torch.Tensor, *, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximum, sum of exp(logit - maximum) and the label's logit or 0, [n] each, of logits [n, V]."""
    top, total, label = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    _launch(statistics_kernel, tile, logits, places, top, total, label)
    return top, total, label


def gradient(
    logits: torch.Tensor, places: torch.Tensor, lse: torch.Tensor, z_loss: float, *, tile: Tile | None = None
) -> None:
    """Logits [n, V] become their gradient, given the logsumexp [n] over the whole vocabulary."""
    _launch(gradient_kernel, tile, logits, places, lse.contiguous(), z_loss=z_loss)


STEPS = RowSteps(statistics, gradient, loss_and_gradient)


def _launch(kernel: Any, tile: Tile | None, logits: torch.Tensor, *others: Any, **scalars: float) -> None:
    """`kernel` on every row of logits [n, V], whose columns lie side by side."""
    rows, columns = logits.shape
    if rows == 0:
        return
    assert logits.stride(1) == 1 or columns == 1, "a row of logits is not contiguous"
    on = nearest_architecture(torch.cuda.get_device_capability(logits.device)) if logits.is_cuda else 80
    tile = tile or TILES[on]
    kernel[(rows,)](
        logits,
        *others,
        stride=logits.stride(0),
        columns=columns,
        **scalars,
        COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def variants(arch: int) -> list[Variant]:
    """Every kernel as shipped for one architecture; fp16 is as bf16."""
    tile = TILES[arch]
    numbers = {"stride": "i32", "columns": "i32"}
    kernels: tuple[tuple[Any, dict[str, str], dict[str, str]], ...] = (
        (loss_and_gradient_kernel, {"losses": "*fp32"}, {"z_loss": "fp32"}),
        (statistics_kernel, {"tops": "*fp32", "totals": "*fp32", "labels": "*fp32"}, {}),
        (gradient_kernel, {"lses": "*fp32"}, {"z_loss": "fp32"}),
    )
    return [
        Variant(
            name=f"{kernel.__name__} {dtype}",
            kernel=kernel,
            signature={"logits": f"*{dtype}", "places": "*i64"} | rows | numbers | scalars,
            constants={"COLUMNS": tile.columns},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            aligned=("stride", "columns"),
        )
        for kernel, rows, scalars in kernels
        for dtype in ("bf16", "fp32")
    ]
