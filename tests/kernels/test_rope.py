"""Rotary embedding of the CPU path against fp64: outputs, gradients, what is saved, in place and not.

Bounds: one output is first * cos - second * sin. Two products and one difference round by u = eps / 2 each
of what they make, so the error is at most 2 u (|first| + |second|) and a little; storing rounds once more, by
u of the output's type. The table is exact in the comparison: its fp32 numbers are widened for the truth.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.linear import linear
from rayfold.kernels.rope import (
    _Rotate,
    rotary_table,
    rotate,
    rotate_,
    rotate_reference,
    turn_stretches,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1, 2), (2, 7, 3, 10), (1, 63, 2, 64), (3, 1000, 1, 8), (2, 0, 2, 4))


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def table(shape: tuple[int, ...]) -> torch.Tensor:
    """Turns of random positions, as packed rows have."""
    positions = torch.randint(0, 5000, shape[:2], generator=torch.Generator().manual_seed(1))
    return rotary_table(positions, shape[-1], 10_000.0)


def assert_turned(got: torch.Tensor, x: torch.Tensor, turns: torch.Tensor) -> None:
    exact = rotate_reference(x.double(), turns.to(torch.complex128))
    first, second = x.double().abs().chunk(2, -1)
    size = torch.cat((first + second, first + second), -1)
    unit, unit_fp32 = torch.finfo(got.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    bound = 2.5 * unit_fp32 * size + 1.01 * unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turner", [rotate, rotate_])
def test_output_and_gradient_are_exact_to_the_last_roundings(
    turner: Callable[..., torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Forward turns by the angle, backward by its opposite; both in new memory and in place."""
    torch.manual_seed(0)
    turns, x, grad = table(shape), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    leaf = x.clone().requires_grad_()
    out = turner(leaf.clone(), turns, path="cpu")
    assert out.dtype == dtype
    assert_turned(out.detach(), x, turns)
    (got,) = torch.autograd.grad(out, leaf, grad)
    assert got.dtype == dtype
    assert_turned(got, grad, turns.conj())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_agrees_with_itself_in_fp64(dtype: torch.dtype) -> None:
    """The readable form is held to the same bound as the fast one."""
    turns, x = table((2, 63, 3, 8)), torch.randn(2, 63, 3, 8).to(dtype)
    assert_turned(rotate(x, turns, path="reference"), x, turns)


def test_many_stretches_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stretches end is a matter of caches, never of numbers."""
    turns, x = table((2, 63, 3, 8)), torch.randn(2, 63, 3, 8)
    whole = rotate(x, turns, path="cpu")
    monkeypatch.setattr("rayfold.kernels.rope.STRETCH", 5 * 2 * 3 * 8)
    assert torch.equal(rotate(x, turns, path="cpu"), whole)


def test_gradients_of_gradients_are_right() -> None:
    """The backward pass is the operator itself, so it can be differentiated again."""
    turns = table((2, 5, 3, 4)).to(torch.complex128)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    for in_place in (False, True):

        def turned(y: torch.Tensor, in_place: bool = in_place) -> torch.Tensor:
            return _Rotate.apply(y.clone(), turns, turn_stretches, in_place)

        assert torch.autograd.gradcheck(turned, (x,))
        assert torch.autograd.gradgradcheck(turned, (x,))


def test_a_product_is_turned_in_its_own_memory_and_the_gradients_are_those_of_the_reference() -> None:
    """The place it is made for: queries fresh from their matrix, flat or already split into heads."""
    torch.manual_seed(0)
    turns, x, weight = table((2, 7, 3, 8)), torch.randn(2, 7, 16), torch.randn(24, 16, requires_grad=True)
    expected = rotate_reference(linear(x, weight).unflatten(-1, (3, 8)), turns)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), weight)
    for split_first in (False, True):
        product = linear(x, weight)
        before = product.unflatten(-1, (3, 8)) if split_first else product
        out = rotate_(before, turns).view(2, 7, 3, 8)
        assert out.data_ptr() == product.data_ptr()
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(out.square().sum(), weight)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_only_the_table_is_kept_for_the_backward_pass() -> None:
    """Activations are what training runs out of; an angle's opposite needs none."""
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.data_ptr())
        return saved

    turns, x = table((1, 7, 2, 8)), torch.randn(1, 7, 2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        rotate(x, turns, path="cpu")
    assert kept == [turns.data_ptr()]


@pytest.mark.parametrize("turner", [rotate, rotate_])
def test_strides_do_not_matter(turner: Callable[..., torch.Tensor]) -> None:
    """Heads cut out of a merged product, a table that all rows share, a gradient expanded from one number."""
    torch.manual_seed(0)
    turns = table((1, 7, 2, 8))
    merged = torch.randn(2, 7, 5, 8, requires_grad=True)
    cut = merged.clone()[:, :, 1:4]
    shared = turns.expand(2, -1, -1, -1)
    expected = rotate_reference(merged[:, :, 1:4], shared)
    out = turner(cut, shared, path="cpu")
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(out.sum(), merged)
    (grad,) = torch.autograd.grad(expected.sum(), merged)
    torch.testing.assert_close(got, grad, rtol=1e-6, atol=1e-6)


def test_it_lives_under_recompute_compilation_and_pretended_tensors() -> None:
    """Blocks run again in the backward pass, get traced, or get measured before memory is spent on them."""
    turns, x = table((1, 7, 2, 8)), torch.randn(1, 7, 2, 8, requires_grad=True)
    expected = rotate(x, turns)

    def block(y: torch.Tensor) -> torch.Tensor:
        return rotate_(y * 1, turns)

    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), x), torch.autograd.grad(expected.sum(), x))
    compiled = torch.compile(block, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=1e-6)
    pretended = torch.randn(1, 7, 2, 8, device="meta", requires_grad=True)
    out = rotate_(pretended * 1, turns.to("meta"), path="cpu")
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), pretended)[0].shape == x.shape


def test_fp64_takes_the_reference_and_a_path_that_is_not_there_is_an_error() -> None:
    """What auto takes must not surprise, and what was asked for must not be replaced in silence."""
    turns, x = table((1, 7, 2, 8)), torch.randn(1, 7, 2, 8, dtype=torch.float64)
    assert torch.equal(rotate(x, turns), rotate_reference(x, turns))
    with pytest.raises(KernelError, match="reference"):
        rotate(x, turns, path="triton")
