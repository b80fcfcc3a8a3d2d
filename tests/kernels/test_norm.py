"""Norms of the CPU path: fp64 truth for outputs and every gradient (`norm_truth.py` derives the bounds)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from norm_truth import Inputs, Results, assert_true, make, run

from rayfold.kernels import norm
from rayfold.kernels.dispatch import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (7, 63), (3, 5, 1000), (1000, 7))
KINDS = {
    "RMSNorm": {"add": False, "centre": False},
    "RMSNorm of a sum": {"add": True, "centre": False},
    "LayerNorm": {"add": False, "centre": True},
    "LayerNorm of a sum": {"add": True, "centre": True},
}


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def public(path: Any) -> Any:
    """The public function that fits the inputs, on one path."""

    def operator(x: torch.Tensor, residual: Any, weight: torch.Tensor, bias: Any, eps: float) -> Any:
        if bias is None and residual is None:
            return norm.rms_norm(x, weight, eps=eps, path=path)
        if bias is None:
            return norm.add_rms_norm(x, residual, weight, eps=eps, path=path)
        if residual is None:
            return norm.layer_norm(x, weight, bias, eps=eps, path=path)
        return norm.add_layer_norm(x, residual, weight, bias, eps=eps, path=path)

    return operator


def assert_same(got: Results, expected: Results) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_every_gradient_are_true_to_the_roundings(
    dtype: torch.dtype, shape: tuple[int, ...], kind: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd rows and columns, several stretches with a shorter one at the end, memory that is NaN before."""
    monkeypatch.setattr(norm, "STRETCH", 2000)
    inputs = make(shape, dtype, dtype, **kind)
    results = run(inputs, public("cpu"))
    assert {t.dtype for t in results if t is not None} == {dtype}
    assert_true(inputs, results)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_weights_may_be_of_another_dtype(
    dtype: torch.dtype, weights: torch.dtype, kind: dict[str, bool]
) -> None:
    """Mixed precision casts weights, or leaves them; dtypes of all results are those of the reference."""
    inputs = make((7, 63), dtype, weights, **kind)
    results, expected = run(inputs, public("cpu")), run(inputs, public("reference"))
    for got, other in zip(results, expected, strict=True):
        assert (got is None) == (other is None)
        assert got is None or other is None or got.dtype == other.dtype
    assert_true(inputs, results)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_reference_is_held_to_the_same_bounds(kind: dict[str, bool]) -> None:
    """The readable form is true as well."""
    inputs = make((7, 63), torch.float32, torch.float32, **kind)
    assert_true(inputs, run(inputs, public("reference")))


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rms_reference_is_the_published_llama_norm_bit_for_bit(
    dtype: torch.dtype, weights: torch.dtype
) -> None:
    """Weights of Hugging Face were trained with the cast before the product with the weight."""
    inputs = make((7, 63), dtype, weights, add=False, centre=False)
    hidden = inputs.x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + inputs.eps)
    assert torch.equal(
        norm.rms_norm(inputs.x, inputs.weight, eps=inputs.eps, path="reference"),
        hidden.to(dtype) * inputs.weight,
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fp64_gradients_are_those_of_finite_differences(kind: dict[str, bool]) -> None:
    """The closed backward pass is the derivative, through both results."""
    inputs = make((2, 3, 5), torch.float64, torch.float64, **kind)
    leaves = [None if t is None else t.requires_grad_() for t in (inputs.x, inputs.residual, inputs.weight)]
    bias = None if inputs.bias is None else inputs.bias.requires_grad_()
    assert torch.autograd.gradcheck(norm._Norm.apply, (*leaves, bias, inputs.eps, norm.CPU))


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """4,096 ones are 4,096; a sum kept in bf16 sticks at 256, where adding one changes nothing."""
    x, weight, bias = torch.randn(4096, 8).bfloat16(), torch.ones(8).bfloat16(), torch.zeros(8).bfloat16()
    bias.requires_grad_()
    norm.layer_norm(x, weight, bias, eps=1e-5, path="cpu").sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [4096.0] * 8


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_where_stretches_end_changes_no_output_and_repetition_no_bit(
    kind: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows know nothing of each other, but for the sums of the weights' gradients."""
    inputs = make((63, 10), torch.bfloat16, torch.bfloat16, **kind)
    whole = run(inputs, public("cpu"))
    assert_same(run(inputs, public("cpu")), whole)
    monkeypatch.setattr(norm, "STRETCH", 70)
    assert_same(run(inputs, public("cpu"))[:4], whole[:4])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_strides_do_not_matter(kind: dict[str, bool]) -> None:
    """Cut out of something larger, transposed, or a gradient expanded from one number."""
    dense = make((6, 4, 10), torch.float32, torch.float32, **kind)
    one = torch.ones(()).expand(6, 4, 10)
    dense = Inputs(dense.x, dense.residual, dense.weight, dense.bias, one, one if kind["add"] else None)
    strided = Inputs(
        dense.x.repeat(1, 1, 2)[..., :10],
        None if dense.residual is None else dense.residual.transpose(0, 1).contiguous().transpose(0, 1),
        dense.weight.repeat_interleave(2)[::2],
        dense.bias,
        dense.grad.contiguous(),
        None if dense.grad_summed is None else dense.grad_summed.contiguous(),
    )
    assert_same(run(strided, public("cpu")), run(dense, public("cpu")))
    x = dense.x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(
        norm.rms_norm(x, dense.weight, eps=1e-5, path="cpu"),
        norm.rms_norm(dense.x, dense.weight, eps=1e-5, path="cpu"),
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_rows_give_no_rows_and_gradients_of_zero(kind: dict[str, bool]) -> None:
    """A rank may hold no tokens of an expert, and must take part all the same."""
    inputs = make((0, 3, 8), torch.float32, torch.float32, **kind)
    normed, _, grad_x, _, grad_weight, _ = run(inputs, public("cpu"))
    assert normed is not None and normed.shape == (0, 3, 8)  # noqa: PT018
    assert grad_x is not None and grad_x.shape == (0, 3, 8)  # noqa: PT018
    assert grad_weight is not None and grad_weight.tolist() == [0.0] * 8  # noqa: PT018


def test_either_result_may_be_used_alone_and_weights_may_be_frozen() -> None:
    """A gradient that nobody asks for is None, one that nobody sends is zero."""
    inputs = make((7, 10), torch.float32, torch.float32, add=True, centre=True)
    x = inputs.x.requires_grad_()
    args = (x, inputs.residual, inputs.weight, inputs.bias)
    for used in (0, 1):
        found = [
            torch.autograd.grad(norm.add_layer_norm(*args, eps=1e-5, path=path)[used].square().sum(), x)[0]
            for path in ("cpu", "reference")
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    weight = inputs.weight.requires_grad_()
    norm.rms_norm(inputs.x.detach(), weight, eps=1e-5, path="cpu").sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_only_the_input_and_a_number_a_row_are_kept() -> None:
    """The reference keeps four arrays of x's size in fp32; activations are what training runs out of."""
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.numel() * saved.element_size())
        return saved

    x, weight = torch.randn(100, 64).bfloat16().requires_grad_(), torch.ones(64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        norm.add_rms_norm(x, x, weight, eps=1e-5, path="cpu")
    assert sum(kept) == 100 * 64 * 2 + 64 * 2 + 100 * 4


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_lives_under_recompute_compilation_and_pretended_tensors(kind: dict[str, bool]) -> None:
    """Blocks run again in the backward pass, get traced, or get measured before memory is spent on them."""
    inputs = make((7, 10), torch.float32, torch.float32, **kind)
    expected = run(inputs, public("cpu"))

    def again(*args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(public("cpu"), *args, use_reentrant=False)

    assert_same(run(inputs, again), expected)
    assert_true(inputs, run(inputs, torch.compile(public("cpu"), backend="eager", fullgraph=True)))
    pretended = Inputs(
        *(t if t is None else t.to("meta") for t in (inputs.x, inputs.residual, inputs.weight, inputs.bias)),
        inputs.grad.to("meta"),
        None if inputs.grad_summed is None else inputs.grad_summed.to("meta"),
    )
    for got, real in zip(run(pretended, public("cpu")), expected, strict=True):
        assert (got is None) == (real is None)
        assert got is None or real is None or (got.shape, got.dtype) == (real.shape, real.dtype)


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    """Broadcasting a residual or a weight would be a mistake; a path that is not there names one that is."""
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(KernelError, match="one shape"):
        norm.add_rms_norm(x, x[:1], weight, eps=1e-5)
    with pytest.raises(KernelError, match="a number a column"):
        norm.rms_norm(x, weight[:1], eps=1e-5)
    with pytest.raises(KernelError, match="reference, cpu"):
        norm.rms_norm(x, weight, eps=1e-5, path="triton")
