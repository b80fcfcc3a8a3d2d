"""The same numbers under every layout: losses, norms, gradients and parameters against a plain PyTorch loop.

The reference below uses no process group, no sharding, no accumulation and torch's own AdamW and clipping.
Errors are measured a tensor at a time, |got - expected| / |expected| in the 2-norm: the sums of a layout are
the reference's in another order, so an element near zero may differ by more than its size while the tensor
does not.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import run_ranks
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor

from rayfold.kernels.config import KernelsConfig
from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.initial import fill
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import parallelize
from rayfold.runtime import step as step_module
from rayfold.runtime.data.loader import Batch
from rayfold.runtime.data.packing import IGNORED
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.step import StepResult, train_step

Recompute = Literal["none", "selective", "full"]
Arrays = dict[str, np.ndarray]

# fp32 keeps 24 bits (6e-8); sums of some hundred terms in another order, through two blocks and back, stay
# below 1e-6, and 1e-5 is what the project promises.
FP32_TOLERANCE = 1e-5
# bf16 keeps 8 bits. With micro-batches of the same rows every rank computes the same bf16 numbers, and they
# are added up in fp32: the first gradients agree as fp32 does. Parameters that then differ in their last fp32
# bit round to different bf16 neighbours now and then; each such weight is off by up to 2^-8.
BF16_TOLERANCE = 2.0**-8
# AdamW's first updates are lr * g / (|g| + eps). With the usual eps = 1e-8 that is lr * sign(g), and an
# element that is nothing but rounding moves by lr in either direction: measured against fp64, a plain fp32
# loop is then off by 1.6e-5 in the fourth step. An eps of the size of the gradients (0.01) makes an update as
# exact as its gradient, 2e-6 after four steps, so the tolerance speaks of the layout. In bf16 updates also
# stay small beside a weight (0.02), or each rounding feeds the next.
EPS = 1e-2
BF16_LR = 1e-3

SEED, STEPS, ROWS, SEQ_LEN, VOCAB = 7, 4, 8, 19, 97
OPTIM = OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=EPS)
CLIP_NORM = 0.5
LAYOUTS = [Layout(dp_replicate=r, dp_shard=s) for r, s in ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2))]
# odd sizes, so that every shard of 2 and of 4 ranks is uneven
SHAPE = LlamaShape(dim=40, layers=2, heads=4, kv_heads=2, ffn_dim=63, vocab_size=VOCAB, tied_embeddings=True)
# 3 rows over 4 ranks: one rank holds no part of these matrices
THIN = LlamaShape(dim=40, layers=1, heads=4, kv_heads=2, ffn_dim=3, vocab_size=VOCAB, tied_embeddings=False)


@dataclass
class Trace:
    """What a run was: figures and clipped gradients of every step, parameters at the end."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    parameters: Arrays = field(default_factory=dict)


def global_batch(step: int) -> Batch:
    """Packed rows with uneven valid labels: in even steps the second half of the rows has none."""
    rng = np.random.default_rng([SEED, step])
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (ROWS, SEQ_LEN)))
    cut = torch.from_numpy(rng.integers(1, SEQ_LEN, (ROWS, 1)))
    places = torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN)
    ids = (places >= cut).int()
    labels = (3 * tokens + 1) % VOCAB
    labels[0, 3:] = IGNORED
    labels[1, ::2] = IGNORED
    if step % 2 == 0:
        labels[ROWS // 2 :] = IGNORED
    else:
        labels[ROWS - 2 :, 1:] = IGNORED
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.where(ids == 1, places - cut, places),
        document_ids=ids,
        sample_ids=tuple(range(step * ROWS, (step + 1) * ROWS)),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        positions=batch.positions[rows],
        document_ids=batch.document_ids[rows],
        sample_ids=batch.sample_ids[rows],
    )


def plain_run(shape: LlamaShape) -> Trace:
    """The reference: one process, the whole batch at once, nothing of the runtime but the model."""
    model = Llama(shape, KernelsConfig(default="reference"))
    for name, parameter in model.named_parameters():
        fill(parameter, model.initial(name), seed=SEED, name=name)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": OPTIM.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=False)
    trace = Trace()
    for number in range(STEPS):
        batch = global_batch(number)
        logits = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
        loss_sum = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORED
        )
        count = int((batch.labels != IGNORED).sum())
        adamw.zero_grad()
        (loss_sum / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
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
    """The optimizer of the runtime that also remembers the whole gradients it is given."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        super().__init__(model, config)
        self._model = model
        self.seen: list[Arrays] = []

    def step(self, lr: float) -> None:
        self.seen.append({n: whole(p.grad) for n, p in self._model.named_parameters() if p.grad is not None})
        super().step(lr)


def whole(tensor: torch.Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().numpy()


def run_layout(
    layout: Layout,
    shape: LlamaShape,
    *,
    recompute: Recompute = "none",
    compute: Literal["fp32", "bf16"] = "fp32",
    micro_size: int = 1,
) -> Trace:
    """The runtime's own steps on forked ranks; all ranks must agree on the figures."""

    lr = OPTIM.lr if compute == "fp32" else BF16_LR

    def on_rank() -> tuple[list[StepResult], list[Arrays], Arrays]:
        mesh = make_mesh(layout, torch.device("cpu"))
        model = parallelize(lambda: Llama(shape), mesh, seed=SEED, compute=compute, recompute=recompute)
        optimizer = WatchedAdamW(model, OPTIM)
        part = ROWS // layout.dp_size
        first = mesh.data_rank * part
        results = []
        for number in range(STEPS):
            starts = range(first, first + part, micro_size)
            micro = [rows_of(global_batch(number), slice(start, start + micro_size)) for start in starts]
            results.append(train_step(model, optimizer, micro, mesh, lr=lr, clip_norm=CLIP_NORM))
        parameters = {name: whole(p) for name, p in model.named_parameters()}
        if dist.get_rank():
            return results, [], {}
        return results, optimizer.seen, parameters

    by_rank = run_ranks(layout.world_size, on_rank)
    results, gradients, parameters = by_rank[0]
    for others, _, _ in by_rank[1:]:
        assert [(r.loss, r.tokens, r.grad_norm) for r in others] == [
            (r.loss, r.tokens, r.grad_norm) for r in results
        ], "ranks disagree on the figures of a step"
    return Trace(
        losses=[r.loss for r in results],
        tokens=[r.tokens for r in results],
        norms=[r.grad_norm for r in results],
        gradients=gradients,
        parameters=parameters,
    )


def error_of(got: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got - wide) / max(float(np.linalg.norm(wide)), 1e-30))


def assert_same(
    got: Trace, expected: Trace, *, tolerance: float, first_step_tolerance: float | None = None
) -> None:
    """Every figure, gradient and parameter agrees; names the first that does not."""
    assert got.tokens == expected.tokens
    for number in range(STEPS):
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


@pytest.fixture(scope="module")
def plain() -> Trace:
    return plain_run(SHAPE)


@pytest.fixture(scope="module")
def bf16_alone() -> Trace:
    return run_layout(LAYOUTS[0], SHAPE, compute="bf16")


def test_the_reference_clips_and_learns(plain: Trace) -> None:
    """Parity about clipping says something only where clipping is active, and the losses where they move."""
    assert min(plain.norms) > CLIP_NORM
    assert plain.losses[2] < plain.losses[0]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_plain_process(layout: Layout, recompute: Recompute, plain: Trace) -> None:
    """Uneven valid tokens, ranks without any, accumulation, clipping: nothing shows where samples lie."""
    assert_same(run_layout(layout, SHAPE, recompute=recompute), plain, tolerance=FP32_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_accumulation_does_not_show(layout: Layout, plain: Trace) -> None:
    """A rank that takes its whole part at once computes what one that takes row after row does."""
    whole_part = ROWS // layout.dp_size
    assert_same(run_layout(layout, SHAPE, micro_size=whole_part), plain, tolerance=FP32_TOLERANCE)


@pytest.mark.parametrize(
    "layout", [Layout(dp_replicate=1, dp_shard=4), Layout(dp_replicate=1, dp_shard=2)], ids=str
)
def test_a_rank_may_hold_no_part_of_a_tensor(layout: Layout) -> None:
    """Three rows over four ranks leave one without; norms and updates still count each row once."""
    assert_same(run_layout(layout, THIN), plain_run(THIN), tolerance=FP32_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [*((layout, "none") for layout in LAYOUTS[1:]), (LAYOUTS[5], "selective"), (LAYOUTS[5], "full")],
    ids=str,
)
def test_bf16_layouts_train_as_one_bf16_rank(layout: Layout, recompute: Recompute, bf16_alone: Trace) -> None:
    """Gradients are summed in fp32, so a layout adds no rounding of its own to those of bf16."""
    got = run_layout(layout, SHAPE, compute="bf16", recompute=recompute)
    assert_same(got, bf16_alone, tolerance=BF16_TOLERANCE, first_step_tolerance=FP32_TOLERANCE)


def test_bf16_is_near_fp32_and_not_it(bf16_alone: Trace, plain: Trace) -> None:
    """The bf16 path must really compute in bf16, and lose no more than its 8 bits over two blocks."""
    error = max(error_of(bf16_alone.gradients[0][name], g) for name, g in plain.gradients[0].items())
    assert 2.0**-12 < error < 8 * 2.0**-8


class _Sent:
    """A finished collective."""

    def wait(self) -> None: ...


def _keep_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_module.sum_over

    def sum_over(tensor: torch.Tensor, group: Any, *, wait: bool = True) -> Any:
        return real(tensor, group) if wait else _Sent()

    monkeypatch.setattr(step_module, "sum_over", sum_over)


def _keep_own_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_module.sum_over

    def sum_over(tensor: torch.Tensor, group: Any, *, wait: bool = True) -> Any:
        return None if wait else real(tensor, group, wait=False)

    monkeypatch.setattr(step_module, "sum_over", sum_over)


class _WithoutReduction:
    """torch.distributed as FSDP sees it, with one collective that sends nothing."""

    def __init__(self, missing: str) -> None:
        self._missing = missing

    def __getattr__(self, name: str) -> Any:
        return self._nothing if name == self._missing else getattr(dist, name)

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...


def _keep_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fsdp_collectives, "dist", _WithoutReduction("all_reduce"))


MUTATIONS = {"count": _keep_own_count, "sums": _keep_own_sums, "gradients": _keep_own_gradients}


@pytest.fixture(params=MUTATIONS)
def mutated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The runtime with one reduction left out; forked ranks inherit it."""
    MUTATIONS[request.param](monkeypatch)
    return request.param


def test_a_missing_reduction_is_noticed(mutated: str, plain: Trace) -> None:
    """A parity test that passes without the reduction it is about would prove nothing."""
    with pytest.raises(AssertionError, match=r"disagree|assert|off by"):
        assert_same(run_layout(Layout(dp_replicate=2, dp_shard=1), SHAPE), plain, tolerance=FP32_TOLERANCE)
