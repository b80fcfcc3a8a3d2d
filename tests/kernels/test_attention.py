"""Attention under column masks against every score in fp64: outputs, log-sum-exp and all gradients.

The bound is that of FlashMask's own tests: at most twice the error of the plain computation in the same dtype
on the same numbers, plus the rounding of the result itself (a unit in the last place of its largest entry),
plus that of its sum: n terms added in another order, in fp32, differ by some sqrt(n) / 2 units.
"""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rayfold.kernels.attention import flashmask_attention
from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.flashmask import cpu, kinds
from rayfold.kernels.flashmask.mask import ColumnMask, MaskError
from rayfold.kernels.rope import rotary_table, rotate

Tensors = tuple[torch.Tensor, ...]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> Tensors:
    """The definition, in the dtype of its inputs throughout."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    hidden = mask.dense().repeat_interleave(q.shape[2] // mask.heads, dim=1)
    blind = hidden.all(-1, keepdim=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(hidden, -math.inf).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0)
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def results(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tensors],
    inputs: Tensors,
    weight: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and gradients in fp64."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out, lse = attend(*inputs)
    grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
    return dict(
        zip(("out", "lse", "q", "k", "v"), (x.detach().double() for x in (out, lse, *grads)), strict=True)
    )


def assert_as_good_as_plain(inputs: Tensors, mask: ColumnMask) -> None:
    weight = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1])
    dtype = inputs[0].dtype
    got = results(lambda q, k, v: flashmask_attention(q, k, v, mask, return_lse=True), inputs, weight)
    plain = results(lambda q, k, v: dense_attention(q, k, v, mask), inputs, weight)
    exact = results(
        lambda q, k, v: dense_attention(q, k, v, mask),
        tuple(x.double() for x in inputs),
        weight.to(dtype).double(),  # the same numbers
    )
    longest = max(inputs[1].shape[1], inputs[0].shape[1] * inputs[0].shape[2] // inputs[1].shape[2])
    for name, expected in exact.items():
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(got[name]), finite), name
        value, naive, truth = (x.where(finite, 0) for x in (got[name], plain[name], expected))
        units = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * longest**0.5 / 2
        rounding = units * float(truth.abs().max())
        allowed = 2 * float((naive - truth).abs().max()) + rounding
        assert float((value - truth).abs().max()) <= allowed, name


def random_inputs(
    batch: int, nq: int, nk: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> Tensors:
    q = torch.randn(batch, nq, heads, width)
    k, v = (torch.randn(batch, nk, key_heads, width) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def random_mask(batch: int, heads: int, nq: int, nk: int, *, causal: bool) -> ColumnMask:
    ends = torch.randint(0, nq + 1, (2, 2, batch, heads, nk)).sort(dim=1).values.to(torch.int32)
    (lts, lte), (uts, ute) = ends
    return ColumnMask(lts=lts, lte=lte, uts=uts // 3, ute=ute // 3, causal=causal, nq=nq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_it_is_as_good_as_every_score_computed(
    heads: int, key_heads: int, causal: bool, dtype: torch.dtype
) -> None:
    """Random intervals for one, the key and the query heads: nothing is hidden too much or too little."""
    torch.manual_seed(heads + key_heads)
    for mask_heads in {1, key_heads, heads}:
        inputs = random_inputs(2, 150, 150, heads, key_heads, 24, dtype)
        assert_as_good_as_plain(inputs, random_mask(2, mask_heads, 150, 150, causal=causal))


@pytest.mark.parametrize(("nq", "nk"), [(1, 128), (64, 203), (113, 1023), (239, 128), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_may_differ_in_number(nq: int, nk: int, causal: bool) -> None:
    """Causal is aligned at the bottom right; with more queries than keys the first see nothing."""
    torch.manual_seed(nq)
    nothing = torch.zeros(1, 1, nk, dtype=torch.int32)
    end = torch.full_like(nothing, nq)
    mask = ColumnMask(lts=end, lte=end, uts=nothing, ute=nothing, causal=causal, nq=nq)
    assert_as_good_as_plain(random_inputs(1, nq, nk, 2, 1, 16, torch.float32), mask)


@pytest.mark.parametrize("width", [1, 80, 256])
def test_head_sizes_up_to_256(width: int) -> None:
    """Widths that are no power of two, and the largest that is claimed."""
    torch.manual_seed(width)
    docs = torch.tensor([[0] * 65 + [1] * 64 + [2]])
    assert_as_good_as_plain(
        random_inputs(1, 130, 130, 2, 2, width, torch.float32), kinds.causal_document(docs)
    )


@pytest.mark.parametrize(
    "rows", [[[0] * 63], [[0] + [1] * 31 + [2] * 33, [5] * 64 + [6]], [[0, 1, 2, 3, 4]], [[0]]]
)
def test_packed_documents_of_any_lengths(rows: list[list[int]]) -> None:
    """One document, odd ones, single tokens, different cuts in the rows of a batch."""
    torch.manual_seed(0)
    docs = torch.tensor(rows)
    inputs = random_inputs(*docs.shape, docs.shape[1], 4, 2, 8, torch.float32)
    assert_as_good_as_plain(inputs, kinds.causal_document(docs))


def test_gradients_are_those_of_finite_differences() -> None:
    """fp64, with the log-sum-exp among the outputs, and rows that see nothing."""
    torch.manual_seed(0)
    mask = random_mask(1, 2, 9, 9, causal=True)
    inputs = tuple(x.requires_grad_() for x in random_inputs(1, 9, 9, 2, 2, 3, torch.float64))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        out, lse = flashmask_attention(q, k, v, mask, return_lse=True)
        return out, lse.where(torch.isfinite(lse), 0)

    assert torch.autograd.gradcheck(attend, inputs)


def test_rows_that_see_nothing_are_zero_and_get_no_gradient() -> None:
    """Of a range of dropped tokens at the start, no row sees a key: no NaN may come of it."""
    torch.manual_seed(0)
    mask = kinds.sparse_ranges(1, 40, [(0, 10)])
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 40, 40, 2, 2, 8, torch.float32))
    out, lse = flashmask_attention(q, k, v, mask, return_lse=True)
    out.sum().backward()
    assert torch.equal(out[:, :10], torch.zeros_like(out[:, :10]))
    assert bool((lse[:, :, :10] == -math.inf).all())
    assert bool((lse[:, :, 10:] > -math.inf).all())
    assert q.grad is not None
    assert k.grad is not None
    assert torch.equal(q.grad[:, :10], torch.zeros_like(q.grad[:, :10]))
    assert all(bool(torch.isfinite(x.grad).all()) for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_what_hidden_keys_hold_does_not_show(heads: int, dtype: torch.dtype, garbage: float) -> None:
    """Their scores may be anything, NaN too, in a tile with those of rows that are fine: bit for bit.

    Rows that see such a key, of its own document and behind it, hold NaN as they would with every score
    computed: the error is not hidden along with the key.
    """
    torch.manual_seed(0)
    docs = torch.arange(120)[None] // 3  # borders too close for tiles to follow
    mask = kinds.causal_document(docs) if heads == 1 else random_mask(1, heads, 120, 120, causal=True)
    q, k, v = random_inputs(1, 120, 120, 4, 2, 16, dtype)
    dirty = k.clone()
    dirty[:, 50] = garbage * torch.randn(16).sign()
    fine = mask.dense()[0, :, :, 50].repeat_interleave(4 // heads, dim=0).T  # [N, H]
    (out, lse), (expected, expected_lse) = (
        flashmask_attention(30 * q, keys, v, mask, return_lse=True) for keys in (dirty, k)
    )
    assert torch.equal(out[0][fine], expected[0][fine])
    assert torch.equal(lse[0].T[fine], expected_lse[0].T[fine])
    if math.isnan(garbage):
        assert bool(out[0][~fine].isnan().all())
        assert bool(lse[0].T[~fine].isnan().all())


def test_a_key_that_nobody_sees_gets_no_gradient() -> None:
    """Its gradient is zero, not whatever was in memory."""
    torch.manual_seed(0)
    nothing = torch.zeros(1, 1, 70, dtype=torch.int32)
    end = torch.full_like(nothing, 70)
    lts = end.clone()
    lts[..., 20:60] = 0
    mask = ColumnMask(lts=lts, lte=end, uts=nothing, ute=nothing, causal=False, nq=70)
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 70, 70, 1, 1, 8, torch.float32))
    flashmask_attention(q, k, v, mask).square().sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert torch.equal(x.grad[:, 20:60], torch.zeros_like(x.grad[:, 20:60]))
        assert float(x.grad[:, :20].abs().min()) > 0


def test_the_same_input_gives_the_same_bits() -> None:
    """Sums over row blocks are taken in one order."""
    torch.manual_seed(0)
    inputs = random_inputs(2, 300, 300, 4, 2, 16, torch.bfloat16)
    mask = random_mask(2, 1, 300, 300, causal=True)
    weight = torch.randn(2, 300, 4, 16)
    attend = lambda q, k, v: flashmask_attention(q, k, v, mask, return_lse=True)  # noqa: E731
    first, again = results(attend, inputs, weight), results(attend, inputs, weight)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_documents_of_ever_new_lengths_meet_few_shapes_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a compiled product for every shape, and a run packs other lengths into every row."""
    torch.manual_seed(0)
    shapes: set[tuple[torch.Size, torch.Size]] = set()

    def noted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.add((a.shape, b.shape))
        return a @ b

    monkeypatch.setattr(cpu, "_matmul", noted)
    rows = 0
    for _ in range(12):
        docs = (torch.rand(1, 700) < 1 / 90).cumsum(1)
        rows += int(docs.max()) + 1
        q, k, v = (x.requires_grad_() for x in random_inputs(1, 700, 700, 2, 1, 8, torch.float32))
        flashmask_attention(q, k, v, kinds.causal_document(docs)).sum().backward()
    sizes = {size for pair in shapes for shape in pair for size in shape} - {8}
    assert rows > 80, "there were documents enough"
    assert all(size % 16 == 0 for size in sizes), sizes


def test_inputs_are_left_as_they_are() -> None:
    """Scaling happens on copies, also where a slice of one head could be used as it lies."""
    torch.manual_seed(0)
    inputs = random_inputs(1, 50, 50, 4, 2, 8, torch.float32)
    before = [x.clone() for x in inputs]
    flashmask_attention(*inputs, random_mask(1, 4, 50, 50, causal=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_views_and_expanded_gradients_are_taken_as_they_come() -> None:
    """Heads that are a slice of one projection, and the gradient of a sum."""
    torch.manual_seed(0)
    mask = kinds.causal(1, 60)
    whole = torch.randn(1, 60, 3, 2, 8)
    grads = []
    for copy in (False, True):
        x = whole.clone().requires_grad_()
        parts = [part.clone() if copy else part for part in x.unbind(2)]
        flashmask_attention(*parts, mask).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_recompute_and_compile_pass_around_it() -> None:
    """The operator is one piece for both: the same bits under a checkpoint, the same numbers in a graph."""
    torch.manual_seed(0)
    mask = kinds.causal_document(torch.tensor([[0] * 20 + [1] * 13]))
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 33, 33, 2, 2, 8, torch.float32))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashmask_attention(q * 1, k, v, mask).square().sum()

    plain = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for run in (
        lambda *x: checkpoint(loss, *x, use_reentrant=False),
        torch.compile(loss, backend="aot_eager"),
    ):
        again = torch.autograd.grad(run(q, k, v), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


MEMORY = """
import torch
from pathlib import Path
from rayfold.kernels.attention import flashmask_attention
from rayfold.kernels.flashmask import cpu, kinds
n = {n}
q, k, v = (torch.randn(1, n, 1, 16, requires_grad=True) for _ in range(3))
mask = kinds.causal_document(torch.arange(n)[None] // 512)
flashmask_attention(q[:, :512], k[:, :512], v[:, :512], kinds.causal(1, 512)).sum().backward()
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak: a new process begins with its parent's
flashmask_attention(q, k, v, mask).sum().backward()
print(resident("VmHWM") - before)
"""


def test_memory_is_linear_in_the_sequence() -> None:
    """At 65,536 tokens every score would take 16 GiB; the path may take what some copies of its inputs do.

    An input is 4 MiB; copies of keys, values and their gradients, the output, and the gradient of the queries
    are seven, the bounds of the mask one: 40 MiB leave room for an allocator's slack.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(n=65_536)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 40 * 2**20


def test_a_mask_that_does_not_fit_says_what_would() -> None:
    """Shapes are told with their numbers before anything is computed."""
    q, k, v = random_inputs(2, 10, 10, 4, 2, 8, torch.float32)
    with pytest.raises(MaskError, match=r"3 heads; 1, 2 .* or 4"):
        flashmask_attention(q, k, v, random_mask(2, 3, 10, 10, causal=True))
    with pytest.raises(MaskError, match="11 queries"):
        flashmask_attention(q, k, v, random_mask(2, 1, 11, 10, causal=True))
    with pytest.raises(MaskError, match="equal groups"):
        flashmask_attention(q[:, :, :3], k, v, random_mask(2, 1, 10, 10, causal=True))
    with pytest.raises(KernelError, match=r"triton.*reference, cpu"):
        flashmask_attention(q, k, v, random_mask(2, 1, 10, 10, causal=True), path="triton")


def test_the_two_realisations_of_anchor_attention_agree() -> None:
    """One anchor that all documents share, or a copy before each: the same rows for every other token."""
    torch.manual_seed(0)
    lengths, width = [5, 9, 3], 8
    docs = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]])
    docs = torch.cat(
        [torch.zeros(1, 1, dtype=docs.dtype), docs + 1], dim=1
    )  # the anchor is a document of its own
    total = docs.shape[1]
    x = torch.randn(3, 1, total, 2, width, dtype=torch.float64)
    turns = rotary_table(kinds.anchor_positions(docs), width, 10_000.0).to(torch.complex128)
    q, k = (rotate(part, turns, path="reference") for part in x[:2])
    shared = flashmask_attention(q, k, x[2], kinds.anchored(docs))
    for n in range(len(lengths)):
        own = torch.cat([torch.zeros(1, dtype=torch.int64), (docs[0] == n + 1).nonzero()[:, 0]])
        alone = flashmask_attention(q[:, own], k[:, own], x[2][:, own], kinds.causal(1, len(own)))
        torch.testing.assert_close(alone[:, 1:], shared[:, own[1:]], rtol=1e-12, atol=1e-12)
