"""The device's bias, gate, dropout and residual in Triton's interpreter: values, and masks bit for bit."""

from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_residual import CASES, DTYPES, HOST, assert_true, make

from rayfold.kernels.dropout import draw, make_dropout, mask_reference, signed
from rayfold.kernels.gpu import residual as gpu
from rayfold.kernels.gpu.tiles import Tile
from rayfold.kernels.residual import Passes, _Residual

SMALL = Tile(rows=1, columns=64, num_warps=1, num_stages=1)
PASSES = Passes(partial(gpu.forward, tile=SMALL), partial(gpu.backward, tile=SMALL))


pytestmark = pytest.mark.usefixtures("new_memory_holds_nan")


def run(inputs: list[Any], dropout: Any) -> list[Any]:
    """(result, grads of x, bias, residual, gate)."""
    *leaves, grad = inputs
    out = _Residual.apply(*leaves, dropout, PASSES)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    return [out.detach(), *(None if t is None else next(found) for t in leaves)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("shape", "shared_dim"), [((3, 33), None), ((2, 3, 2, 11), 1), ((5, 7), -1)])
def test_results_and_every_gradient_are_true_to_the_roundings(
    shape: tuple[int, ...], shared_dim: int | None, case: dict[str, Any]
) -> None:
    """Numbers that divide no tile; the backward pass draws the mask of the forward pass again."""
    dropout = make_dropout(shape, p=case["p"], training=True, seed=11, shared_dim=shared_dim)
    for dtype in DTYPES:
        inputs = make(shape, dtype, bias=case["bias"], gate=case["gate"])
        results = run(inputs, dropout)
        assert {t.dtype for t in results if t is not None} == {dtype}
        assert_true(inputs, results, dropout, truncates=True)


@pytest.mark.parametrize("shared_dim", [None, 0, 1, 2, 3])
def test_its_mask_is_that_of_the_other_paths(shared_dim: int | None) -> None:
    """A run may change its device, and a rank its path, and neither may change what is dropped."""
    shape = (2, 3, 4, 5)
    dropout = make_dropout(shape, p=0.4, training=True, seed=3, shared_dim=shared_dim)
    out = gpu.forward(torch.ones(shape), None, torch.zeros(shape), None, dropout, tile=SMALL)
    expected = mask_reference(dropout, HOST).expand(dropout.shape).reshape(shape)
    assert torch.equal(out > 0, expected)


@triton.jit
def far_kernel(out, start, first, second, limit, scale, COLUMNS: tl.constexpr):  # fmt: skip
    """The mask of flat indices from `start` on, as a tensor too large for 32 bits draws it."""
    column = tl.arange(0, COLUMNS)
    at = start.to(tl.int64) + column
    tl.store(out + column, gpu._mask(at, 1, 1, first, second, limit, scale, False, True))


@pytest.mark.parametrize("start", [1000, 2**32 - 100, 2**40 + 7])
def test_indices_beyond_32_bits_draw_the_same_mask(start: int) -> None:
    """Pair representations of long chains have more than 2**32 numbers."""
    dropout = make_dropout((256,), p=0.4, training=True, seed=3, shared_dim=None)
    out, expected = torch.full((256,), float("nan")), torch.empty(256)
    words = (signed(dropout.first), signed(dropout.second), dropout.limit, dropout.scale)
    far_kernel[(1,)](out, start, *words, COLUMNS=256)
    draw(expected, start, dropout)
    assert torch.equal(out, expected)


def test_strides_and_repetition_change_no_bit() -> None:
    """Cut out of something larger, a gradient expanded from one number."""
    dropout = make_dropout((4, 10), p=0.3, training=True, seed=4, shared_dim=0)
    x, bias, base, gate, _ = make((4, 10), torch.bfloat16, bias=True, gate=True)
    one = torch.ones((), dtype=torch.bfloat16).expand(4, 10)
    dense = run([x, bias, base, gate, one.contiguous()], dropout)
    cut = [x.detach().repeat(1, 2)[:, :10].requires_grad_(), bias, base, gate, one]
    for again in (run([x, bias, base, gate, one.contiguous()], dropout), run(cut, dropout)):
        assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))


def test_nothing_in_gives_nothing_out() -> None:
    """No program is started for nothing."""
    dropout = make_dropout((0, 4), p=0.3, training=True, seed=4, shared_dim=None)
    results = run(make((0, 4), torch.float32, bias=True, gate=True), dropout)
    assert [t.shape for t in results] == [(0, 4), (0, 4), (4,), (0, 4), (0, 4)]
    assert results[2].tolist() == [0.0] * 4
