"""The device's passes over logits in Triton's interpreter, against fp64 (`cross_entropy_truth.py`)."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cross_entropy_truth import IGNORED, Inputs, assert_true, make, run
from harness import run_ranks

from rayfold.kernels import cross_entropy_cpu as cpu
from rayfold.kernels.cross_entropy_chunks import Budget, VocabularyShard, chunked_loss
from rayfold.kernels.cross_entropy_cpu import ELSEWHERE, RowSteps
from rayfold.kernels.gpu import cross_entropy as gpu
from rayfold.kernels.gpu.tiles import Tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = Tile(rows=1, columns=16, num_warps=1, num_stages=1)
STEPS = RowSteps(
    partial(gpu.statistics, tile=TILE),
    partial(gpu.gradient, tile=TILE),
    partial(gpu.loss_and_gradient, tile=TILE),
)
TINY = Budget(logits_bytes=0, least_rows=4, block_bytes=300)


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    shard: VocabularyShard | None = None,
) -> torch.Tensor:
    return chunked_loss(x, weight, labels, IGNORED, z_loss, shard, STEPS, TINY)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("tokens", "dim", "vocabulary"), [(1, 7, 1), (6, 5, 16), (7, 9, 63)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_both_gradients_are_true_to_the_roundings(
    dtype: torch.dtype, tokens: int, dim: int, vocabulary: int, z_loss: float
) -> None:
    """Rows of one column, of one block, and of blocks that do not divide them."""
    inputs = make(tokens, dim, vocabulary, dtype)
    assert_true(inputs, run(inputs, partial(loss, z_loss=z_loss)), z_loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_split_over_ranks_is_the_whole_one(dtype: torch.dtype) -> None:
    """The two sweeps as two kernels, with all ranks' sums between them."""
    sizes = (17, 5)
    inputs = make(6, 5, sum(sizes), dtype)

    def on_rank() -> list[Any]:
        rank = dist.get_rank()
        highest = partial(dist.all_reduce, op=dist.ReduceOp.MAX)
        shard = VocabularyShard(start=sum(sizes[:rank]), sum_over=dist.all_reduce, max_over=highest)
        rows = inputs.weight[shard.start : shard.start + sizes[rank]]
        own = Inputs(inputs.x, rows, inputs.labels)
        return [t.double().tolist() for t in run(own, partial(loss, z_loss=0.01, shard=shard))]

    losses, grads_x, grads_weight = zip(*run_ranks(len(sizes), on_rank), strict=True)
    assert len(set(losses)) == 1
    grad_x = torch.tensor(grads_x, dtype=torch.float64)
    off = 3 * torch.finfo(dtype).eps * grad_x.abs().sum(0)  # each rank rounds its own part
    grad_weight = torch.cat([torch.tensor(g, dtype=torch.float64) for g in grads_weight])
    assert_true(inputs, [torch.tensor(losses[0]), grad_x.sum(0), grad_weight], 0.01, extra=off)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_rows_is_touched(dtype: torch.dtype) -> None:
    """Rows lie apart in memory that is NaN between them, and are blocks of 16 plus 4."""
    wide = torch.full((5, 33), torch.nan, dtype=dtype)
    wide[:, :20] = torch.randn(5, 20)
    places = torch.tensor([0, 19, ELSEWHERE, cpu.IGNORED, 7])
    losses = STEPS.loss_and_gradient(wide[:, :20], places, 0.0)
    assert wide[:, 20:].isnan().all()
    assert wide[:, :20].isfinite().all()
    assert losses.isfinite().all()
    assert not wide[3, :20].any()
    assert float(losses[3]) == 0.0


def test_the_passes_agree_with_those_of_the_cpu() -> None:
    """The same three functions on the same logits, to the roundings of 37 terms: any path can stand in."""
    logits = 3 * torch.randn(6, 37)
    places = torch.tensor([0, 36, ELSEWHERE, cpu.IGNORED, 16, 15])
    limit = 45 * torch.finfo(torch.float32).eps
    assert_close = partial(torch.testing.assert_close, rtol=limit, atol=limit)
    both = [(steps, logits.clone()) for steps in (STEPS, cpu.STEPS)]
    assert_close(*(steps.statistics(z, places) for steps, z in both))
    for steps, z in both:
        steps.gradient(z, places, logits.logsumexp(-1), 0.1)
    assert_close(both[0][1], both[1][1])
    for _, z in both:
        z.copy_(logits)
    assert_close(*(steps.loss_and_gradient(z, places, 0.1) for steps, z in both))
    assert_close(both[0][1], both[1][1])


def test_logits_that_are_far_apart_do_not_overflow() -> None:
    """The maximum is found in the last block, and may be any number that a float holds."""
    logits = torch.zeros(1, 40)
    logits[0, 39] = 3e30
    logits[0, 3] = -torch.inf  # a column that a mask closed
    losses = STEPS.loss_and_gradient(logits, torch.tensor([39]), 0.0)
    assert float(losses[0]) == 0.0
    assert not logits.any()


def test_the_same_input_gives_the_same_bits() -> None:
    """A row belongs to one program, and nothing is added atomically."""
    inputs = make(6, 5, 33, torch.bfloat16)
    first, second = run(inputs, partial(loss, z_loss=0.0)), run(inputs, partial(loss, z_loss=0.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_without_tokens_launches_nothing() -> None:
    """A grid of no programs is an error to the driver."""
    inputs = Inputs(torch.randn(0, 4), torch.randn(6, 4), torch.empty(0, dtype=torch.int64))
    summed, grad_x, grad_weight = run(inputs, partial(loss, z_loss=0.0))
    assert float(summed) == 0.0
    assert grad_x.shape == (0, 4)
    assert not grad_weight.any()
    assert len(STEPS.statistics(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))) == 3
