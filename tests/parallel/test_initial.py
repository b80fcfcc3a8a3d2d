"""Initial numbers: functions of seed, name and global index alone, whatever part a rank draws."""

import math

import numpy as np
import pytest
import torch
from harness import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rayfold.parallel import random as random_module
from rayfold.parallel.initial import Constant, Normal, fill
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.model import box_of
from rayfold.parallel.random import normal, normal_box


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and offsets and sizes of a box in it; empty boxes too."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    offsets = tuple(draw(st.integers(0, extent)) for extent in shape)
    sizes = tuple(
        draw(st.integers(0, extent - offset)) for extent, offset in zip(shape, offsets, strict=True)
    )
    return shape, offsets, sizes


@given(box=boxes(), seed=st.integers(0, 2**63), name=st.text(max_size=10).filter(lambda t: t.isprintable()))
@settings(deadline=None)
def test_a_box_is_the_slice_of_the_whole(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int, name: str
) -> None:
    """A rank that draws only its part draws, bit for bit, what a rank with the whole tensor holds there."""
    shape, offsets, sizes = box
    whole = normal_box(seed, name, shape=shape, offsets=(0,) * len(shape), sizes=shape)
    part = normal_box(seed, name, shape=shape, offsets=offsets, sizes=sizes)
    box_of = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert part.shape == sizes
    np.testing.assert_array_equal(part, whole[box_of])


@given(start=st.integers(0, 10_000), count=st.integers(0, 3000))
@settings(deadline=None)
def test_chunks_do_not_show(start: int, count: int) -> None:
    """Numbers are drawn in chunks to bound memory; where they end must not matter."""
    whole = normal(5, "x", 0, start + count)[start:]
    before, random_module.CHUNK = random_module.CHUNK, 777
    try:
        np.testing.assert_array_equal(normal(5, "x", start, count), whole)
    finally:
        random_module.CHUNK = before


def test_the_numbers_are_normal() -> None:
    """Mean, spread, skew, tails and neighbours of a million numbers, each within five standard errors."""
    x = normal(1, "moments", 0, 1_000_000).astype(np.float64)
    n = len(x)
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(n)
    beyond_two = 0.0455002638963584
    assert abs((abs(x) > 2).mean() - beyond_two) < 5 * math.sqrt(beyond_two * (1 - beyond_two) / n)
    assert np.isfinite(x).all()


def test_streams_are_independent() -> None:
    """Another name or another seed is another stream; shifted by any small count, too."""
    x = normal(1, "a", 0, 100_000).astype(np.float64)
    for other in (normal(2, "a", 0, 100_000), normal(1, "b", 0, 100_000), normal(1, "a", 100_000, 100_000)):
        assert abs((x * other).mean()) < 5 / math.sqrt(len(x))


GOLDEN = {
    (0, "embedding.weight", 0): [0.62805986, -0.55221117, -0.92285043, -0.85481644, 0.18623489],
    (17, "blocks.3.ffn.down.weight", 1_000_003): [-0.514887, 0.2716851, 0.18467079, 0.0033278484, -1.3657421],
}


@pytest.mark.parametrize("stream", GOLDEN)
def test_the_stream_never_changes(stream: tuple[int, str, int]) -> None:
    """A run started today must be startable again by every later version: these numbers are a contract."""
    seed, name, start = stream
    # cosines and logarithms of the platform may differ in the last bit of the fp32 result
    np.testing.assert_allclose(normal(seed, name, start, 5), GOLDEN[stream], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("layout", [(1, 2), (2, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_hold_the_numbers_of_the_whole(layout: tuple[int, int], dim: int) -> None:
    """Odd sizes over any mesh, a piece of the whole cut along either dim, also where a rank holds nothing."""
    shapes = [(7, 5), (3, 9), (1, 3, 2), (6, 4)]
    expected = []
    for shape in shapes:
        whole = torch.full(shape, torch.nan)
        fill(whole, Normal(0.5), seed=4, name=str(shape))
        expected.append(whole)

    def on_rank() -> list[bool]:
        mesh = make_mesh(Layout(dp_replicate=layout[0], dp_shard=layout[1]), torch.device("cpu")).sharding
        same = []
        for shape, whole in zip(shapes, expected, strict=True):
            # the whole, and all of it but the first index of the last dim, as a tensor parallel piece
            for origin in ((0,) * len(shape), (0,) * (len(shape) - 1) + (1,)):
                piece = whole[..., origin[-1] :]
                spread = distribute_tensor(
                    torch.full(piece.shape, torch.nan), mesh, [Replicate(), Shard(dim)], src_data_rank=None
                )
                where = {"shape": shape, "box": box_of(spread, origin)}
                fill(spread, Normal(0.5), seed=4, name=str(shape), **where)
                same.append(torch.equal(spread.full_tensor(), piece))
        return same

    assert run_ranks(layout[0] * layout[1], on_rank) == [[True] * 8] * (layout[0] * layout[1])


def test_a_constant_fills_everything() -> None:
    """Norms start at one."""
    tensor = torch.full((3, 2), torch.nan)
    fill(tensor, Constant(1.0), seed=0, name="x")
    assert tensor.tolist() == [[1.0, 1.0]] * 3
