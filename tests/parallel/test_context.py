"""Attention over ranks that share a sequence is attention: outputs and every gradient are those of one rank.

Ranks are given their tokens of the same q, k, v and gradient of the output, and the whole mask. In fp32 both
kinds differ from one rank by the order of some sums: a few units of 2^-24, so 1e-5 of the largest number is
allowed.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import run_ranks
from peak import peak_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rayfold.kernels.attention import flashmask_attention
from rayfold.kernels.config import Path as KernelPath
from rayfold.kernels.flashmask import kinds
from rayfold.kernels.flashmask.mask import ColumnMask
from rayfold.parallel import context, ring
from rayfold.parallel.context import ContextSplit, Kind, apply_context
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import Axis, make_mesh
from rayfold.parallel.plan import ModelPlan, PlanError, Role
from rayfold.parallel.recompute import apply_recompute

Tensors = tuple[torch.Tensor, ...]
KINDS: tuple[Kind, ...] = ("ring", "ulysses")
PLAN = ModelPlan(modules={"core": Role.ATTENTION})


class Core(nn.Module):
    """As a model has it."""

    path: KernelPath = "auto"

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
        """[B, S, H, D] -> [B, S, H, D]."""
        out: torch.Tensor = flashmask_attention(q, k, v, mask, path=self.path)
        return out


class Block(nn.Module):
    """Something to compute before and behind the core: x [B, S, D] -> [B, S, H * P]."""

    def __init__(self, heads: int = 4, key_heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads = (heads, key_heads, key_heads)
        self.width = width
        self.qkv = nn.Linear(16, sum(self.heads) * width, bias=False)
        self.core = Core()

    def forward(self, x: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
        """[B, S, 16] -> [B, S, H * P]."""
        parts = self.qkv(x).unflatten(-1, (-1, self.width)).split(self.heads, dim=2)
        return self.core(*parts, mask).flatten(2).sin()


def mesh_of(cp: int, kind: Kind) -> Any:
    layout = Layout(dp_replicate=1, dp_shard=1, cp=cp, context=kind)
    return make_mesh(layout, torch.device("cpu"))


def pretended(rank: int, size: int) -> Axis:
    return Axis("cp", size, rank)


@dataclass(frozen=True)
class Case:
    """Heads, key heads and their size, and the mask of two sequences of 96 tokens."""

    heads: int
    key_heads: int
    width: int
    mask: ColumnMask

    def inputs(self, dtype: torch.dtype) -> Tensors:
        """q, k, v and a gradient of the output."""
        generator = torch.Generator().manual_seed(self.heads)
        shapes = (self.heads, self.key_heads, self.key_heads, self.heads)
        return tuple(torch.randn(2, 96, h, self.width, generator=generator).to(dtype) for h in shapes)


def documents(*rows: list[tuple[int, int]]) -> torch.Tensor:
    """Rows of (id, tokens)."""
    return torch.tensor([[name for name, tokens in row for _ in range(tokens)] for row in rows])


ODD = documents([(0, 31), (1, 42), (2, 23)], [(0, 5), (1, 1), (2, 90)])
ANCHORS = documents([(-1, 1), (0, 50), (1, 45)], [(0, 39), (-1, 3), (1, 20), (-2, 1), (2, 33)])
CASES = {
    "documents with odd borders": Case(4, 2, 8, kinds.packed(ODD)),
    "anchors at the start and between": Case(4, 4, 16, kinds.packed(ANCHORS)),
    "one long document": Case(4, 4, 5, kinds.packed(documents([(0, 96)], [(0, 96)]))),
    "documents that no two ranks share": Case(8, 2, 8, kinds.packed((torch.arange(96) // 4).expand(2, 96))),
    "one key head for every query head": Case(4, 1, 8, kinds.packed(ODD)),
    "key heads that no number of ranks divides": Case(12, 3, 4, kinds.packed(ODD)),
    "both directions": Case(4, 2, 1, kinds.document(ODD)),
    "a window": Case(4, 2, 8, kinds.sliding_window(2, 96, 17)),
    "rows that see nothing": Case(4, 2, 8, kinds.sparse_ranges(2, 96, [(0, 30), (40, 50)])),
}
PER_HEAD = Case(4, 2, 8, kinds.evicted((torch.arange(96) + 9).repeat(2, 4, 1) + torch.arange(4)[:, None]))


def results(
    attend: Callable[..., torch.Tensor], inputs: Tensors, mask: ColumnMask
) -> dict[str, torch.Tensor]:
    *leaves, grad = (x.detach().clone().requires_grad_() for x in inputs)
    out = attend(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, grad.detach())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def on_ranks(
    cp: int, kind: Kind, check: Callable[[Callable[..., torch.Tensor], ContextSplit], Any]
) -> list[Any]:
    """Give `check` a core that works over `cp` ranks, and the split, on each of them."""

    def on_rank() -> Any:
        mesh = mesh_of(cp, kind)
        model = nn.ModuleDict({"core": Core()})
        apply_context(model, PLAN, mesh, kind)
        return check(model["core"], ContextSplit(kind, mesh.cp))

    return run_ranks(cp, on_rank, timeout_s=120.0)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_every_gradient_are_those_of_one_rank(kind: Kind, cp: int) -> None:
    """Each mask and grouping of heads, and the same bits when it is done again."""
    cases = {**CASES, "bounds of each head": PER_HEAD} if kind == "ring" else CASES
    inputs = {name: case.inputs(torch.float32) for name, case in cases.items()}
    expected = {name: results(Core(), inputs[name], case.mask) for name, case in cases.items()}

    def check(attend: Callable[..., torch.Tensor], split: ContextSplit) -> None:
        for name, case in cases.items():
            own = tuple(split.local(x) for x in inputs[name])
            got, again = (results(attend, own, case.mask) for _ in range(2))
            for what, value in got.items():
                truth = split.local(expected[name][what])
                allowed = 1e-5 * float(expected[name][what].abs().max())
                assert float((value - truth).abs().max()) <= allowed, f"{name}: {what}"
                assert torch.equal(value, again[what]), f"{name}: {what} differs when done again"

    on_ranks(cp, kind, check)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_good_as_every_score_computed(kind: Kind) -> None:
    """Against fp64 on the same numbers, at most twice the error of plain bf16, and a unit of the result.

    That is the bound that one rank is held to. What the ring adds to it is the rounding of each step's output
    (2^-9 of it, merged with weights that add up to 1) and that of the output which the backward pass takes
    its sums from, as every kernel does that keeps its output. Of Ulysses the copies of a key head round their
    parts of its gradient.
    """
    cases = {name: CASES[name] for name in list(CASES)[:5]}
    inputs = {name: case.inputs(torch.bfloat16) for name, case in cases.items()}
    exact, allowed = {}, {}
    for name, case in cases.items():
        exact[name] = results(Core(), tuple(x.double() for x in inputs[name]), case.mask)
        plain = results(every_score, inputs[name], case.mask)
        for what, truth in exact[name].items():
            unit = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
            allowed[name, what] = 2 * float((plain[what].double() - truth).abs().max()) + unit

    def check(attend: Callable[..., torch.Tensor], split: ContextSplit) -> None:
        for name, case in cases.items():
            got = results(attend, tuple(split.local(x) for x in inputs[name]), case.mask)
            for what, value in got.items():
                assert value.dtype == torch.bfloat16
                error = float((value.double() - split.local(exact[name][what])).abs().max())
                assert error <= allowed[name, what], f"{name}: {what} {error:.2e} > {allowed[name, what]:.2e}"

    on_ranks(4, kind, check)


def every_score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ColumnMask) -> torch.Tensor:
    """The definition, in the dtype of its inputs throughout."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(mask.dense(), -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("cp", [2, 4])
def test_parts_are_weighed_and_gradients_come_home(cp: int) -> None:
    """A sum that is known: equal scores, values 0, 1, 2, ..., so row i has the mean i / 2 of i + 1 values.

    Without the weights of the merge a row would get the mean of its parts' means, which is another one
    wherever the parts differ in size. Row i hands 1 / (i + 1) to the value of each key j <= i, and to the key
    (j - i / 2) / (i + 1), as its query is 1. Keys of the first rank get these from all ranks: if the
    gradients did not travel, or stopped one rank too early, they would lie at other keys or lack the parts of
    others.
    """
    n = 16 * cp
    ones, place = torch.ones(1, n, 1, 1), torch.arange(n, dtype=torch.float32).view(1, n, 1, 1)
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    share = (j <= i) / (i + 1)
    expected = {
        "out": i[:, 0] / 2,
        "dq": torch.zeros(n, dtype=torch.float64),
        "dk": (share * (j - i / 2)).sum(0),
        "dv": share.sum(0),
    }

    def check(attend: Callable[..., torch.Tensor], split: ContextSplit) -> None:
        own = tuple(split.local(x) for x in (ones, torch.zeros_like(ones), place, ones))
        for what, value in results(attend, own, kinds.causal(1, n)).items():
            truth = expected[what][split.index(n)]
            torch.testing.assert_close(value.flatten().double(), truth, rtol=1e-5, atol=1e-4)

    on_ranks(cp, "ring", check)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often and how many bytes go round, how often scores are computed, and bytes that are exchanged."""
    counts = {"shifts": 0, "shifted": 0, "computed": 0, "exchanged": 0}
    shift, attend, exchange = ring.ring_shift, ring.flashmask_attention, context.all_to_all

    def count_shift(tensors: list[torch.Tensor], axis: Axis) -> Any:
        counts["shifts"] += 1
        counts["shifted"] += sum(x.nbytes for x in tensors)
        return shift(tensors, axis)

    def count_computed(*args: Any, **kwargs: Any) -> Any:
        counts["computed"] += 1
        return attend(*args, **kwargs)

    def count_exchanged(x: torch.Tensor, split_dim: int, cat_dim: int, axis: Axis) -> torch.Tensor:
        counts["exchanged"] += x.nbytes * (axis.size - 1) // axis.size
        return exchange(x, split_dim, cat_dim, axis)

    monkeypatch.setattr(ring, "ring_shift", count_shift)
    monkeypatch.setattr(ring, "flashmask_attention", count_computed)
    monkeypatch.setattr(context, "all_to_all", count_exchanged)
    return counts


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rank_sends_is_what_is_written_down(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, key_heads: int
) -> None:
    """The formulas of `parallel/context.py` for bf16: gradients go round in fp32, keys are sent as copies."""
    counts, cp, rows, heads, width = watched(monkeypatch), 4, 24, 4, 8
    case = Case(heads, key_heads, width, kinds.packed(ODD))

    def check(attend: Callable[..., torch.Tensor], split: ContextSplit) -> int:
        results(attend, tuple(split.local(x) for x in case.inputs(torch.bfloat16)), case.mask)
        return counts["shifted"] + counts["exchanged"]

    keys = 2 * rows * 2 * key_heads * width
    around = 2 * (cp - 1) * keys * 2 + cp * keys * 4
    copies = cp // key_heads
    exchanged = (cp - 1) * 2 * rows * (2 * heads + 2 * key_heads * copies) * width * 2 // cp
    assert on_ranks(cp, kind, check) == [around if kind == "ring" else exchanged] * cp


def test_steps_that_see_nothing_compute_nothing_and_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents inside of ranks leave one step of four; all keys go round all the same."""
    counts = watched(monkeypatch)
    case = CASES["documents that no two ranks share"]

    def check(attend: Callable[..., torch.Tensor], split: ContextSplit) -> tuple[int, int]:
        results(attend, tuple(split.local(x) for x in case.inputs(torch.float32)), case.mask)
        return counts["computed"], counts["shifts"]

    assert on_ranks(4, "ring", check) == [(1, 3 + 3 + 4)] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_changes_no_bit(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """A block that is computed again exchanges again in the same order; selective keeps the ring's result."""
    counts = watched(monkeypatch)
    torch.manual_seed(0)
    whole, mask = torch.randn(2, 96, 16), kinds.packed(ODD)
    weights = Block().state_dict()

    def on_rank() -> dict[str, int]:
        mesh, found, shifts = mesh_of(2, kind), {}, {}
        for mode in ("none", "selective", "full"):
            model = Block()
            model.load_state_dict(weights)
            apply_context(model, PLAN, mesh, kind)
            apply_recompute([model], mode)
            x = ContextSplit(kind, mesh.cp).local(whole).requires_grad_()
            before = counts["shifts"]
            out = model(x, mask)
            out.square().sum().backward()
            shifts[mode] = counts["shifts"] - before
            found[mode] = (out.detach(), x.grad, model.qkv.weight.grad)
        for mode in ("selective", "full"):
            assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode], strict=True)), mode
        return shifts

    expected = {"none": 1 + 1 + 2, "selective": 1 + 1 + 2, "full": 2 + 1 + 2}
    assert run_ranks(2, on_rank) == [expected if kind == "ring" else dict.fromkeys(expected, 0)] * 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # a compiler asks for .grad of what has none
def test_a_compiler_takes_what_stands_around_it() -> None:
    """Compiled blocks stop at the exchanges and go on behind them."""
    torch.manual_seed(0)
    whole, mask = torch.randn(2, 96, 16), kinds.packed(ODD)
    weights = Block().state_dict()

    def on_rank() -> None:
        for kind in KINDS:
            mesh, found = mesh_of(2, kind), []
            for compiled in (False, True):
                model = Block()
                model.load_state_dict(weights)
                apply_context(model, PLAN, mesh, kind)
                forward = torch.compile(model.forward, backend="eager") if compiled else model.forward
                out = forward(ContextSplit(kind, mesh.cp).local(whole), mask)
                out.square().sum().backward()
                found.append(model.qkv.weight.grad)
            assert torch.equal(*found), kind

    run_ranks(2, on_rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_held_once_and_in_order(kind: Kind, size: int) -> None:
    """Their places ascend, so a mask of them is one of intervals still."""
    indices = [ContextSplit(kind, pretended(rank, size)).index(24) for rank in range(size)]
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(24))
    tokens = torch.randn(2, 24, 3)
    for rank, index in enumerate(indices):
        assert torch.equal(index, index.sort().values)
        assert torch.equal(ContextSplit(kind, pretended(rank, size)).local(tokens), tokens[:, index])


def test_under_a_causal_mask_all_ranks_of_a_ring_see_as_many_scores() -> None:
    """Chunks i and 2 cp - 1 - i: a contiguous part would leave the last rank with most of the work."""
    mask = kinds.causal(1, 96)
    seen = []
    for rank in range(4):
        cuts = ContextSplit("ring", pretended(rank, 4)).cuts(mask)
        seen.append(sum(int((~cut.dense()).sum()) for cut in cuts if cut is not None))
    assert len(set(seen)) == 1
    assert sum(seen) == 96 * 97 // 2


def test_a_mask_is_cut_once_and_its_cuts_go_with_it() -> None:
    """Layers share them, micro-batches in flight have their own, and none outlives its step."""
    split = ContextSplit("ring", pretended(0, 2))
    masks = [kinds.packed(ODD), kinds.packed(ODD)]
    first = split.cuts(masks[0])
    assert split.cuts(masks[0]) is first
    assert split.cuts(masks[1]) is not first
    part = weakref.ref(first[0])
    del first
    model = nn.ModuleDict({"core": Core()})

    def on_rank() -> None:
        apply_context(model, PLAN, mesh_of(2, "ring"), "ring")
        mask = kinds.packed(ODD)
        whole = weakref.ref(mask)
        q, k, v = (torch.randn(2, 48, 2, 4, requires_grad=True) for _ in range(3))
        out = model["core"](q, k, v, mask)
        del mask
        assert whole() is not None
        out.sum().backward()
        del out
        gc.collect()
        assert whole() is None

    run_ranks(2, on_rank)
    masks.clear()
    gc.collect()
    assert part() is None


@dataclass(frozen=True)
class Pretended:
    """What a planner gives instead of a mesh: its axes have no groups."""

    cp: Axis


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_flow_through_a_pretended_axis(kind: Kind) -> None:
    """A planner runs a rank's model alone, on tensors without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = Block(heads=8, key_heads=2)
        apply_context(model, PLAN, Pretended(pretended(0, 4)), kind)  # type: ignore[arg-type]
        out = model(torch.zeros(2, 24, 16), kinds.packed(torch.zeros(2, 96, dtype=torch.int32)))
        assert out.shape == (2, 24, 64)
        out.sum().backward()
        assert model.qkv.weight.grad.shape == model.qkv.weight.shape


def test_what_does_not_divide_is_told_with_what_would() -> None:
    """Layouts are checked before a run starts; a module of its own is told here."""
    with pytest.raises(AssertionError, match=r"4 ranks .* 8 equal chunks, and 30 tokens .*; 24 do"):
        ContextSplit("ring", pretended(0, 4)).index(30)
    mask = kinds.causal(1, 8)
    for heads, given, words in ((3, mask, "3 query heads .* the ring"), (2, PER_HEAD.mask, "4; the ring")):
        model: Any = nn.ModuleDict({"core": Core()})
        apply_context(model, PLAN, Pretended(pretended(0, 2)), "ulysses")  # type: ignore[arg-type]
        q = torch.zeros(1, 4, heads, 2)
        with pytest.raises(AssertionError, match=words):
            model["core"](q, q, q, given)


def test_a_model_whose_tokens_would_never_meet_is_refused() -> None:
    """Each rank would attend to its own tokens, and nobody would notice but the loss."""
    with pytest.raises(PlanError, match=r"Role\.ATTENTION"):
        apply_context(Block(), ModelPlan(), Pretended(pretended(0, 2)), "ring")  # type: ignore[arg-type]


TOKENS, HEADS, KEY_HEADS, WIDTH = 32_768, 4, 2, 64  # wide, so that scores of a row block are little beside


def many_documents(tokens: int) -> ColumnMask:
    """Documents of 128 tokens behind anchors of 4 at every eighth: every rank sees something of each."""
    place, eighth = torch.arange(tokens), tokens // 8
    return kinds.packed(torch.where(place % eighth < 4, -1 - place // eighth, place // 128)[None])


def peak_of_attention(attend: Callable[..., torch.Tensor], ranks: int) -> int:
    """Of a rank's share of `TOKENS`, forward and backward, its inputs and their gradients included."""

    def step(tokens: int, mask: ColumnMask) -> None:
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        q, k, v = (torch.randn(1, tokens // ranks, h, WIDTH, requires_grad=True) for h in heads)
        attend(q, k, v, mask).backward(torch.randn_like(q))

    small, mask = many_documents(1024), many_documents(TOKENS)
    step(1024, small)
    step(TOKENS, mask)  # makes the plans of the mask, which the formula does not count
    return peak_bytes(partial(step, TOKENS, mask))


def test_a_rank_needs_memory_for_its_part_of_the_sequence() -> None:
    """32,768 tokens on four ranks: at its fullest a rank holds what `parallel/ring.py` says, within 10%.

    That is 5 Q + 8 (K + V) in fp32, reached in the backward pass: of q, out, both gradients and a step's
    part; of keys and values the own ones, those at hand and those that arrive, the sums that leave and that
    arrive, and three times in the kernel. Memory that is waiting for data is none yet, so a rank may stay
    below that whose neighbours come late: the largest is held to it. A rank that runs ahead of the next one
    also holds the pair that is still leaving, and nobody holds more. One rank alone needs more than twice as
    much: the ring's buffers are what keeps it from four times.
    """
    share = TOKENS // 4 * WIDTH * 4
    formula = (5 * HEADS + 8 * 2 * KEY_HEADS) * share
    # ranks of a process of its own: what a long one has freed and kept would be used, and not be seen
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    leaving, told = 2 * KEY_HEADS * share, [p / 2**20 for p in peaks["ring"]]
    assert 0.9 * formula <= max(peaks["ring"]) <= 1.1 * (formula + leaving), told
    assert statistics.median(peaks["ring"]) < 0.5 * peaks["alone"]
    # an exchange holds what leaves and what arrives, so not a quarter; gloo holds more of what comes early
    assert statistics.median(peaks["ulysses"]) < 0.7 * peaks["alone"]
    assert max(peaks["ulysses"]) < peaks["alone"]


def measured_peaks() -> dict[str, Any]:
    """Of one rank alone, and of four."""

    def on_one() -> int:
        return peak_of_attention(Core(), 1)

    def on_rank(attend: Callable[..., torch.Tensor], split: ContextSplit) -> int:
        return peak_of_attention(attend, split.axis.size)

    (alone,) = run_ranks(1, on_one, timeout_s=120.0)
    return {"alone": alone, **{kind: on_ranks(4, kind, on_rank) for kind in ("ring", "ulysses")}}  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(measured_peaks()))
