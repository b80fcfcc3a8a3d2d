"""Bias, gate, dropout and residual on the CPU: the mask first, then values and every gradient against fp64.

Bounds: a result is a sum of (x + bias) * gate * mask * scale and the residual: five roundings by u, half of
fp32's epsilon, of the sum of absolute terms, and one more, of the output's dtype, to be stored. A gradient of
the bias adds rows up: sqrt(rows) roundings, as independent ones do, times 4 for what is never met by chance.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from rayfold.kernels import dropout as dropout_file
from rayfold.kernels import residual
from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.dropout import Dropout, draw, make_dropout, mask_reference
from rayfold.kernels.residual import CPU, _Residual, bias_dropout_residual

UNIT = torch.finfo(torch.float32).eps / 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOST = torch.device("cpu")
KEYS = (0x2F181CDB, 0xBB0CF61B)
ANSWER = [0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1]


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def mask(shape: tuple[int, ...], p: float, seed: int, shared_dim: int | None = None) -> torch.Tensor:
    dropout = make_dropout(shape, p=p, training=True, seed=seed, shared_dim=shared_dim)
    return mask_reference(dropout, HOST).expand(dropout.shape).reshape(shape)


def deviations(kept: torch.Tensor, p: float) -> float:
    """By how many standard deviations of a fair draw the number of kept ones is off."""
    n = kept.numel()
    return abs(float(kept.sum()) - n * (1 - p)) / (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_as_many_are_kept_as_p_says(p: float) -> None:
    """Five standard deviations are met once in two million fair draws; the seeds are fixed."""
    for seed in (0, 1, 2, 2**63, -1):
        assert deviations(mask((1000, 1000), p, seed), p) < 5


def test_masks_of_different_seeds_are_independent() -> None:
    """Neighbouring seeds, as steps and layers have them, agree as often as strangers do."""
    masks = [mask((2**18,), 0.5, seed) for seed in (0, 1, 2, 3, 4, 1000, 2**32, 2**33)]
    for n, one in enumerate(masks):
        for other in masks[:n]:
            assert deviations(one == other, 0.5) < 5


def test_neighbours_in_a_mask_are_independent() -> None:
    """Next to each other, and a row of any power of two apart: no stripes, and no columns of their own."""
    drawn = mask((2**18,), 0.5, 7)
    for apart in (1, 2, 3, 4, 5, 7, *(2**n for n in range(3, 17)), 1000):
        assert deviations(drawn[apart:] == drawn[:-apart], 0.5) < 5
    square = drawn.view(512, 512).double()
    for axis in (0, 1):  # 512 sums of 512 fair bits: chi square of 512 degrees, deviation sqrt(2 * 512)
        chi = ((square.sum(axis) - 256).square() / 128).sum()
        assert abs(float(chi) - 512) < 5 * 32
    for bits in (2, 8):  # every pattern of neighbours as often as every other
        patterns = (drawn.view(-1, bits).long() * 2 ** torch.arange(bits)).sum(1).bincount(minlength=2**bits)
        fair = 2**18 / bits / 2**bits
        chi = ((patterns - fair).square() / fair).sum()
        assert abs(float(chi) - (2**bits - 1)) < 5 * (2 * 2**bits) ** 0.5


@pytest.mark.parametrize("start", [0, 1000, 2**31 - 100, 2**32 - 100, 2**40 + 2**32 - 1])
def test_both_arithmetics_draw_the_same_mask_whatever_the_index(start: int) -> None:
    """The CPU path wraps in 32 bits where the reference masks 64, past the ends of 31 and of 32 bits too."""
    dropout = make_dropout((256,), p=0.3, training=True, seed=5, shared_dim=None)
    drawn = torch.full((256,), float("nan"))
    draw(drawn, start, dropout)
    arange = torch.arange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "arange", lambda n, **k: arange(n, **k) + start)
        expected = mask_reference(dropout, HOST)
    assert torch.equal(drawn > 0, expected.flatten())
    assert set(drawn.unique().tolist()) <= {0.0, torch.tensor(dropout.scale).item()}


def test_known_answers() -> None:
    """A mask may not change from one version to the next: runs are resumed."""
    dropout = make_dropout((16,), p=0.5, training=True, seed=1234, shared_dim=None)
    assert (dropout.first, dropout.second) == KEYS
    assert mask_reference(dropout, HOST).flatten().long().tolist() == ANSWER


@pytest.mark.parametrize("shared_dim", [0, 1, 2, 3, -1, -2])
def test_a_shared_mask_is_one_along_its_axis_and_varies_along_the_others(shared_dim: int) -> None:
    """As `x * dropout(ones with size 1 on that axis)`, the Evoformer's dropout of rows or columns."""
    drawn = mask((4, 5, 6, 7), 0.5, 3, shared_dim)
    assert torch.equal(drawn, drawn.select(shared_dim, 0).unsqueeze(shared_dim).expand_as(drawn))
    for other in range(4):
        if other != shared_dim % 4:
            assert not torch.equal(drawn, drawn.select(other, 0).unsqueeze(other).expand_as(drawn))
    flat = [size for dim, size in enumerate(drawn.shape) if dim != shared_dim % 4]
    assert torch.equal(drawn.select(shared_dim, 0), mask((torch.Size(flat).numel(),), 0.5, 3).view(flat))


CASES = {
    "everything": {"bias": True, "gate": True, "p": 0.3},
    "no gate": {"bias": True, "gate": False, "p": 0.3},
    "no bias": {"bias": False, "gate": True, "p": 0.3},
    "dropout alone": {"bias": False, "gate": False, "p": 0.9},
    "no dropout": {"bias": True, "gate": True, "p": 0.0},
    "all dropped": {"bias": True, "gate": True, "p": 1.0},
    "nearly all dropped": {"bias": True, "gate": True, "p": 1 - 1e-6},
}


def make(shape: tuple[int, ...], dtype: torch.dtype, *, bias: bool, gate: bool) -> list[Any]:
    """x, bias, residual, gate as leaves, and the gradient of the result."""
    source = torch.Generator().manual_seed(0)
    x, base, factor, grad = (torch.randn(shape, generator=source).to(dtype) for _ in range(4))
    offset = torch.randn(shape[-1], generator=source).to(dtype)
    leaves = [x, offset if bias else None, base, factor if gate else None]
    return [*(None if t is None else t.requires_grad_() for t in leaves), grad]


def run(inputs: list[Any], path: Any, **options: Any) -> list[Any]:
    """(result, grads of x, bias, residual, gate)."""
    x, bias, base, gate, grad = inputs
    out = bias_dropout_residual(x, bias, base, gate=gate, path=path, **options)
    there = [t for t in (x, bias, base, gate) if t is not None]
    found = iter(torch.autograd.grad(out, there, grad))
    return [out.detach(), *(None if t is None else next(found) for t in (x, bias, base, gate))]


def assert_true(inputs: list[Any], results: list[Any], dropout: Dropout, *, truncates: bool = False) -> None:
    """Within the roundings on top. `truncates`: stored bf16 is cut off, not rounded."""
    x, bias, base, gate, grad = (None if t is None else t.detach().double() for t in inputs)
    factor = mask_reference(dropout, HOST).expand(dropout.shape).reshape(x.shape) * dropout.scale
    bias, gate = torch.zeros(()) if bias is None else bias, torch.ones(()) if gate is None else gate

    def check(
        name: str, got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, roundings: float
    ) -> None:
        units = torch.finfo(got.dtype).eps / (1 if truncates and got.dtype == torch.bfloat16 else 2)
        bound = roundings * UNIT * size + 1.01 * units * exact.abs() + torch.finfo(got.dtype).smallest_normal
        finite = exact.abs() < torch.finfo(got.dtype).max  # a scale of 2**20 is more than fp16 can hold
        assert bool((((got.double() - exact).abs() <= bound) | ~finite).all()), name

    size = (x.abs() + bias.abs()) * gate.abs() * factor
    check("result", results[0], base + (x + bias) * gate * factor, base.abs() + size, 6)
    for_x = grad * factor * gate
    check("grad of x", results[1], for_x, for_x.abs(), 4)
    if results[2] is not None:
        rows = x.numel() // x.shape[-1]
        stored = torch.finfo(results[1].dtype).eps / UNIT  # the device sums what it stored
        terms = for_x.abs().flatten(0, -2).sum(0)
        check("grad of bias", results[2], for_x.flatten(0, -2).sum(0), terms, 4 * rows**0.5 + 4 + stored)
    assert torch.equal(results[3], inputs[4])
    if results[4] is not None:
        check(
            "grad of gate",
            results[4],
            grad * factor * (x + bias),
            (grad * factor * (x.abs() + bias.abs())).abs(),
            5,
        )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "shared_dim"),
    [((7, 63), None), ((2, 5, 9, 63), 1), ((3, 4, 5, 1), -2), ((3, 7, 10), 2), ((1000, 1), 0)],
)
def test_results_and_every_gradient_are_true_to_the_roundings(
    shape: tuple[int, ...], shared_dim: int | None, dtype: torch.dtype, case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The backward pass draws the mask again, and both draw it in stretches that cut through it."""
    monkeypatch.setattr(residual, "STRETCH", 700)
    monkeypatch.setattr(dropout_file, "DRAW", 100)
    inputs = make(shape, dtype, bias=case["bias"], gate=case["gate"])
    options = {"p": case["p"], "training": True, "seed": 11, "shared_dim": shared_dim}
    dropout = make_dropout(shape, **options)
    for path in ("cpu", "reference"):
        results = run(inputs, path, **options)
        assert {t.dtype for t in results if t is not None} == {dtype}
        assert_true(inputs, results, dropout)


def test_fp64_gradients_are_those_of_finite_differences() -> None:
    """The closed backward pass is the derivative."""
    *leaves, _ = make((2, 3, 5), torch.float64, bias=True, gate=True)
    dropout = make_dropout((2, 3, 5), p=0.4, training=True, seed=1, shared_dim=1)
    assert torch.autograd.gradcheck(_Residual.apply, (*leaves, dropout, CPU))


def test_without_training_nothing_is_dropped() -> None:
    """And nothing scaled: the same as p = 0."""
    inputs = make((7, 10), torch.float32, bias=True, gate=True)
    evaluated = run(inputs, "cpu", p=0.5, training=False, seed=1)
    for got, expected in zip(evaluated, run(inputs, "cpu", p=0.0, training=True, seed=2), strict=True):
        assert torch.equal(got, expected)
    x, bias, base, gate, _ = inputs
    torch.testing.assert_close(evaluated[0], base + gate * (x + bias), rtol=1e-6, atol=1e-6)


def test_without_a_gate_nothing_is_kept_for_the_backward_pass() -> None:
    """Neither the mask nor a product: the seed draws it again."""
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.numel())
        return saved

    x, bias, base, _, _ = make((7, 10), torch.float32, bias=True, gate=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        bias_dropout_residual(x, bias, base, p=0.1, training=True, seed=1, path="cpu")
    assert kept == []


def test_strides_and_repetition_change_no_bit() -> None:
    """Cut out of something larger, transposed, a gradient expanded from one number."""
    options: dict[str, Any] = {"p": 0.3, "training": True, "seed": 4, "shared_dim": 0}
    x, bias, base, gate, _ = make((4, 6, 10), torch.bfloat16, bias=True, gate=True)
    one = torch.ones((), dtype=torch.bfloat16).expand(4, 6, 10)
    dense = run([x, bias, base, gate, one.contiguous()], "cpu", **options)
    strided = [
        x.detach().repeat(1, 1, 2)[..., :10].requires_grad_(),
        bias,
        base.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        gate.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_(),
        one,
    ]
    for got, expected in zip(run(strided, "cpu", **options), dense, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 3, 4)], ids=str)
def test_nothing_in_gives_nothing_out(shape: tuple[int, ...]) -> None:
    """Empty batches exist; the bias then has a gradient of zero."""
    for shared_dim in (None, 0, len(shape) - 1):
        inputs = make(shape, torch.float32, bias=True, gate=True)
        results = run(inputs, "cpu", p=0.3, training=True, seed=1, shared_dim=shared_dim)
        assert [t.shape for t in results] == [shape, shape, (4,), shape, shape]
        assert results[2].tolist() == [0.0] * 4


def test_it_lives_under_recompute_compilation_and_pretended_tensors() -> None:
    """A recomputed block draws the same mask without anybody keeping the state of a generator."""
    inputs = make((2, 6, 10), torch.float32, bias=True, gate=True)
    x, bias, base, gate, grad = inputs
    options: dict[str, Any] = {"p": 0.3, "training": True, "seed": 4, "shared_dim": 1}
    expected = run(inputs, "cpu", **options)

    def block(y: torch.Tensor) -> torch.Tensor:
        return bias_dropout_residual(y * 1, bias, base, gate=gate, **options)

    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x, grad)[0], expected[1])
    compiled = torch.compile(block, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected[0], rtol=1e-6, atol=1e-6)
    pretended = [t.detach().to("meta").requires_grad_() for t in inputs[:4]] + [grad.to("meta")]
    for got, real in zip(run(pretended, "cpu", **options), expected, strict=True):
        assert (got.shape, got.dtype) == (real.shape, real.dtype)


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    """A probability, an axis, a shape and a path, each with its remedy."""
    x, bias, base, gate, _ = make((3, 4), torch.float32, bias=True, gate=True)
    options: dict[str, Any] = {"p": 0.1, "training": True, "seed": 1}
    with pytest.raises(KernelError, match="from 0 to 1"):
        bias_dropout_residual(x, bias, base, **(options | {"p": 1.5}))
    with pytest.raises(KernelError, match="-2 to 1"):
        bias_dropout_residual(x, bias, base, shared_dim=2, **options)
    with pytest.raises(KernelError, match="one shape"):
        bias_dropout_residual(x, bias, base[:1], **options)
    with pytest.raises(KernelError, match="reference, cpu"):
        bias_dropout_residual(x, bias, base, gate=gate, path="triton", **options)
    dropout = make_dropout((3, 4), shared_dim=None, **options)
    assert replace(dropout, kept=0).scale == 0.0
