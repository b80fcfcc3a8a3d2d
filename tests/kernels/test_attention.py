"""Document attention against a dense mask: outputs and every gradient, odd lengths, shared heads.

fp32 sums of at most 65 terms in two different orders: 1e-5 relative to the tensor is a hundred roundings.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.kernels.attention import document_attention, document_runs

TOLERANCE = 1e-5


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ids: torch.Tensor
) -> torch.Tensor:
    """The definition: every score is computed, those across documents or from the future are masked."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    same = document_ids[:, :, None] == document_ids[:, None, :]
    places = torch.arange(q.shape[1])
    seen = same & (places[None, :, None] >= places[None, None, :])
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


ROWS = {
    "one document": [[0] * 63],
    "odd lengths": [[0] * 1 + [1] * 31 + [2] * 33, [5] * 64 + [6]],
    "equal runs": [[0] * 16 + [1] * 16 + [2] * 16, [3] * 16 + [4] * 16 + [5] * 16],
    "single tokens": [[0, 1, 2, 3, 4], [4, 4, 4, 5, 6]],
    "an id that comes again in the next row": [[0] * 7 + [1] * 2, [1] * 2 + [0] * 7],
    "one token": [[0]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_it_equals_dense_masked_attention(rows: list[list[int]], heads: int, kv_heads: int) -> None:
    """Splitting at boundaries must be the mask, for the output and for the gradients of q, k and v."""
    torch.manual_seed(0)
    ids = torch.tensor(rows, dtype=torch.int32)
    shape = (*ids.shape, heads, 8)
    q = torch.randn(shape, requires_grad=True)
    k, v = (torch.randn(*ids.shape, kv_heads, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape)
    results = []
    for out in (document_attention(q, k, v, document_runs(ids)), dense_attention(q, k, v, ids)):
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for name, got, expected in zip(("out", "q", "k", "v"), *results, strict=True):
        if float(expected.norm()) < 1e-6:  # one token attends to itself alone: no score, no gradient
            assert float(got.norm()) < 1e-6, name
        else:
            assert error_of(got, expected) < TOLERANCE, name


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_runs_cover_every_position_once_and_in_order(lengths: list[list[int]]) -> None:
    """The runs are the documents, whatever they are; each row ends its last one."""
    width = max(map(sum, lengths))
    padded = [[*row, width - sum(row)] if sum(row) < width else row for row in lengths]
    ids = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in padded])
    runs = document_runs(ids)
    assert [length for count, length in runs for _ in range(count)] == [n for row in padded for n in row]
    assert all(before[1] != after[1] for before, after in pairwise(runs))


def test_bf16_stays_within_its_bits() -> None:
    """bf16 inputs give bf16 outputs, off by no more than a few of its 8 bits from fp32."""
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 20 + [1] * 13], dtype=torch.int32)
    q, k, v = (torch.randn(1, 33, 2, 16) for _ in range(3))
    exact = dense_attention(q, k, v, ids)
    got = document_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), document_runs(ids))
    assert got.dtype == torch.bfloat16
    assert error_of(got.float(), exact) < 2 * 2.0**-8
