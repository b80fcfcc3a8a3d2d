"""`assert_parity`: a layout trains as one plain process does, in every figure, gradient and parameter.

The reference uses no process group, no sharding, no accumulation, plain operators, and torch's own AdamW and
clipping. A layout runs the runtime's own steps on forked ranks; what the ranks hold is put together by the
boxes they say they hold, and copies must be equal bit for bit.

Errors are measured a tensor at a time, |got - expected| / |expected| in the 2-norm: the sums of a layout are
the reference's in another order, so an element near zero may differ by more than its size while the tensor
does not.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks

from rayfold.kernels.config import KernelsConfig
from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.collectives import gather_json, share_json
from rayfold.parallel.initial import fill
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.model import Sharded
from rayfold.parallel.parallelize import Workings, parallelize
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.data.packing import IGNORED
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.step import StepResult, train_step

Arrays = dict[str, np.ndarray]
Box = tuple[tuple[int, ...], tuple[int, ...], np.ndarray]  # offsets and shape of the whole, and the numbers

# fp32 keeps 24 bits (6e-8); sums of some hundred terms in another order, through the blocks and back, stay
# below 1e-6, and 1e-5 is what the project promises.
FP32_TOLERANCE = 1e-5
# bf16 keeps 8 bits. With micro-batches of the same rows every rank computes the same bf16 numbers, and they
# are added up in fp32: the first gradients agree as fp32 does. Parameters that then differ in their last fp32
# bit round to different bf16 neighbours now and then; each such weight is off by up to 2^-8. Updates must
# stay small beside a weight (0.02), or each rounding feeds the next.
BF16_TOLERANCE = 2.0**-8
BF16_LR = 1e-3
# AdamW's first updates are lr * g / (|g| + eps). With the usual eps = 1e-8 that is lr * sign(g), and an
# element that is nothing but rounding moves by lr in either direction: measured against fp64, a plain fp32
# loop is then off by 1.6e-5 in the fourth step. An eps of the size of the gradients (0.01) makes an update as
# exact as its gradient, 2e-6 after four steps, so the tolerance speaks of the layout.
EPS = 1e-2
VOCAB = 97
# Odd hidden features and vocabulary, so that pieces are uneven; heads for four tensor parallel ranks and
# layers for four stages.
SHAPE = LlamaShape(dim=48, layers=4, heads=8, kv_heads=4, ffn_dim=63, vocab_size=VOCAB, tied_embeddings=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, whatever the layout."""

    shape: LlamaShape = SHAPE
    compute: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    compiled: bool = False
    kernels: str = "auto"
    micro_size: int = 0  # 0: two micro-batches a step, in a pipeline as many as there are rows
    steps: int = 5
    rows: int = 8
    seq_len: int = 32
    seed: int = 7
    lr: float = 1e-2
    clip_norm: float = 0.5
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=EPS)
    )


@dataclass
class Trace:
    """What a run was: figures and clipped gradients of every step, parameters at the end."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    parameters: Arrays = field(default_factory=dict)


def global_batch(case: Case, step: int) -> Batch:
    """Packed rows with uneven valid labels: in even steps the second half of the rows has none."""
    rows, length = case.rows, case.seq_len
    rng = np.random.default_rng([case.seed, step])
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (rows, length)))
    cut = torch.from_numpy(rng.integers(1, length, (rows, 1)))
    places = torch.arange(length).expand(rows, length)
    ids = (places >= cut).int()
    labels = (3 * tokens + 1) % VOCAB
    labels[0, 3:] = IGNORED
    labels[1, ::2] = IGNORED
    if step % 2 == 0:
        labels[rows // 2 :] = IGNORED
    else:
        labels[rows - 2 :, 1:] = IGNORED
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.where(ids == 1, places - cut, places),
        document_ids=ids,
        sample_ids=tuple(range(step * rows, (step + 1) * rows)),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    names = ("tokens", "labels", "positions", "document_ids", "sample_ids")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


@cache
def plain_run(case: Case) -> Trace:
    """The reference: one process, the whole batch at once, nothing of the runtime but the model."""
    model = Llama(case.shape, KernelsConfig(default="reference"))
    for name, parameter in model.named_parameters():
        fill(parameter, model.initial(name), seed=case.seed, name=name)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": case.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=case.lr, betas=case.optim.betas, eps=case.optim.eps, fused=False)
    trace = Trace()
    for number in range(case.steps):
        batch = global_batch(case, number)
        logits = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
        loss_sum = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORED
        )
        count = int((batch.labels != IGNORED).sum())
        adamw.zero_grad()
        (loss_sum / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        trace.losses.append(loss_sum.item() / count)
        trace.tokens.append(count)
        trace.norms.append(norm.item())
        trace.gradients.append(
            {n: p.grad.clone().numpy() for n, p in model.named_parameters() if p.grad is not None}
        )
        adamw.step()
    trace.parameters = {n: p.detach().clone().numpy() for n, p in model.named_parameters()}
    return trace


class WatchedAdamW(ShardedAdamW):
    """The optimizer of the runtime that also remembers the gradients it is given."""

    def __init__(self, model: Sharded, config: OptimConfig) -> None:
        super().__init__(model, config)
        self._model = model
        self.seen: list[list[tuple[str, Box]]] = []

    def step(self, lr: float) -> None:
        self.seen.append(boxes(self._model, gradients=True))
        super().step(lr)


def boxes(model: Sharded, *, gradients: bool = False) -> list[tuple[str, Box]]:
    """What this rank holds of every parameter, or of its gradient."""
    found = []
    for held in model.held:
        tensor: Any = held.parameter.grad if gradients else held.parameter
        if tensor is not None:
            local = getattr(tensor, "_local_tensor", tensor).detach().clone().numpy()
            found.append((held.name, (held.box()[0], held.shape, local)))
    return found


def whole(of_ranks: list[list[tuple[str, Box]]]) -> Arrays:
    """Tensors put together from all ranks; they must be complete, and copies equal."""
    found: Arrays = {}
    for name, (offsets, shape, numbers) in (item for rank in of_ranks for item in rank):
        tensor = found.setdefault(name, np.full(shape, np.nan, numbers.dtype))
        where = tuple(slice(o, o + n) for o, n in zip(offsets, numbers.shape, strict=True))
        there = ~np.isnan(tensor[where])
        assert np.array_equal(tensor[where][there], numbers[there]), f"copies of {name} differ"
        tensor[where] = numbers
    for name, tensor in found.items():
        assert not np.isnan(tensor).any(), f"nobody holds all of {name}, or it is no number"
    return found


def run_layout(case: Case, layout: Layout) -> Trace:
    """The runtime's own steps on forked ranks; all ranks must agree on the figures."""

    def on_rank() -> tuple[list[StepResult], list[list[tuple[str, Box]]], list[tuple[str, Box]]]:
        mesh = make_mesh(layout, torch.device("cpu"))
        kernels = KernelsConfig(default=case.kernels)  # type: ignore[arg-type]
        workings = Workings(compute=case.compute, recompute=case.recompute, compiled=case.compiled)
        model = parallelize(lambda: Llama(case.shape, kernels), mesh, seed=case.seed, workings=workings)
        optimizer = WatchedAdamW(model, case.optim)
        part = case.rows // layout.dp_size
        micro_size = case.micro_size or (1 if layout.pp > 1 else max(1, part // 2))
        first = mesh.data.rank * part
        results = []
        for number in range(case.steps):
            batch = global_batch(case, number)
            starts = range(first, first + part, micro_size)
            micro = [rows_of(batch, slice(start, start + micro_size)) for start in starts]
            results.append(train_step(model, optimizer, micro, lr=case.lr, clip_norm=case.clip_norm))
        return results, optimizer.seen, boxes(model)

    by_rank = run_ranks(layout.world_size, on_rank, timeout_s=120.0)
    results = by_rank[0][0]
    for others, _, _ in by_rank[1:]:
        assert [(r.loss, r.tokens, r.grad_norm) for r in others] == [
            (r.loss, r.tokens, r.grad_norm) for r in results
        ], "ranks disagree on the figures of a step"
    return Trace(
        losses=[r.loss for r in results],
        tokens=[r.tokens for r in results],
        norms=[r.grad_norm for r in results],
        gradients=[whole([seen[number] for _, seen, _ in by_rank]) for number in range(case.steps)],
        parameters=whole([parameters for _, _, parameters in by_rank]),
    )


def error_of(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative error of a tensor in the 2-norm."""
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got - wide) / max(float(np.linalg.norm(wide)), 1e-30))


def assert_same(
    got: Trace, expected: Trace, *, tolerance: float, first_step_tolerance: float | None = None
) -> None:
    """Every figure, gradient and parameter agrees; names the first that does not."""
    assert got.tokens == expected.tokens
    for number in range(len(expected.losses)):
        allowed = tolerance if number or first_step_tolerance is None else first_step_tolerance
        for what in ("losses", "norms"):
            value, wanted = getattr(got, what)[number], getattr(expected, what)[number]
            assert value == pytest.approx(wanted, rel=allowed), f"{what} of step {number + 1}"
        assert got.gradients[number].keys() == expected.gradients[number].keys()
        for name, gradient in expected.gradients[number].items():
            error = error_of(got.gradients[number][name], gradient)
            assert error <= allowed, f"gradient of {name} in step {number + 1} is off by {error:.1e}"
    assert got.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        error = error_of(got.parameters[name], parameter)
        assert error <= tolerance, f"parameter {name} is off by {error:.1e}"


def assert_parity(case: Case, layout: Layout, *, tolerance: float = FP32_TOLERANCE) -> None:
    """`layout` trains `case` as one plain process does."""
    assert_same(run_layout(case, layout), plain_run(case), tolerance=tolerance)


def assert_told() -> None:
    """Plain values that ranks tell each other arrive: who has which state, which samples a corpus has."""

    def on_rank() -> list[Any]:
        cpu = torch.device("cpu")
        world = make_mesh(Layout(dp_replicate=1, dp_shard=2), cpu).world
        told = {"rank": world.rank, "text": "x" * world.rank}
        return [gather_json(told, world, cpu), *(share_json(told, world, cpu, source) for source in range(2))]

    every = [{"rank": rank, "text": "x" * rank} for rank in range(2)]
    assert run_ranks(2, on_rank) == [[every, *every]] * 2


def mutation_cases() -> list[tuple[Case, Layout]]:
    """Layouts that between them use everything that communicates, small ones first."""
    case = Case(steps=2)

    def layout(**sizes: Any) -> Layout:
        return Layout(**{"dp_replicate": 1, "dp_shard": 1, **sizes})

    return [
        (case, layout(dp_replicate=2)),
        (case, layout(tp=2, dp_shard=2)),
        (case, layout(cp=2)),
        (case, layout(cp=2, context="ulysses", tp=2)),
        (case, layout(pp=2)),
        (case, layout(pp=2, schedule="zbv")),
        (replace(case, recompute="selective"), layout(cp=2, tp=2)),
    ]
