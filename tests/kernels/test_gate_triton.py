"""The device's gate kernels in Triton's interpreter, against the reference in fp64.

Bounds as for the CPU path: 10 fp32 units of the terms, then one rounding to be stored. The interpreter cuts
fp32 off where a device rounds to bf16: a whole unit in the last place, not half.
"""

import numpy as np
import pytest
import torch

from rayfold.kernels.gate import Activation, _Gated, gated_reference
from rayfold.kernels.gpu.gate import gated, gated_backward
from rayfold.kernels.gpu.tiles import Tile

SMALL = Tile(rows=1, columns=8, num_warps=1, num_stages=1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


pytestmark = pytest.mark.usefixtures("new_memory_holds_nan")


def small(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    def forward(*args: object) -> torch.Tensor:
        return gated(*args, tile=SMALL)

    def backward(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_backward(*args, tile=SMALL)

    return _Gated.apply(gate, up, activation, forward, backward)


def assert_within(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    unit = torch.finfo(got.dtype).eps / (1 if got.dtype == torch.bfloat16 else 2)
    unit_fp32 = torch.finfo(torch.float32).eps / 2
    bound = 10 * unit_fp32 * size + 1.01 * unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 3, 19), (2, 0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_exact_to_the_last_roundings(
    activation: Activation, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Rows that divide no tile, every dtype that is shipped."""
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape).mul_(3).to(dtype) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (gate, up)]
    truth = gated_reference(*exact, activation)
    truth_gate, truth_up = torch.autograd.grad(truth, exact, grad.double())
    leaves = [t.requires_grad_() for t in (gate, up)]
    out = small(*leaves, activation)
    grad_gate, grad_up = torch.autograd.grad(out, leaves, grad)
    x, u, d = (t.detach().double().abs() for t in (gate, up, grad))
    assert_within(out.detach(), truth.detach(), x * u)
    assert_within(grad_gate, truth_gate, (1 + x) * u * d)
    assert_within(grad_up, truth_up, x * d)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_far_out_give_their_limits(activation: Activation) -> None:
    """No NaN comes from an exponent that overflows; a device does not warn about it, numpy would."""
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    with np.errstate(over="ignore"):
        out = small(gate, torch.ones(4), activation)
        (slope,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0.0, 0.0, 100.0, 1e4]
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_strides_and_repetition_change_no_bit() -> None:
    """Halves of a merged product and a gradient expanded from one number, twice."""
    torch.manual_seed(0)
    merged, spread = torch.randn(3, 26), torch.ones(()).expand(3, 13)
    halves = merged.chunk(2, -1)
    dense = [half.contiguous() for half in halves]
    outputs = [
        (gated(*pair, "silu", tile=SMALL), *gated_backward(grad, *pair, "silu", tile=SMALL))
        for pair, grad in ((halves, spread), (halves, spread), (dense, spread.contiguous()))
    ]
    for first, again, plain in zip(*outputs, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, plain)
