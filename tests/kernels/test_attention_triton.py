"""FlashMask kernels in Triton's interpreter: output, lse and every gradient against a dense mask in fp64.

Errors are bounded as the FlashMask authors bound theirs: at most twice the largest error of the plain
computation in the same dtype, and twice the largest rounding of the result in that dtype. Log-sum-exps are
fp32, bounded by the roundings of their D products. The small tile has masks meet hidden, partial and clear
tiles.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayfold.kernels.attention import _TritonAttention
from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.flashmask import kinds
from rayfold.kernels.gpu import attention
from rayfold.kernels.gpu.tiles import ARCHITECTURES, Tile

SMALL = Tile(rows=32, columns=16, num_warps=4, num_stages=1)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Bounds = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device", "new_memory_holds_nan")


def columns(nk: int, *bounds: torch.Tensor | int) -> Bounds:
    full = [torch.as_tensor(b, dtype=torch.int32).expand(1, 1, nk) for b in bounds]
    return full[0], full[1], full[2], full[3]


def documents(nq: int, nk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last row of the document of each column: three of odd lengths."""
    ends = torch.tensor([nq // 5, nq // 2 + 1, nq])
    document = torch.bucketize(torch.arange(nk), ends, right=True).clamp(max=2)
    return torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))[document], ends[document]


def intervals(nq: int, nk: int, heads: int) -> Bounds:
    """Two random intervals a column; among them empty ones at both ends and columns hidden from every row."""
    generator = torch.Generator().manual_seed(nq + nk + heads)
    points = torch.randint(0, nq + 1, (4, 1, heads, nk), generator=generator, dtype=torch.int32)
    first, last = points[:2].amin(0), points[:2].amax(0)
    high, low = points[2:].amin(0), points[2:].amax(0)
    kind = torch.randint(0, 5, (1, heads, nk), generator=generator)
    kind[..., nk // 3 : nk // 3 + 20] = 2  # a whole key block that nobody sees
    first, last = first.where(kind != 0, nq), last.where(kind != 0, nq)
    high, low = high.where(kind != 1, 0), low.where(kind != 1, 0)
    return first.where(kind != 2, 0), last.where(kind != 2, nq), high, low


def window(nq: int, nk: int) -> Bounds:
    c = torch.arange(nk)
    return columns(nk, (c + 9).clamp(max=nq), nq, 0, 0)


def prefix(nq: int, nk: int) -> Bounds:
    c = torch.arange(nk)
    return columns(nk, nq, nq, 0, torch.where(c < 21, 0, c.clamp(max=nq)))


MASKS: dict[str, tuple[Callable[[int, int], Bounds], bool]] = {
    "full": (lambda nq, nk: columns(nk, nq, nq, 0, 0), False),
    "causal": (lambda nq, nk: columns(nk, nq, nq, 0, 0), True),
    "documents": (lambda nq, nk: columns(nk, documents(nq, nk)[1], nq, 0, documents(nq, nk)[0]), False),
    "causal documents": (lambda nq, nk: columns(nk, documents(nq, nk)[1], nq, 0, 0), True),
    "window": (window, True),
    "prefix": (prefix, False),
    "nothing": (lambda nq, nk: columns(nk, 0, nq, 0, 0), False),
    "intervals": (lambda nq, nk: intervals(nq, nk, 1), False),
    "intervals of 2 heads": (lambda nq, nk: intervals(nq, nk, 2), False),
    "intervals of 4 heads": (lambda nq, nk: intervals(nq, nk, 4), True),
}


def hidden(bounds: Bounds, causal: bool, nq: int, heads: int) -> torch.Tensor:
    """The definition: bool [B, heads, nq, nk]."""
    lts, lte, uts, ute = (None if b is None else b[:, :, None, :] for b in bounds)
    assert lts is not None
    i, j = torch.arange(nq)[:, None], torch.arange(lts.shape[-1])
    mask = (i >= lts) & (i < (nq if lte is None else lte))
    if uts is not None and ute is not None:
        mask = mask | ((i >= uts) & (i < ute))
    if causal:
        mask = mask | (i < j - (lts.shape[-1] - nq))
    return mask.repeat_interleave(heads // lts.shape[1], dim=1)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
    """(out, lse) with every step in the dtype of q; rows that see nothing have out 0, lse -inf."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * scale).masked_fill(mask, float("-inf"))
    blind = mask.all(-1)
    weights = scores.masked_fill(blind[..., None], 0.0).softmax(-1).masked_fill(blind[..., None], 0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def inputs(
    nq: int, nk: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, batch: int = 1
) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(nq + nk + head_dim)
    shapes = [(nq, heads[0]), (nk, heads[1]), (nk, heads[1]), (nq, heads[0])]
    return [torch.randn(batch, n, h, head_dim, generator=generator).to(dtype) for n, h in shapes]


def run(x: list[torch.Tensor], bounds: Bounds, causal: bool, tile: Tile | None = SMALL) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv of the kernels."""
    q, k, v, grad_out = x
    how: dict[str, Any] = {"causal": causal, "scale": 0.3, "tile": tile}
    out, lse = attention.forward(q, k, v, *bounds, **how)
    return [out, lse, *attention.backward(grad_out, q, k, v, out, lse, *bounds, **how)]


def plain(x: list[torch.Tensor], mask: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same five of the dense computation in `dtype`."""
    q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in x[:3])
    out, lse = dense(q, k, v, mask, 0.3)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), x[3].to(dtype))]


def assert_close(x: list[torch.Tensor], got: list[torch.Tensor], mask: torch.Tensor) -> None:
    exact, naive = plain(x, mask, torch.float64), plain(x, mask, x[0].dtype)
    for name, value, truth, same in zip(("out", "lse", "dq", "dk", "dv"), got, exact, naive, strict=True):
        assert value.shape == truth.shape, name
        if name == "lse":
            # fp32 unit times (D products, their sum, scaling, exponent, logarithm) times the largest score
            q, k = x[0].double(), x[1].double()
            largest = 0.3 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) + 5
            bound = 2.0**-24 * (q.shape[-1] + 8) * largest
            assert bool((value.isinf() == truth.isinf()).all()), name
            value, truth = value.masked_fill(value.isinf(), 0.0), truth.masked_fill(truth.isinf(), 0.0)
        else:
            stored = truth.to(value.dtype)
            rounding = float((((stored + 0.3) - 0.3).double() - truth).abs().max())
            bound = 2 * float((same.double() - truth).abs().max()) + 2 * rounding
        error = float((value.double() - truth).abs().max())
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


CASES = [
    ("full", 33, 50, (4, 4), 16, BF16),
    ("full", 1, 1, (4, 1), 16, BF16),
    ("causal", 64, 64, (2, 1), 16, BF16),
    ("causal", 1, 50, (4, 1), 24, BF16),
    ("causal", 64, 33, (2, 1), 64, FP16),  # the first rows come before the first key
    ("documents", 64, 64, (2, 1), 24, BF16),
    ("causal documents", 64, 64, (4, 2), 16, FP16),
    ("window", 64, 64, (2, 2), 64, BF16),
    ("prefix", 33, 64, (2, 1), 16, BF16),
    ("nothing", 33, 50, (2, 1), 16, BF16),
    ("intervals", 64, 50, (2, 2), 16, FP16),
    ("intervals of 2 heads", 33, 64, (4, 2), 24, FP16),
    ("intervals of 4 heads", 33, 50, (4, 1), 16, BF16),
]


@pytest.mark.parametrize(("name", "nq", "nk", "heads", "head_dim", "dtype"), CASES, ids=str)
def test_it_equals_the_dense_mask_in_output_lse_and_every_gradient(
    name: str, nq: int, nk: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Each mask, sizes that divide no tile, heads that share keys or bounds, padded head sizes."""
    make, causal = MASKS[name]
    x, bounds = inputs(nq, nk, heads, head_dim, dtype), make(nq, nk)
    assert_close(x, run(x, bounds, causal), hidden(bounds, causal, nq, heads[0]))


def test_the_shipped_tile_and_unequal_heads_and_batches_work_too() -> None:
    """Head size 80 runs as 128, values may have another one, and each item of a batch has its own mask.

    The two kernels of backward have key blocks of different sizes, which 70 keys fill up differently.
    """
    q, k, _, _ = inputs(33, 70, (2, 1), 80, BF16, batch=2)
    _, _, v, grad_out = inputs(33, 70, (2, 1), 40, BF16, batch=2)
    some = zip(MASKS["documents"][0](33, 70), MASKS["intervals"][0](33, 70), strict=True)
    lts, lte, uts, ute = (torch.cat([a, b]) for a, b in some if a is not None and b is not None)
    x, bounds = [q, k, v, grad_out], (lts, lte, uts, ute)
    assert_close(x, run(x, bounds, False, tile=None), hidden(bounds, False, 33, 2))


@pytest.mark.parametrize("both", [True, False])
def test_the_log_sum_exp_has_a_gradient_too(both: bool) -> None:
    """Whoever merges parts of a softmax goes through it; left out, it would be lost without a word.

    The first ten rows see nothing. fp16 keeps 11 bits: weights, their gradients and the result are each
    rounded to them once, and the sums over 40 rows add as much again.
    """
    mask = kinds.sparse_ranges(1, 40, [(0, 10)])
    q, k, v, grad_out = inputs(40, 40, (2, 1), 16, FP16)
    grad_lse = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(0))
    grads = []
    for dtype in (FP16, torch.float64):
        x = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        if dtype == FP16:
            out, lse = _TritonAttention.apply(*x, mask, 0.3)
        else:
            out, lse = dense(*x, mask.dense().expand(1, 2, 40, 40), 0.3)
        loss = (lse.where(lse.isfinite(), 0) * grad_lse).sum()
        grads.append(
            torch.autograd.grad(loss + both * (out * grad_out.to(dtype)).sum(), x, allow_unused=True)
        )
    for got, truth in zip(*grads, strict=True):
        truth = torch.zeros_like(got, dtype=torch.float64) if truth is None else truth
        assert float((got.double() - truth).abs().max()) <= 4 * 2.0**-11 * max(1.0, float(truth.abs().max()))


def test_skipping_tiles_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that call every tile partial make the kernels compute and compare all of them.

    The key blocks have a hole in the middle, at both ends, two that touch, and two that end inside of tiles.
    """
    blocks = torch.tensor([[16, 48, 64, 64], [48, 64, 0, 16], [16, 32, 32, 48], [40, 64, 0, 10]])
    bounds = columns(64, *blocks.repeat_interleave(16, dim=0).unbind(1))
    x, tile = inputs(64, 64, (1, 1), 16, FP16), Tile(rows=16, columns=16, num_warps=4, num_stages=1)
    skipped = run(x, bounds, False, tile)
    assert_close(x, skipped, hidden(bounds, False, 64, 1))
    scan = attention.prescan

    def wary(names: Any, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        kept, stats = scan(names, width)
        stats[:, :, :, 0], stats[:, :, :, 1] = -1, 2**30
        return kept, stats

    monkeypatch.setattr(attention, "prescan", wary)
    for name, a, b in zip(
        ("out", "lse", "dq", "dk", "dv"), skipped, run(x, bounds, False, tile), strict=True
    ):
        assert torch.equal(a, b), name


def test_causality_as_a_flag_and_as_bounds_are_the_same_bits() -> None:
    """The flag ends loops early; an upper interval says the same column by column."""
    x = inputs(33, 50, (1, 1), 16, BF16)
    diagonal = (torch.arange(50) - 17).clamp(0, 33)
    by_flag = run(x, columns(50, 33, 33, 0, 0), True)
    by_bounds = run(x, columns(50, 33, 33, 0, diagonal), False)
    assert all(torch.equal(a, b) for a, b in zip(by_flag, by_bounds, strict=True))


def test_bounds_that_are_not_given_are_those_that_hide_nothing_more() -> None:
    """Kernels compiled without lte, or without uts and ute, do the same arithmetic and compare less."""
    x = inputs(33, 50, (1, 1), 16, BF16)
    lts, lte, uts, ute = MASKS["causal documents"][0](33, 50)
    expected = run(x, (lts, lte, uts, ute), True)
    for fewer in ((lts, None, None, None), (lts, lte, None, None), (lts, None, uts, ute)):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(x, fewer, True), strict=True))


def test_a_tile_that_nobody_sees_is_never_loaded() -> None:
    """NaN in its keys and values reaches nothing; its own gradients are zero, not what memory held."""
    bounds = columns(48, torch.where(torch.arange(48) // 16 == 1, 0, 33), 33, 0, 0)
    q, k, v, grad_out = inputs(33, 48, (2, 1), 16, BF16)
    k[:, 16:32] = v[:, 16:32] = float("nan")
    *rest, dk, dv = run([q, k, v, grad_out], bounds, False)
    assert not any(bool(t.isnan().any()) for t in rest)
    for grad in (dk, dv):
        assert bool((grad[:, 16:32] == 0).all())
        assert bool(grad[:, :16].abs().min() > 0)


def test_strided_inputs_give_the_bits_of_contiguous_ones_every_time() -> None:
    """Parts of one fused product, expanded gradients, transposed queries, a second run: same bits."""
    fused = torch.randn(1, 33, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = fused[:, :, :2], fused[:, :, 2:3], fused[:, :, 3:]
    grad_out = torch.tensor(0.5, dtype=BF16).expand(1, 33, 2, 16)
    bounds = columns(33, 33, 33, 0, 0)
    views = run([q, k, v, grad_out], bounds, True)
    spread = q.movedim(-1, 0).contiguous().movedim(0, -1)  # the values of a head lie apart
    for again in (
        [t.contiguous() for t in (q, k, v, grad_out)],
        [spread, k, v, grad_out],
        [q, k, v, grad_out],
    ):
        assert all(torch.equal(a, b) for a, b in zip(views, run(again, bounds, True), strict=True))


def test_parts_of_the_keys_with_the_whole_lse_give_the_whole_gradients() -> None:
    """What context parallelism relies on: out and lse handed to backward may be those over more keys."""
    x = inputs(33, 32, (2, 1), 16, FP32)
    bounds = columns(32, documents(33, 32)[1], 33, 0, documents(33, 32)[0])
    out, lse, dq, dk, dv = run(x, bounds, False)
    parts = []
    for part in (slice(0, 16), slice(16, 32)):
        cut: Any = [None if b is None else b[..., part] for b in bounds]
        k, v = x[1][:, part], x[2][:, part]
        how: dict[str, Any] = {"causal": False, "scale": 0.3, "tile": SMALL}
        parts.append(attention.backward(x[3], x[0], k, v, out, lse, *cut, **how))
    (dq0, dk0, dv0), (dq1, dk1, dv1) = parts
    assert torch.equal(torch.cat((dk0, dk1), 1), dk)
    assert torch.equal(torch.cat((dv0, dv1), 1), dv)
    unit = float(dq.abs().max()) * 2.0**-24
    assert float((dq0 + dq1 - dq).abs().max()) <= 16 * unit  # sums of 32 terms in another order


@pytest.mark.parametrize(("batch", "nq", "nk"), [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_empty_inputs_give_empty_outputs_or_zeros(batch: int, nq: int, nk: int) -> None:
    """No queries: keys get zeros. No keys: every row sees nothing."""
    x = inputs(nq, nk, (2, 1), 16, BF16, batch)
    none = torch.zeros(batch, 1, nk, dtype=torch.int32)
    out, lse, *grads = run(x, (none, none, none, none), False)
    assert bool((lse == float("-inf")).all())
    for t in (out, *grads):
        assert bool((t == 0).all())


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    """The running maximum is taken before scaling, so the scale is positive; tiles end at heads of 256."""
    for head_dim, scale in ((16, 0.0), (16, -1.0), (257, 1.0)):
        q, k, v, _ = inputs(1, 1, (1, 1), head_dim, BF16)
        with pytest.raises(KernelError):
            attention.forward(q, k, v, *columns(1, 1, 1, 0, 0), causal=False, scale=scale)


def test_every_device_and_head_size_has_a_tile() -> None:
    """The launch looks them up, so a missing one would be found by a user."""
    for table in (attention.FORWARD, attention.BACKWARD_KEYS, attention.BACKWARD_ROWS):
        assert set(table) == {(arch, head) for arch in ARCHITECTURES for head in (64, 128, 256)}
