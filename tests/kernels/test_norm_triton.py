"""The device's norms in Triton's interpreter, against fp64 (`norm_truth.py` derives the bounds)."""

from functools import partial
from typing import Any

import pytest
import torch
from norm_truth import Inputs, assert_true, make, run

from rayfold.kernels.gpu import norm as gpu
from rayfold.kernels.gpu.tiles import Tile
from rayfold.kernels.norm import Passes, _Norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = Tile(rows=2, columns=16, num_warps=1, num_stages=1)
SPLIT = Tile(rows=1, columns=8, num_warps=1, num_stages=1)
KINDS = {
    "RMSNorm": {"add": False, "centre": False},
    "RMSNorm of a sum": {"add": True, "centre": False},
    "LayerNorm": {"add": False, "centre": True},
    "LayerNorm of a sum": {"add": True, "centre": True},
}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operator(backward_tile: Tile) -> Any:
    """`_Norm` on small tiles, three programs going backward."""
    backward = partial(gpu.backward, tile=backward_tile, programs=3)
    passes = Passes(partial(gpu.forward, tile=WHOLE), backward)
    return lambda *inputs: _Norm.apply(*inputs, passes)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["one pass", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_every_gradient_are_true_to_the_roundings(
    dtype: torch.dtype, tile: Tile, kind: dict[str, bool]
) -> None:
    """Nine rows for three programs of two, eleven columns for sixteen or for blocks of eight."""
    inputs = make((3, 3, 11), dtype, dtype, **kind)
    results = run(inputs, operator(tile))
    assert {t.dtype for t in results if t is not None} == {dtype}
    assert_true(inputs, results, truncates=True)


@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_weights_may_be_of_another_dtype(dtype: torch.dtype, weights: torch.dtype) -> None:
    """Mixed precision casts weights, or leaves them: RMSNorm promotes, as its reference does."""
    inputs = make((5, 16), dtype, weights, add=False, centre=False)
    results = run(inputs, operator(WHOLE))
    assert [t.dtype for t in results if t is not None] == [torch.float32, dtype, weights]
    assert_true(inputs, results, truncates=True)


def test_strides_and_repetition_change_no_bit() -> None:
    """Rows cut out of something larger, a gradient expanded from one number; no sum depends on timing."""
    dense = make((5, 11), torch.float32, torch.float32, add=True, centre=True)
    one = torch.ones(()).expand(5, 11)
    dense = Inputs(dense.x, dense.residual, dense.weight, dense.bias, one, one)
    cut = Inputs(
        dense.x.repeat(1, 2)[:, :11],
        dense.residual if dense.residual is None else dense.residual.t().contiguous().t(),
        dense.weight.repeat_interleave(2)[::2],
        dense.bias,
        one.contiguous(),
        one.contiguous(),
    )
    for tile in (WHOLE, SPLIT):
        first = run(dense, operator(tile))
        for other in (run(dense, operator(tile)), run(cut, operator(tile))):
            assert all(a is not None and b is not None for a, b in zip(first, other, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))  # type: ignore[arg-type]


def test_no_rows_give_no_rows_and_gradients_of_zero() -> None:
    """No program is started for nothing."""
    inputs = make((0, 8), torch.float32, torch.float32, add=True, centre=True)
    normed, _, grad_x, _, grad_weight, grad_bias = run(inputs, operator(WHOLE))
    assert normed is not None and grad_x is not None and normed.shape == grad_x.shape == (0, 8)  # noqa: PT018
    assert grad_weight is not None and grad_weight.tolist() == [0.0] * 8  # noqa: PT018
    assert grad_bias is not None and grad_bias.tolist() == [0.0] * 8  # noqa: PT018


def test_a_tile_as_shipped_holds_every_width() -> None:
    """Each row up to the widest has a tile, with as many numbers a thread whatever the width."""
    for dim in (1, 33, 128, 1000, 8192, 16_384):
        tile = gpu.TILES[80, gpu.columns_for(dim)]
        assert dim <= tile.columns
        assert tile.rows * tile.columns == 16 * 32 * tile.num_warps
    inputs = make((3, 40), torch.float32, torch.float32, add=True, centre=False)
    assert_true(inputs, run(inputs, lambda *args: _Norm.apply(*args, Passes(gpu.forward, gpu.backward))))
