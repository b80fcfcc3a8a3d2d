"""The Triton kernels of AdamW and norms in Triton's interpreter, against the plain formula."""

from typing import Any

import pytest
import torch

from rayfold.kernels.adamw import FlatLayout, adamw_reference_
from rayfold.kernels.gpu.adamw import adamw_, segment_squares
from rayfold.kernels.gpu.tiles import Tile

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
UNIT = 2.0**-24
TILE = Tile(1, 64, num_warps=1, num_stages=1)
SEGMENT = Tile(1, 4, num_warps=1, num_stages=1)
SQUARES = Tile(4, 64, num_warps=1, num_stages=1)


def buffers(numel: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params, grads, first, second = torch.randn(4, numel, generator=generator)
    return [params.clone(), grads.clone(), first.clone(), second.square()]


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 200])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_is_the_formula(numel: int, scaled: bool) -> None:
    """Whatever remains of the last tile, with and without gradients divided on the way."""
    scale = torch.tensor(1.7) if scaled else None
    got, wanted = buffers(numel), buffers(numel)
    adamw_(*got, step=7, grad_scale=scale, tile=TILE, **OPTIONS)
    adamw_reference_(*wanted, step=7, grad_scale=scale, **OPTIONS)
    for a, b in zip(got, wanted, strict=True):
        # at most 8 roundings of terms that are below 32 here: moments, and lr times their ratio
        torch.testing.assert_close(a, b, rtol=8 * UNIT, atol=8 * UNIT * 32)


def test_an_update_touches_nothing_behind_its_buffer() -> None:
    """The last tile is masked: memory that follows belongs to others."""
    whole = [torch.full((160,), float("nan")) for _ in range(4)]
    for target, source in zip(whole, buffers(100), strict=True):
        target[:100] = source
    adamw_(*(x[:100] for x in whole), step=1, tile=TILE, **OPTIONS)
    for x in whole:
        assert not x[:100].isnan().any()
        assert x[100:].isnan().all()


def test_sums_of_squares_are_by_tensor_and_repeat_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one block, of several loads, and of none; outputs start as NaN, so each one is written."""
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, float("nan"), **how))
    torch.manual_seed(0)
    shapes = [(3,), (0,), (700,), (8, 8), (129,)]
    layout = FlatLayout.of(shapes)
    flat = torch.zeros(layout.numel)
    for view in layout.views(flat):
        view.normal_()
    got = segment_squares(flat, layout.blocks, SQUARES, SEGMENT)
    exact = torch.stack([view.double().square().sum() for view in layout.views(flat)])
    torch.testing.assert_close(got, exact, rtol=64 * UNIT, atol=0)  # any order within a block of 64
    assert torch.equal(got, segment_squares(flat, layout.blocks, SQUARES, SEGMENT))


def test_there_may_be_no_tensor_at_all() -> None:
    """Nothing is launched for nothing."""
    empty = FlatLayout.of([])
    assert segment_squares(torch.zeros(0), empty.blocks, SQUARES, SEGMENT).shape == (0,)
