"""What a norm must give, in fp64, and how far roundings can carry it off. Shared by the tests of both paths.

Let u be half of fp32's epsilon, and roundings of a sum of n terms be independent, so that they add up like
sqrt(n) of them; 4 such deviations are never met by chance. A row's mean and rstd then carry sqrt(D) + 8
roundings (8: squares, division, root, products), the row's number n = (x - mean) * rstd carries them on what
it was made of, |x| * rstd and |mean| * rstd, and every term of a gradient carries them on its own size. Last,
storing rounds to the output's dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

UNIT = torch.finfo(torch.float32).eps / 2
Maybe = torch.Tensor | None
Results = Sequence[Maybe]


@dataclass(frozen=True)
class Inputs:
    """One call: x, residual or none, weight, bias or none, and the gradients of what it returns."""

    x: torch.Tensor
    residual: Maybe
    weight: torch.Tensor
    bias: Maybe
    grad: torch.Tensor
    grad_summed: Maybe
    eps: float = 0.1  # large enough to be seen


def make(
    shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype, *, add: bool, centre: bool
) -> Inputs:
    """Random inputs, the same for the same arguments."""
    source = torch.Generator().manual_seed(sum(shape))
    draws = [torch.randn(shape, generator=source) for _ in range(4)]
    x, residual, grad, grad_summed = ((draw + 0.2).to(dtype) for draw in draws)
    weight, bias = (torch.randn(shape[-1], generator=source).to(weights) for _ in range(2))
    return Inputs(
        x, residual if add else None, weight, bias if centre else None, grad, grad_summed if add else None
    )


def run(inputs: Inputs, operator: Callable[..., object]) -> Results:
    """(normed, sum, grads of x, residual, weight, bias) of operator(x, residual, weight, bias, eps)."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_()
        for t in (inputs.x, inputs.residual, inputs.weight, inputs.bias)
    ]
    outputs = operator(*leaves, inputs.eps)
    normed, summed = outputs if isinstance(outputs, tuple) else (outputs, None)
    there = [leaf for leaf in leaves if leaf is not None]
    grad = inputs.grad.to(normed.dtype)
    if summed is None:
        grads = torch.autograd.grad(normed, there, grad)
    else:
        grads = torch.autograd.grad((normed, summed), there, (grad, inputs.grad_summed))
    found = iter(grads)
    return [normed.detach(), None if summed is None else summed.detach()] + [
        None if leaf is None else next(found) for leaf in leaves
    ]


def assert_true(inputs: Inputs, results: Results, *, truncates: bool = False) -> None:
    """Everything within the roundings above. `truncates`: stored bf16 is cut off, not rounded."""
    normed, summed, grad_x, grad_residual, grad_weight, grad_bias = results
    assert normed is not None
    assert grad_x is not None
    kept = inputs.x if inputs.residual is None else inputs.x + inputs.residual
    if summed is not None:  # the one rounding of a sum is defined, so the norm can be held to that sum
        cut = torch.finfo(kept.dtype).eps * kept.double().abs() if truncates else 0.0 * kept.double()
        assert bool(((summed.double() - kept.double()).abs() <= cut).all()), "sum"
        kept = summed
    x, weight, grad = (t.double() for t in (kept, inputs.weight, inputs.grad.to(normed.dtype)))
    dim = x.shape[-1]
    roundings = 4 * (dim**0.5 + 8) * UNIT
    mean = x.mean(-1, keepdim=True) if inputs.bias is not None else torch.zeros_like(x[..., :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + inputs.eps).rsqrt()
    n = (x - mean) * rstd
    # a row's roundings also come through its mean and through the mean of its squares
    carried = x.abs() * rstd + mean.abs() * rstd + n.abs() * x.square().mean(-1, keepdim=True).sqrt() * rstd

    def check(name: str, got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
        unit = torch.finfo(got.dtype).eps / (1 if truncates and got.dtype == torch.bfloat16 else 2)
        bound = roundings * size + 1.01 * unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
        assert got.shape == exact.shape, name
        worst = ((got.double() - exact).abs() / bound).max() if got.numel() else 0.0
        assert bool(((got.double() - exact).abs() <= bound).all()), f"{name}: {worst} of the bound"

    bias = torch.zeros_like(weight) if inputs.bias is None else inputs.bias.double()
    check("normed", normed, n * weight + bias, carried * weight.abs() + bias.abs())
    h = grad * weight
    along, level = (h * n).mean(-1, keepdim=True), h.mean(-1, keepdim=True)
    expected = rstd * (h - n * along - (level if inputs.bias is not None else 0))
    size = h.abs() + carried * (h * n).abs().mean(-1, keepdim=True) + h.abs().mean(-1, keepdim=True)
    size = rstd * (size + n.abs() * (h.abs() * carried).mean(-1, keepdim=True))
    if inputs.grad_summed is not None:
        expected, size = expected + inputs.grad_summed.double(), size + inputs.grad_summed.double().abs()
    check("grad of x", grad_x, expected, size)
    if grad_residual is not None:
        assert torch.equal(grad_residual, grad_x)
    # sums over rows: sqrt(rows) roundings more, of every term's size
    rows = x.numel() // dim
    more = 1 + rows**0.5 / (dim**0.5 + 8)
    if grad_weight is not None:
        check("grad of weight", grad_weight, _sum(grad * n), more * _sum(grad.abs() * carried))
    if grad_bias is not None:
        check("grad of bias", grad_bias, _sum(grad), more * _sum(grad.abs()))


def _sum(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, -2).sum(0)
