"""The loss behind an output matrix, by chunks, against fp64 (`cross_entropy_truth.py` derives the bounds)."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cross_entropy_truth import IGNORED, Inputs, assert_true, make, run
from harness import run_ranks
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rayfold.kernels import cross_entropy_chunks as chunks
from rayfold.kernels import cross_entropy_cpu as cpu
from rayfold.kernels.config import Path
from rayfold.kernels.cross_entropy import VocabularyShard, linear_cross_entropy
from rayfold.kernels.cross_entropy_chunks import Budget, chunked_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (3, 11, 6)  # rows of the vocabulary that each rank holds
# Many chunks, of blocks that divide nothing. Alone, the first rank's logits would be one chunk for its bytes.
TINY = Budget(logits_bytes=64 * SIZES[0] * 4, least_rows=16, block_bytes=600)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Memory that nobody wrote is NaN; sums of weights lie in many pieces, chunks in many blocks."""
    monkeypatch.setattr(chunks, "PIECE_BYTES", 5000)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 20_000)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def summed(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
    path: Path = "cpu",
) -> torch.Tensor:
    return linear_cross_entropy(x, weight, labels, z_loss=z_loss, shard=shard, path=path)[0]


def in_tiny_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> torch.Tensor:
    return chunked_loss(x, weight, labels, IGNORED, z_loss, shard, cpu.STEPS, TINY)


WAYS = {"public": summed, "tiny chunks": in_tiny_chunks, "reference": partial(summed, path="reference")}


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("tokens", "dim", "vocabulary"), [(1, 7, 1), (7, 1, 63), (63, 33, 1000), (150, 16, 7)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_both_gradients_are_true_to_the_roundings(
    dtype: torch.dtype, tokens: int, dim: int, vocabulary: int, way: Any, z_loss: float
) -> None:
    """One chunk or many, sizes that divide nothing, a fifth of the labels ignored."""
    inputs = make(tokens, dim, vocabulary, dtype)
    results = run(inputs, partial(way, z_loss=z_loss))
    assert [t.dtype for t in results] == [torch.float32, dtype, dtype]
    assert_true(inputs, results, z_loss)


def test_gradients_are_those_of_finite_differences() -> None:
    """In fp64, which every step keeps."""
    inputs = make(20, 3, 5, torch.float64)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: in_tiny_chunks(x, w, inputs.labels, 0.1), (x, weight))


def test_the_sum_over_chunks_does_not_stand_still() -> None:
    """A thousand chunks add 8 each to 16-bit sums, which from 2048 on would round back to what they were."""
    x, weight = torch.ones(2**14, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    labels = torch.zeros(2**14, dtype=torch.int64)
    budget = Budget(logits_bytes=0, least_rows=16, block_bytes=4)
    chunked_loss(x, weight, labels, IGNORED, 0.0, None, cpu.STEPS, budget).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-(2**13), 2**13]


def test_the_same_input_gives_the_same_bits() -> None:
    """Chunks, blocks and pieces are added in one order."""
    inputs = make(63, 8, 65, torch.bfloat16)
    first, second = run(inputs, in_tiny_chunks), run(inputs, in_tiny_chunks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_the_count_is_of_labels_that_are_not_ignored(path: Path) -> None:
    """Leading dimensions are free, and so is the label that is ignored, even one of the vocabulary."""
    x, weight = torch.randn(2, 3, 4), torch.randn(6, 4)
    labels = torch.tensor([[5, 0, 0], [1, 0, 2]])
    loss, count = linear_cross_entropy(x, weight, labels, ignored=0, path=path)
    each = F.cross_entropy(F.linear(x, weight).flatten(0, 1), labels.flatten(), reduction="none")
    assert count.dtype == torch.int64
    assert int(count) == 3
    assert float(loss) == pytest.approx(float(each[[0, 3, 5]].sum()), rel=1e-6)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_label_everything_is_zero(path: Path, tokens: int) -> None:
    """A rank whose tokens are all padding, or that has none, takes part like any other."""
    x, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss, count = linear_cross_entropy(x, weight, torch.full((tokens,), IGNORED), z_loss=0.1, path=path)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("label", [6, -1, -2])
def test_a_label_outside_the_vocabulary_is_refused(path: Path, label: int) -> None:
    """Of another tokenizer, most likely: it names itself, and nothing wraps around."""
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(6, 4), torch.tensor([1, label]), path=path)


def test_labels_of_another_shape_are_refused() -> None:
    """Both shapes are named."""
    with pytest.raises(ValueError, match=r"labels \[3, 2\] .* x \[2, 3, 4\]"):
        linear_cross_entropy(torch.randn(2, 3, 4), torch.randn(6, 4), torch.zeros(3, 2, dtype=torch.int64))


def test_any_strides_are_taken() -> None:
    """Slices and transposes of x, weight and labels."""
    inputs = make(21, 5, 9, torch.float32)
    expected = run(inputs, summed)
    strided = Inputs(
        torch.stack((inputs.x, inputs.x), 1)[:, 1],
        inputs.weight.t().contiguous().t(),
        torch.stack((inputs.labels, inputs.labels), 1)[:, 1],
    )
    assert not strided.x.is_contiguous()
    x, weight = (t.detach().requires_grad_() for t in (strided.x, strided.weight))
    loss = summed(x, weight, strided.labels)
    loss.backward(torch.tensor(strided.grad))
    torch.testing.assert_close([loss.detach(), x.grad, weight.grad], expected)


def test_a_kept_graph_gives_its_gradients_again() -> None:
    """Scaling in place would scale twice."""
    inputs = make(21, 5, 9, torch.float32)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    loss = summed(x, weight, inputs.labels)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss + loss, (x, weight))
    torch.testing.assert_close([2 * g for g in kept], list(second))
    torch.testing.assert_close(list(first), kept)


def test_the_gradients_cannot_be_differentiated() -> None:
    """They are constants of the forward pass: a silent zero would be wrong, and the reference can."""
    inputs = make(5, 5, 9, torch.float32)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(summed(x, weight, inputs.labels), x, create_graph=True)
    loss = summed(x, weight, inputs.labels, path="reference")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    grad.sum().backward()


def test_a_tied_embedding_gets_both_gradients() -> None:
    """The same matrix looks tokens up and makes the logits."""
    table = torch.randn(9, 5, requires_grad=True)
    tokens, labels = torch.randint(9, (2, 12))
    grads = []
    for path in ("cpu", "reference"):
        loss = summed(F.embedding(tokens, table).tanh(), table, labels, path=path)
        grads.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("asks", ["x", "weight", "nothing", "under no_grad"])
def test_only_what_is_asked_for_is_computed(asks: str) -> None:
    """A frozen matrix has no gradient to hold, and an evaluation multiplies once."""
    inputs = make(21, 5, 9, torch.bfloat16)
    expected = run(inputs, summed)
    x = inputs.x.requires_grad_(asks in ("x", "under no_grad"))
    weight = inputs.weight.requires_grad_(asks in ("weight", "under no_grad"))
    with Watch() as watch, torch.set_grad_enabled(asks != "under no_grad"):
        loss = summed(x, weight, inputs.labels)
    torch.testing.assert_close(loss.detach(), expected[0])
    assert loss.requires_grad == (asks in ("x", "weight"))
    assert watch.calls.count("aten.mm.default") == (2 if loss.requires_grad else 1)
    if loss.requires_grad:
        loss.backward(torch.tensor(inputs.grad))
    assert (x.grad is not None, weight.grad is not None) == (asks == "x", asks == "weight")
    for tensor, grad in ((x, expected[1]), (weight, expected[2])):
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, grad)


class Watch(TorchDispatchMode):
    """Which operations ran, and the most numbers that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logits_are_never_whole_and_going_backward_takes_no_memory(dtype: torch.dtype) -> None:
    """200 tokens in chunks of 16; the two gradients are scaled where they lie."""
    inputs = make(200, 8, 333, dtype)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    with Watch() as forward:
        loss = in_tiny_chunks(x, weight, inputs.labels)
    assert forward.most == 16 * 333
    with Watch() as backward:
        torch.autograd.grad(loss, (x, weight))
    assert backward.calls.count("aten.mul_.Tensor") == 2
    assert "aten.mul.Tensor" not in backward.calls


def test_shapes_alone_are_enough() -> None:
    """A planner asks with fake tensors or on the meta device: no value is looked at."""
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.no_grad(), "meta")):
        with mode, torch.enable_grad():
            x = torch.empty(40, 8, device=device, requires_grad=True)
            weight = torch.empty(50, 8, device=device, requires_grad=True)
            labels = torch.empty(40, dtype=torch.int64, device=device)
            loss, count = linear_cross_entropy(x, weight, labels)
            loss.backward()
            assert (loss.shape, count.shape) == ((), ())
            assert x.grad is not None
            assert weight.grad is not None
            assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


def test_it_runs_within_a_checkpoint() -> None:
    """The gradients of the forward pass that ran again are the ones used."""
    inputs = make(21, 5, 9, torch.float32)

    def loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda: summed(x.tanh(), weight, labels), use_reentrant=False)

    expected = run(inputs, lambda x, weight, labels: summed(x.tanh(), weight, labels))
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, loss), expected, strict=True))


def test_a_compiler_takes_it_whole() -> None:
    """No break of the graph, and the same numbers to the order of sums."""
    inputs = make(21, 5, 9, torch.float32)
    compiled = torch.compile(summed, backend="eager", fullgraph=True)
    assert_true(inputs, run(inputs, compiled), 0.0)


def shard_of(rank: int) -> VocabularyShard:
    return VocabularyShard(
        start=sum(SIZES[:rank]),
        sum_over=dist.all_reduce,
        max_over=partial(dist.all_reduce, op=dist.ReduceOp.MAX),
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_vocabulary_split_over_ranks_is_the_whole_one(dtype: torch.dtype, way: Any, z_loss: float) -> None:
    """Unequal shares: every rank has the whole loss and its rows' gradient; those of x add up."""
    inputs = make(37, 5, sum(SIZES), dtype)

    def on_rank() -> list[Any]:
        shard = shard_of(dist.get_rank())
        rows = inputs.weight[shard.start : shard.start + SIZES[dist.get_rank()]]
        loss = partial(way, z_loss=z_loss, shard=shard)
        return [t.double().tolist() for t in run(Inputs(inputs.x, rows, inputs.labels), loss)]

    losses, grads_x, grads_weight = zip(*run_ranks(len(SIZES), on_rank), strict=True)
    assert len(set(losses)) == 1
    grad_x = torch.tensor(grads_x, dtype=torch.float64)
    off = 3 * torch.finfo(dtype).eps * grad_x.abs().sum(0)  # each rank rounds its own part
    grad_weight = torch.cat([torch.tensor(g, dtype=torch.float64) for g in grads_weight])
    assert_true(inputs, [torch.tensor(losses[0]), grad_x.sum(0), grad_weight], z_loss, extra=off)


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_a_label_that_no_rank_holds_makes_the_loss_nan(path: Path) -> None:
    """No rank can tell alone, and none may wait for the others to raise; an ignored label is no such."""

    def on_rank() -> list[float]:
        shard = shard_of(dist.get_rank())
        x, rows = torch.ones(2, 4), torch.ones(SIZES[dist.get_rank()], 4)
        return [
            float(linear_cross_entropy(x, rows, torch.tensor([1, label]), shard=shard, path=path)[0])
            for label in (sum(SIZES), sum(SIZES) - 1, IGNORED)
        ]

    one = float(torch.tensor(float(sum(SIZES))).log())
    for outside, inside, ignored in run_ranks(len(SIZES), on_rank):
        assert outside != outside
        assert (inside, ignored) == (pytest.approx(2 * one), pytest.approx(one))
