"""AdamW over flat buffers and norms of their tensors, against torch's own optimizer and fp64."""

import math
from typing import Any

import pytest
import torch

from rayfold.kernels.adamw import (
    ALIGNMENT,
    FlatLayout,
    adamw_,
    aligned,
    moment_dtype,
    norms,
    share_buffers,
    square_sum,
)
from rayfold.kernels.config import Path

SHAPES = [(1,), (7, 9), (64,), (1000,), (3, 5, 11), (128, 65)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
UNIT = 2.0**-24  # half a bit of fp32


def tensors_of(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flat_of(layout: FlatLayout, tensors: list[torch.Tensor]) -> torch.Tensor:
    flat = torch.zeros(layout.numel, dtype=tensors[0].dtype)
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        view.copy_(tensor)
    return flat


def update(*flat: torch.Tensor, **how: Any) -> None:
    """One update of one buffer."""
    params, grads, exp_avg, exp_avg_sq = flat
    adamw_([params], [grads], [exp_avg], [exp_avg_sq], **OPTIONS, **how)


def flat_run(path: Path, steps: int = 5, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Parameters and both moments after some steps, by tensor."""
    layout = FlatLayout.of(SHAPES)
    params = flat_of(layout, tensors_of(0)).to(dtype)
    moments = [torch.zeros(layout.numel, dtype=moment_dtype(dtype)) for _ in range(2)]
    for step in range(1, steps + 1):
        grads = flat_of(layout, tensors_of(step)).to(dtype)
        update(params, grads, *moments, step=step, path=path)
    return [layout.views(flat) for flat in (params, *moments)]


def torch_run(steps: int = 5, **how: Any) -> list[list[torch.Tensor]]:
    """The same by torch's optimizer over a list of tensors."""
    params = tensors_of(0)
    optimizer = torch.optim.AdamW(params, **OPTIONS, **how)
    for step in range(1, steps + 1):
        for param, grad in zip(params, tensors_of(step), strict=True):
            param.grad = grad
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    return [params, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]


def test_the_reference_is_torchs_formula_bit_by_bit() -> None:
    """What every other path is measured by is what torch.optim.AdamW computes, one operation at a time."""
    expected = torch_run(foreach=False, fused=False)
    for got, wanted in zip(flat_run("reference"), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_flat_update_is_torchs_fused_update_of_each_tensor_bit_by_bit() -> None:
    """Sharing a buffer is no approximation: every element that torch computes in vector registers is equal.

    The last elements of a tensor that fill no register (at most 15) torch computes one by one, with
    another rounding of the second moment; in a buffer they are like all others.
    """
    expected = torch_run(fused=True)
    for got, wanted in zip(flat_run("cpu"), expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            whole = a.numel() // 16 * 16
            assert torch.equal(a.flatten()[:whole], b.flatten()[:whole])
            # a rounding a step, in a moment that keeps 0.95 of it
            torch.testing.assert_close(a, b, rtol=5 * 4 * UNIT, atol=5 * 4 * UNIT * OPTIONS["lr"])


def test_both_paths_agree_to_the_roundings_of_a_step() -> None:
    """The fused kernel contracts products and sums; per step that is a few roundings of each operand."""
    for got, wanted in zip(flat_run("cpu"), flat_run("reference"), strict=True):
        for a, b in zip(got, wanted, strict=True):
            # 5 steps of at most 8 roundings, relative to the largest term that enters a sum (below 8 here)
            torch.testing.assert_close(a, b, rtol=0, atol=5 * 8 * UNIT * 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_16_bit_parameters_are_fp32(dtype: torch.dtype) -> None:
    """A second moment that decays by 0.1% a step would not move at all in 8 bits."""
    params, first, second = flat_run("auto", dtype=dtype)
    assert params[0].dtype == dtype
    assert {x.dtype for x in first + second} == {torch.float32}
    wanted, _, _ = flat_run("reference")
    # a rounding of the parameter a step and one at the start; gradients that round move an update by less
    bound = 2 * 6 * torch.finfo(dtype).eps * 5
    assert all(float((a.float() - b).abs().max()) < bound for a, b in zip(params, wanted, strict=True))


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_dividing_gradients_in_the_update_is_dividing_them_before(path: Path) -> None:
    """Clipping may ride along with the update and save a pass."""
    results = []
    for inside in (True, False):
        params, grads, first, second = (torch.linspace(0.1, 2, 192) * k for k in (1, 2, 3, 4))
        scale = torch.tensor(3.0)
        if not inside:
            grads = grads / scale
        given = scale if inside else None
        update(params, grads, first, second, step=3, grad_scale=given, path=path)
        results.append((params, first, second))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_buffers_of_a_call_do_not_know_of_each_other(path: Path) -> None:
    """Several at once are each alone."""
    flats = [[torch.rand(numel) for _ in range(4)] for numel in (64, 1, 1000)]
    alone = [[x.clone() for x in flat] for flat in flats]
    adamw_(*zip(*flats, strict=True), step=2, path=path, **OPTIONS)
    for flat in alone:
        update(*flat, step=2, path=path)
    assert all(
        torch.equal(a, b) for x, y in zip(flats, alone, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_padding_stays_zero(path: Path) -> None:
    """It is updated like everything else, and from zeros only zeros come."""
    layout = FlatLayout.of(SHAPES)
    flat = [flat_of(layout, tensors_of(seed)).abs() for seed in range(4)]
    update(*flat, step=1, path=path)
    owned = torch.zeros(layout.numel, dtype=torch.bool)
    for view in layout.views(owned):
        view.fill_(True)
    assert layout.has_gaps
    assert all(not x[~owned].any() and x[owned].all() for x in flat)


def test_nothing_can_be_updated() -> None:
    """A rank may hold no part of any tensor."""
    paths: tuple[Path, ...] = ("reference", "cpu")
    for path in paths:
        update(*(torch.zeros(0) for _ in range(4)), step=1, path=path)
        adamw_([], [], [], [], step=1, path=path, **OPTIONS)
    layout = FlatLayout.of([])
    total, each = norms(torch.zeros(0), layout)
    assert float(total) == 0
    assert each.shape == (0,)


def test_tensors_start_at_256_bytes_and_do_not_overlap() -> None:
    """Views cover their shapes, in order, each from a multiple of the alignment on, rooms included."""
    rooms = [math.prod(shape) + 3 for shape in SHAPES]
    layout = FlatLayout.of(SHAPES, rooms)
    flat = torch.zeros(layout.numel)
    for index, view in enumerate(layout.views(flat)):
        view += index + 1
        assert view.shape == SHAPES[index]
        assert layout.starts[index] * flat.itemsize % 256 == 0
    assert [int((flat == index + 1).sum()) for index in range(len(SHAPES))] == list(map(math.prod, SHAPES))
    assert layout.numel == sum(map(aligned, rooms))
    assert layout.span(0, len(SHAPES)) == slice(0, layout.numel)
    assert layout.span(1, 3) == slice(layout.starts[1], layout.starts[3])


def test_a_buffer_holds_one_kind_up_to_its_limit() -> None:
    """Kinds are never mixed, order is kept, and what is larger than a buffer is alone."""
    sizes = [40, 40, 40, 300, 40, 40]
    kinds = ["decay", "none", "decay", "decay", "none", "decay"]
    assert share_buffers(sizes, kinds, limit_bytes=100) == [[0, 2], [1, 4], [3], [5]]
    assert share_buffers([], []) == []


def test_state_by_name_makes_a_round_trip() -> None:
    """What is copied out of the views and into another buffer's views goes on alike."""
    names = [f"tensor{index}" for index in range(len(SHAPES))]
    saved = [dict(zip(names, (v.clone() for v in views), strict=True)) for views in flat_run("cpu", 3)]
    layout = FlatLayout.of(SHAPES, [math.prod(shape) + 100 for shape in SHAPES])  # lies differently
    flat = [torch.zeros(layout.numel) for _ in saved]
    for buffer, state in zip(flat, saved, strict=True):
        for name, view in zip(names, layout.views(buffer), strict=True):
            view.copy_(state[name])
    for step in (4, 5):
        grads = flat_of(layout, tensors_of(step))
        update(flat[0], grads, *flat[1:], step=step, path="cpu")
    for buffer, wanted in zip(flat, flat_run("cpu", 5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layout.views(buffer), wanted, strict=True))


VALUES = {
    "normal": lambda n: torch.randn(n),
    "all equal": lambda n: torch.full((n,), 0.1),  # roundings that all go one way
    "of many sizes": lambda n: torch.randn(n) * 10 ** (torch.rand(n) * 12 - 6),
}
# 16 roundings within a block of squares and one of its square root, halved where a root is taken
NORM_TOLERANCE = 9 * UNIT


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_norms_are_exact_to_a_millionth_whatever_the_length(values: Any) -> None:
    """Clipping compares the norm with a threshold on every rank; fp32 sums of millions lose that."""
    torch.manual_seed(0)
    assert NORM_TOLERANCE < 1e-6
    tensors = [values(math.prod(shape)).view(shape) for shape in [*SHAPES, (2_000_001,)]]
    layout = FlatLayout.of([tensor.shape for tensor in tensors])
    exact = torch.stack([tensor.double().square().sum() for tensor in tensors])
    total, each = norms(flat_of(layout, tensors), layout)
    assert total.dtype == each.dtype == torch.float64
    for got in (total, square_sum(tensors)):
        assert float(got.sqrt() / exact.sum().sqrt() - 1) == pytest.approx(0, abs=NORM_TOLERANCE)
    assert float((each / exact.sqrt() - 1).abs().max()) <= NORM_TOLERANCE
    by_reference = norms(flat_of(layout, tensors), layout, path="reference")
    assert float((by_reference[1] / exact.sqrt() - 1).abs().max()) < 1e-12


def test_norms_of_the_same_numbers_are_the_same_bits() -> None:
    """Replicas compute the norm apart and must clip alike."""
    layout = FlatLayout.of(SHAPES)
    flat = flat_of(layout, tensors_of(3))
    results = [(*norms(flat.clone(), layout), square_sum(tensors_of(3))) for _ in range(3)]
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_square_sums_take_tensors_as_they_come(dtype: torch.dtype) -> None:
    """Small, large, empty, strided: any gradient counts once."""
    torch.manual_seed(1)
    shapes = [(0,), (5,), (300, 301), (40_000,), (4, 4)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes] + [torch.randn(30, 50).to(dtype).t()]
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(square_sum(tensors)) == pytest.approx(exact, rel=2 * NORM_TOLERANCE)
    assert float(square_sum([torch.zeros(0)])) == 0


def test_the_alignment_is_256_bytes_of_fp32() -> None:
    """Blocks of norms and starts of tensors are one number."""
    assert ALIGNMENT * torch.float32.itemsize == 256
