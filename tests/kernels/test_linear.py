"""Matrix products by oneDNN against fp64: values and both gradients.

A sum of K products in fp32, in any order, is off by at most about K roundings and by sqrt(K) of them when
they are independent: 4 sqrt(K) units in the last place of |x| |w| is four standard deviations.
"""

import pytest
import torch

from rayfold.kernels.linear import Deferred, add_weight_gradients, linear, product

EPS = torch.finfo(torch.float32).eps


def assert_close_for_its_sum(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`got` is a @ b, judged entry by entry against the size of what was added."""
    a, b = a.double(), b.double()
    allowed = 4 * a.shape[-1] ** 0.5 * EPS * (a.abs() @ b.abs())
    assert bool(((got.double() - a @ b).abs() <= allowed).all())


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 3, 5), (7, 384, 1), (63, 1000, 129), (33, 1, 9), (0, 4, 3)])
def test_values_and_gradients_are_those_of_the_product(rows: int, k: int, n: int) -> None:
    """Odd sizes, a single row, column or term, and no rows at all."""
    torch.manual_seed(0)
    x, w = torch.randn(2, rows, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    out = linear(x, w, "cpu")
    grad = torch.randn_like(out)
    out.backward(grad)
    flat, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
    assert x.grad is not None
    assert w.grad is not None
    assert_close_for_its_sum(out.flatten(0, 1), flat, w.detach().t())
    assert_close_for_its_sum(x.grad.flatten(0, 1), flat_grad, w.detach())
    assert_close_for_its_sum(w.grad, flat_grad.t(), flat)


def test_gaps_between_rows_do_not_show() -> None:
    """A slice of a wider tensor has rows with gaps: the same numbers, and not oneDNN's slow code."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 40)[:, 5:21], torch.randn(40, 16).t()[:, 3:30]
    assert torch.equal(product(a, b), product(a.contiguous(), b.contiguous()))


def test_the_gradient_of_a_sum_is_taken_as_it_comes() -> None:
    """It is one number seen at every place, with no memory behind each."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    linear(x, w, "cpu").sum().backward()
    assert x.grad is not None
    assert_close_for_its_sum(x.grad, torch.ones(4, 5), w.detach())


def test_the_result_is_no_view() -> None:
    """FSDP hangs hooks on what a module returns, and warns of views because theirs can be lost."""
    assert not linear(torch.randn(2, 3, 4), torch.randn(5, 4), "cpu")._is_view()


def test_a_frozen_side_costs_no_gradient() -> None:
    """A frozen weight asks for no product of its own."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    linear(x, w, "cpu").sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_a_compiler_makes_its_own_product() -> None:
    """Inductor cannot plan around oneDNN's operator with a weight that changes; the graph holds a plain
    product.
    """
    compiled = torch.compile(lambda x, w: linear(x, w).relu(), backend="aot_eager", fullgraph=True)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(compiled(x, w), torch.nn.functional.linear(x, w).relu())


@pytest.mark.parametrize(
    ("path", "dtype"),
    [("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.bfloat16)],
)
def test_a_weight_gradient_that_is_put_off_is_the_same(path: str, dtype: torch.dtype) -> None:
    """Zero-bubble pipelines compute it when they have time; added to what is there, and without a graph."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    wanted, weight = (torch.nn.Parameter(torch.ones(5, 4, dtype=dtype)) for _ in range(2))
    deferred = Deferred(collecting=True)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        (linear(inputs[0], wanted, path) * 2).backward(grad)  # type: ignore[arg-type]
        (linear(inputs[1], weight, path, deferred) * 2).backward(grad)  # type: ignore[arg-type]
    assert weight.grad is None
    add_weight_gradients(deferred.take())
    assert weight.grad is not None
    assert not weight.grad.requires_grad
    assert deferred.take() == []
    torch.testing.assert_close(weight.grad, wanted.grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    deferred.collecting = False
    linear(inputs[1], weight, path, deferred).sum().backward()  # type: ignore[arg-type]
    assert deferred.take() == []
