"""The device's rotary kernel in Triton's interpreter, against the reference in fp64."""

import pytest
import torch

from rayfold.kernels.gpu.rope import turn
from rayfold.kernels.gpu.tiles import Tile
from rayfold.kernels.rope import _Rotate, rotary_table, rotate_reference

SMALL = Tile(rows=2, columns=8, num_warps=1, num_stages=1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_turn(x: torch.Tensor, out: torch.Tensor, turns: torch.Tensor) -> None:
    turn(x, out, turns, tile=SMALL)


def table(batch: int, length: int, head_dim: int) -> torch.Tensor:
    positions = torch.randint(0, 900, (batch, length), generator=torch.Generator().manual_seed(1))
    return rotary_table(positions, head_dim, 10_000.0)


def assert_turned(got: torch.Tensor, x: torch.Tensor, turns: torch.Tensor) -> None:
    """The bound of the CPU path: two products and a difference in fp32, then one rounding to be stored.

    The interpreter cuts fp32 off where a device rounds to bf16: a whole unit in the last place, not half.
    """
    exact = rotate_reference(x.double(), turns.to(torch.complex128))
    first, second = x.double().abs().chunk(2, -1)
    size = torch.cat((first + second, first + second), -1)
    unit_fp32 = torch.finfo(torch.float32).eps / 2
    unit = torch.finfo(got.dtype).eps / (1 if got.dtype == torch.bfloat16 else 2)
    bound = 2.5 * unit_fp32 * size + 1.01 * unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 10), (1, 2, 5, 16), (1, 0, 2, 4)], ids=str)
def test_forward_and_backward_are_exact_to_the_last_roundings(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Heads and pairs that divide no tile; the memory written into is NaN before."""
    torch.manual_seed(0)
    batch, length, _, head_dim = shape
    turns, x = table(batch, length, head_dim), torch.randn(shape).to(dtype)
    for angles in (turns, turns.conj()):
        out = torch.full_like(x, float("nan"))
        small_turn(x, out, angles)
        assert_turned(out, x, angles)


def test_it_turns_in_place_under_autograd() -> None:
    """The same launch serves as forward in the memory of x and as backward in new memory."""
    torch.manual_seed(0)
    turns, x = table(1, 3, 8), torch.randn(1, 3, 3, 8)
    leaf = x.clone().requires_grad_()
    product = leaf * 1
    out = _Rotate.apply(product, turns, small_turn, True)
    assert out.data_ptr() == product.data_ptr()
    assert_turned(out.detach(), x, turns)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert_turned(grad, torch.ones_like(x), turns.conj())


def test_strides_and_repetition_change_no_bit() -> None:
    """Heads cut out of a merged product, numbers that are not neighbours, a table shared by rows."""
    torch.manual_seed(0)
    turns = table(1, 3, 8).expand(2, -1, -1, -1)
    merged = torch.randn(2, 3, 5, 16)
    cut = merged[:, :, 1:4, ::2]
    out, again, dense = (torch.full((2, 3, 3, 8), float("nan")) for _ in range(3))
    small_turn(cut, out, turns)
    small_turn(cut, again, turns)
    small_turn(cut.contiguous(), dense, turns.contiguous())
    assert torch.equal(out, again)
    assert torch.equal(out, dense)
    small_turn(cut, cut, turns)
    assert torch.equal(cut, out)
