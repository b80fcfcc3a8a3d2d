"""The device's core of gated attention in Triton's interpreter, against the CPU's core in fp64.

fp32 shows the arithmetic: errors relative to a tensor's norm stay under 8 u sqrt(n) (1 + s), u = eps / 2, for
sums of n terms and scores up to s, as on the CPU. 16-bit tables pass five places that store in their type on
the way to a gradient: the gated gradient, the attention before the gate, weights, score gradients, the end.
Each costs half a unit, or a whole one in bf16, which the interpreter cuts where a device rounds.
"""

import pytest
import torch

from rayfold.kernels.gated_attention import _Core
from rayfold.kernels.gated_attention_rows import attend_rows, attend_rows_backward
from rayfold.kernels.gpu.gated_attention import attend, attend_backward
from rayfold.kernels.gpu.tiles import Tile

SMALL = Tile(rows=16, columns=16, num_warps=1, num_stages=1)
NAMES = ("output", "q", "k", "v", "gate", "gate_bias", "pair")
LARGEST_SCORE = 10.0


pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device", "new_memory_holds_nan")


def small_attend(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return attend(*inputs, tile=SMALL)


def small_backward(*inputs: torch.Tensor | None, need_pair: bool) -> tuple[torch.Tensor | None, ...]:
    return attend_backward(*inputs, need_pair=need_pair, tile=SMALL)


def case(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, *, biases: str = "mask and pair", head_dim: int = 16
) -> list[torch.Tensor | None]:
    """q, k, v, gate, gate_bias, mask, pair with two heads."""
    batch, rows, queries, keys = sizes
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    tables = [normal(batch, rows, n, 2, head_dim) for n in (queries, keys, keys, queries)]
    mask = -1e4 * (torch.rand(batch, rows, 1, 1, keys, generator=random) > 0.7).to(dtype)
    pair = normal(batch, 1, 2, queries, keys)
    return [
        *tables, normal(2, head_dim), mask if "mask" in biases else None, pair if "pair" in biases else None,
    ]  # fmt: skip


def run(inputs: list[torch.Tensor | None], *core: object) -> list[torch.Tensor]:
    """The output and every gradient, in the order of NAMES."""
    leaves = [t if t is None or i == 5 else t.detach().requires_grad_() for i, t in enumerate(inputs)]
    out = _Core.apply(*leaves, *core)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def exact(inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return run([t if t is None else t.double() for t in inputs], attend_rows, attend_rows_backward)


def error_of(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("biases", ["mask and pair", "pair", "mask", "none"])
def test_the_arithmetic_is_exact_in_fp32(biases: str) -> None:
    """Queries, keys and rows that divide no tile, every combination of biases."""
    inputs = case((2, 3, 19, 18), torch.float32, biases=biases)
    bound = 8 * torch.finfo(torch.float32).eps / 2 * (2 * 3 * 19) ** 0.5 * (1 + LARGEST_SCORE)
    results = run(inputs, small_attend, small_backward)
    for name, got, truth in zip(NAMES[: len(results)], results, exact(inputs), strict=True):
        assert error_of(got, truth) < bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sizes", "head_dim"), [((1, 2, 17, 5), 16), ((1, 2, 3, 20), 32)])
def test_16_bits_err_by_what_is_stored(
    sizes: tuple[int, int, int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """The dtypes that are shipped."""
    inputs = case(sizes, dtype, head_dim=head_dim)
    bound = 5 * torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    results = run(inputs, small_attend, small_backward)
    for name, got, truth in zip(NAMES, results, exact(inputs), strict=True):
        assert got.dtype == dtype
        assert error_of(got, truth) < bound, name


def test_a_row_that_is_masked_whole_attends_to_everything_evenly() -> None:
    """-1e9 swallows every score: weights are one share each, in the gradient as in the result."""
    inputs = case((1, 2, 3, 18), torch.float32, biases="mask")
    assert inputs[5] is not None
    inputs[5][:, 1] = -1e9
    results = run(inputs, small_attend, small_backward)
    rows = run(inputs, attend_rows, attend_rows_backward)
    for name, got, truth in zip(NAMES[:-1], results, rows, strict=True):
        assert error_of(got, truth.double()) < 1e-5, name


def test_views_of_one_product_and_repetition_change_no_bit() -> None:
    """Queries, keys, values and gate lie side by side in the memory of one product."""
    inputs = case((1, 2, 5, 5), torch.float32)
    merged = torch.stack([t for t in inputs[:4] if t is not None], dim=-3)
    views: list[torch.Tensor | None] = [*merged.unbind(-3), *inputs[4:]]
    plain = run(inputs, small_attend, small_backward)
    for again in (run(views, small_attend, small_backward), run(inputs, small_attend, small_backward)):
        assert all(map(torch.equal, plain, again))
