"""Gated attention with pair bias on the CPU against fp64: output and every gradient, both biases and none.

Bounds on the error of a whole tensor, relative to its norm. fp32: an inner product of n terms errs by about
u sqrt(n), u = eps / 2; a score of size s turns an error u s of itself into the same relative error of its
weight; a gradient passes eight products or sums on its way. So 8 u sqrt(n) (1 + s), with n the longest sum
and s the largest score. 16-bit types: at most twice the error that the reference makes in the same type.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rayfold.kernels.dispatch import KernelError
from rayfold.kernels.gated_attention import (
    GatedAttentionWeights,
    _Core,
    gated_attention,
    gated_attention_reference,
)
from rayfold.kernels.gated_attention_rows import attend_rows, attend_rows_backward

LARGEST_SCORE = 10.0


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(
    sizes: tuple[int, int, int, int] = (2, 5, 7, 9),
    *,
    shared: bool = False,
    biases: str = "mask and pair",
    dtype: torch.dtype = torch.float32,
    heads: int = 3,
    head_dim: int = 8,
) -> dict[str, torch.Tensor]:
    """Everything that goes in, by name, for B, N, R, K; `shared`: one table gives queries and keys."""
    batch, rows, queries, keys = sizes
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * std).to(dtype)

    width = 12
    data = {"q_data": normal(batch, rows, queries, width)}
    if not shared:
        data["m_data"] = normal(batch, rows, keys, width)
    for name in ("q", "k", "v", "gate"):
        data[name] = normal(width, heads, head_dim, std=width**-0.5)
    data["gate_bias"] = normal(heads, head_dim)
    data["out"] = normal(heads, head_dim, width, std=(heads * head_dim) ** -0.5)
    data["out_bias"] = normal(width)
    if "pair" in biases:
        data["pair_bias"] = normal(batch, 1, heads, queries, keys)
    if "mask" in biases:
        data["mask_bias"] = -1e4 * (torch.rand(batch, rows, 1, 1, keys, generator=random) > 0.7).to(dtype)
    return data


def run(data: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """The output and the gradient of every input but the mask, by name."""
    leaves = {name: t.clone().requires_grad_() for name, t in data.items() if name != "mask_bias"}
    names = GatedAttentionWeights.__dataclass_fields__
    out = gated_attention(
        leaves["q_data"],
        leaves.get("m_data", leaves["q_data"]),
        GatedAttentionWeights(**{name: leaves[name] for name in names}),
        mask_bias=data.get("mask_bias"),
        pair_bias=leaves.get("pair_bias"),
        path=path,
    )
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def double(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.double() for name, t in data.items()}


def error_of(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("biases", ["mask and pair", "pair", "mask", "none"])
@pytest.mark.parametrize(
    ("sizes", "shared"),
    [((2, 5, 7, 9), False), ((1, 3, 63, 63), True), ((1, 1, 1, 1), True), ((1, 2, 1, 1000), False)],
    ids=str,
)
def test_fp32_errs_by_roundings_alone(sizes: tuple[int, int, int, int], shared: bool, biases: str) -> None:
    """One table or two, odd sizes, every combination of biases: the output and each gradient."""
    data = case(sizes, shared=shared, biases=biases)
    longest = max(24, sizes[0] * sizes[1] * max(sizes[2:]))  # numbers of all heads; weights sum over rows
    bound = 8 * torch.finfo(torch.float32).eps / 2 * longest**0.5 * (1 + LARGEST_SCORE)
    exact = run(double(data), "reference")
    for name, got in run(data, "cpu").items():
        assert got.dtype == torch.float32
        if float(exact[name].norm()) < 1e-9:  # one key: its weight is 1, whatever the score
            assert float(got.norm()) < 1e-5, name
        else:
            assert error_of(got, exact[name]) < bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biases", ["mask and pair", "none"])
def test_16_bits_err_at_most_twice_as_the_reference_does(biases: str, dtype: torch.dtype) -> None:
    """Scores and softmax are fp32 inside; what is stored between them has 8 or 11 bits on both paths."""
    data = case((2, 5, 31, 33), biases=biases, dtype=dtype)
    exact, plain = run(double(data), "reference"), run(data, "reference")
    for name, got in run(data, "cpu").items():
        assert got.dtype == dtype
        assert error_of(got, exact[name]) <= 2 * error_of(plain[name], exact[name]), name


def core_inputs(dtype: torch.dtype, *, grad: bool = True) -> list[torch.Tensor]:
    """q, k, v, gate, gate_bias, mask, pair of a small core."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype).requires_grad_(grad)

    tables = [normal(2, 3, n, 2, 4) for n in (3, 5, 5, 3)]
    return [*tables, normal(2, 4), normal(2, 3, 1, 1, 5).detach(), normal(2, 1, 2, 3, 5)]


def test_the_closed_backward_is_the_derivative() -> None:
    """Against finite differences in fp64, the pair bias among the inputs."""

    def core(*inputs: torch.Tensor) -> torch.Tensor:
        return _Core.apply(*inputs, attend_rows, attend_rows_backward)

    assert torch.autograd.gradcheck(core, core_inputs(torch.float64))


def test_pieces_of_any_size_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and rows that do not divide a piece; sums over rows differ by their order alone."""
    data = case((2, 5, 7, 9))
    whole = run(data, "cpu")
    for scores in (1, 2 * 63, 3 * 2 * 63):
        monkeypatch.setattr("rayfold.kernels.gated_attention_rows.SCORES", scores)
        for name, got in run(data, "cpu").items():
            assert error_of(got, whole[name].double()) < 1e-6, name


def test_a_row_that_is_masked_whole_attends_to_everything_evenly() -> None:
    """Padding rows of an alignment: -1e9 swallows every score, so weights are one share each."""
    data = case((1, 3, 7, 9), biases="mask")
    data["mask_bias"][:, 1] = -1e9
    plain = run(data, "reference")  # in fp32: fp64 would still see the scores beside -1e9
    for name, got in run(data, "cpu").items():
        assert error_of(got, plain[name].double()) < 1e-5, name


def test_no_tensor_of_all_scores_is_kept() -> None:
    """What is saved grows with the table, not with the square of its side."""
    data, largest = case((1, 3, 63, 63), shared=True), 0

    def pack(saved: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run(data, "cpu")
    assert largest <= max(3 * 63 * 4 * 24, data["pair_bias"].numel()) < 3 * data["pair_bias"].numel()


def test_strides_frozen_weights_and_an_expanded_gradient() -> None:
    """Column attention transposes its table, adapters freeze matrices, a sum spreads one number."""
    data = case((2, 5, 7, 7), shared=True, biases="none")
    names = GatedAttentionWeights.__dataclass_fields__
    weights = GatedAttentionWeights(**{name: data[name] for name in names})
    weights = replace(weights, v=weights.v.clone().requires_grad_())
    table = data["q_data"].transpose(1, 2)
    grads = []
    for path in ("cpu", "reference"):
        out = gated_attention(table, table, weights, path=path)
        grads.append(torch.autograd.grad(out.sum(), weights.v)[0])
    assert error_of(grads[0], grads[1].double()) < 1e-5


def test_same_input_same_bits() -> None:
    """Sums over rows have a fixed order."""
    data = case()
    first, again = run(data, "cpu"), run(data, "cpu")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_it_lives_under_recompute_compilation_and_pretended_tensors() -> None:
    """Blocks run again in the backward pass, get traced, or get measured before memory is spent on them."""
    data = case(shared=True, biases="mask")
    names = GatedAttentionWeights.__dataclass_fields__
    weights = GatedAttentionWeights(**{name: data[name].requires_grad_() for name in names})

    def block(table: torch.Tensor) -> torch.Tensor:
        return gated_attention(table, table, weights)

    expected = torch.autograd.grad(block(data["q_data"]).square().sum(), weights.k)[0]
    again = torch.utils.checkpoint.checkpoint(block, data["q_data"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), weights.k)[0], expected)
    compiled = torch.compile(block, backend="eager", fullgraph=True)(data["q_data"])
    assert error_of(compiled, block(data["q_data"]).double()) < 1e-6
    pretended = {name: t.detach().to("meta") for name, t in case().items()}
    assert run(pretended, "cpu")["pair_bias"].shape == pretended["pair_bias"].shape


@pytest.mark.parametrize("sizes", [(1, 0, 3, 3), (1, 2, 0, 3), (0, 2, 3, 3)], ids=str)
def test_nothing_gives_nothing(sizes: tuple[int, int, int, int]) -> None:
    """A rank may be left without rows."""
    out = run(case(sizes), "cpu")
    assert out["output"].numel() == 0
    assert not out["v"].any()


def test_what_cannot_be_computed_is_an_error_that_says_why() -> None:
    """A mask that wants a gradient would get none in silence; so would a path that is not there."""
    data = case(shared=True)
    names = GatedAttentionWeights.__dataclass_fields__
    weights = GatedAttentionWeights(**{name: data[name] for name in names})
    table = data["q_data"]
    with pytest.raises(ValueError, match="detach"):
        gated_attention(table, table, weights, mask_bias=data["mask_bias"].requires_grad_())
    with pytest.raises(KernelError, match="reference"):
        gated_attention(table, table, weights, path="triton")
    assert torch.equal(
        gated_attention(table, table, weights, path="reference"),
        gated_attention_reference(table, table, weights, None, None),
    )
