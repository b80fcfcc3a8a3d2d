"""Gated activations of the CPU path against fp64: output, both gradients, what is kept.

Bounds, with u = eps / 2 of fp32 and u' of the stored type. A vector exp, sigmoid or erf of torch is off by up
to 8 u of its largest term, and the derivative adds terms of size up to 1 + |x|: so act(x) errs by at most
10 u |x| and act'(x) by 10 u (1 + |x|). Each 16-bit step rounds once more, by u' of its result: two steps an
output, one for each product and one for each function.
"""

from collections.abc import Iterator

import pytest
import torch

from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.gate import (
    Activation,
    _Gated,
    gated_reference,
    gated_stretches,
    gated_stretches_backward,
    geglu,
    swiglu,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
SHAPES = ((1,), (7, 63), (3, 1000, 5), (2, 0, 3), (4, 0))


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The CPU path, whatever is chosen for the dtype."""
    return _Gated.apply(gate, up, activation, gated_stretches, gated_stretches_backward)


def assert_within(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """Off by at most 10 u of `size`, the terms in fp32, and two roundings to the stored type."""
    unit, unit_fp32 = torch.finfo(got.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    bound = 10 * unit_fp32 * size + 2.1 * unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_exact_to_the_last_roundings(
    activation: Activation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Computing act(gate) again must give what keeping it gave."""
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape).mul_(3).to(dtype) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (gate, up)]
    truth = gated_reference(*exact, activation)
    truth_gate, truth_up = torch.autograd.grad(truth, exact, grad.double())
    leaves = [t.requires_grad_() for t in (gate, up)]
    out = gated(*leaves, activation)
    grad_gate, grad_up = torch.autograd.grad(out, leaves, grad)
    assert out.dtype == grad_gate.dtype == grad_up.dtype == dtype
    x, u, d = (t.detach().double().abs() for t in (gate, up, grad))
    assert_within(out.detach(), truth.detach(), x * u)
    assert_within(grad_gate, truth_gate, (1 + x) * u * d)
    assert_within(grad_up, truth_up, x * d)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_far_out_give_their_limits(activation: Activation) -> None:
    """act(x) is x or nothing there, its slope one or nothing: no NaN from an exponent that overflows."""
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    out = gated(gate, torch.ones(4), activation)
    assert out.tolist() == [0.0, 0.0, 100.0, 1e4]
    assert torch.autograd.grad(out.sum(), gate)[0].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_stretches_equal_one(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stretches end is a matter of caches, never of numbers: they end where vectors do not."""
    torch.manual_seed(0)
    tensors = [torch.randn(9, 16) for _ in range(3)]
    whole = [gated_stretches(*tensors[1:], activation), *gated_stretches_backward(*tensors, activation)]
    monkeypatch.setattr("rayfold.kernels.gate.STRETCH", 32)
    parts = [gated_stretches(*tensors[1:], activation), *gated_stretches_backward(*tensors, activation)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_closed_backward_is_the_derivative(activation: Activation) -> None:
    """Against finite differences in fp64, where no formula is shared with the forward pass."""
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (gate, up))


def test_only_gate_and_up_are_kept() -> None:
    """Two of the widest activations of a model instead of three."""
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.data_ptr())
        return saved

    gate, up = (torch.randn(7, 5, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        swiglu(gate, up, path="cpu")
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_halves_of_one_product_and_an_expanded_gradient_need_no_copies_by_the_caller() -> None:
    """A merged matrix gives gate and up as strided halves; a sum gives one number for every gradient."""
    torch.manual_seed(0)
    merged = torch.randn(2, 7, 12, requires_grad=True)
    grads = []
    for pair in (gated, gated_reference):
        out = pair(*merged.chunk(2, -1), "silu")
        grads.append(torch.autograd.grad(out.sum(), merged)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # a dozen roundings of numbers up to 3


def test_a_frozen_input_gets_no_gradient() -> None:
    """Adapters freeze one of the two matrices."""
    gate, up = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate, up).sum(), up)
    torch.testing.assert_close(grad, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-6)


def test_it_lives_under_recompute_compilation_and_pretended_tensors() -> None:
    """Blocks run again in the backward pass, get traced, or get measured before memory is spent on them."""
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))
    again = torch.utils.checkpoint.checkpoint(swiglu, gate, up, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), (gate, up)), expected))
    compiled = torch.compile(swiglu, backend="eager", fullgraph=True)(gate, up)
    torch.testing.assert_close(compiled, gated_reference(gate, up, "silu"))
    pretended = [torch.randn(3, 4, device="meta", requires_grad=True) for _ in range(2)]
    for activation in ACTIVATIONS:
        out = gated(*pretended, activation)
        assert [g.shape for g in torch.autograd.grad(out.sum(), pretended)] == [gate.shape, up.shape]


def test_the_public_functions_say_which_activation() -> None:
    """The three spellings meet the three definitions, on the reference path to the bit."""
    gate, up = torch.randn(5), torch.randn(5)
    assert torch.equal(swiglu(gate, up, path="reference"), torch.nn.functional.silu(gate) * up)
    assert torch.equal(geglu(gate, up, path="reference"), torch.nn.functional.gelu(gate) * up)
    tanh = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.equal(geglu(gate, up, approximate="tanh", path="reference"), tanh)


def test_what_cannot_be_computed_is_an_error_that_says_why() -> None:
    """Broadcasting a gate would be a slip, and a path that is not there must not be replaced in silence."""
    with pytest.raises(ValueError, match="same shape"):
        swiglu(torch.ones(3, 4), torch.ones(4))
    with pytest.raises(KernelError, match="reference"):
        swiglu(torch.ones(4), torch.ones(4), path="triton")
