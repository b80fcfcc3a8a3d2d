"""Pipelines: whatever the schedule, loss and gradients are those of one process, and evaluation works."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from rayfold.kernels.cross_entropy import linear_cross_entropy
from rayfold.kernels.linear import Deferred, linear
from rayfold.kernels.norm import add_rms_norm
from rayfold.parallel.layout import SCHEDULES, Layout, ScheduleName
from rayfold.parallel.mesh import FoldedMesh, make_mesh
from rayfold.parallel.pipeline import Inputs, Pipeline, cut
from rayfold.parallel.plan import Stages
from rayfold.parallel.recompute import apply_recompute
from rayfold.parallel.schedules import order_of
from rayfold.parallel.shard import apply_sharding, blocks_of

CPU = torch.device("cpu")
VOCABULARY, WIDTH, BLOCKS, ROWS, LENGTH = 23, 8, 5, 2, 6
Gradients = dict[str, list[Any]]


class Product(nn.Linear):
    """A product whose weight gradient may be put off."""

    deferred: Deferred | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, "auto", self.deferred)


class Block(nn.Module):
    """Products of our own and of torch, a parameter beside them, a norm with two results, and documents that
    mix their tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.up = Product(WIDTH, 3 * WIDTH, bias=False)
        self.plain = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
        same = (document_ids[:, :, None] == document_ids[:, None, :]).to(x.dtype)
        turned = x * torch.cos(positions.to(x.dtype))[..., None]
        normed, x = add_rms_norm(same @ turned / LENGTH, x, self.norm, eps=1e-5)
        return x + self.plain(F.silu(self.up(normed)))


class Chain(nn.Module):
    """A small model that keeps the contract of a pipeline."""

    computes_loss = True
    width = WIDTH

    def __init__(self, *, tied: bool, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = None if tied else Product(WIDTH, VOCABULARY, bias=False)
        self.stages = Stages(
            entry=("embedding",),
            blocks="blocks",
            exit=("norm", "head"),
            shared=("embedding",) if tied else (),
        )

    def forward(
        self, x: torch.Tensor, *, positions: torch.Tensor, document_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        x = x if x.is_floating_point() else self.embedding(x)
        for block in self.blocks:
            x = block(x, positions, document_ids)
        if self.norm is None:
            return x
        weight = self.embedding.weight if self.head is None else self.head.weight
        return linear_cross_entropy(self.norm(x), weight, labels)[0]


def chain(*, tied: bool = False, blocks: int = BLOCKS) -> Chain:
    """The same numbers each time."""
    torch.manual_seed(0)
    return Chain(tied=tied, blocks=blocks)


def inputs(count: int) -> list[Inputs]:
    """Micro-batches with fewer and fewer labels, the second without any."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        tokens, labels = torch.randint(0, VOCABULARY, (2, ROWS, LENGTH), generator=generator)
        labels[:, : number % LENGTH] = -100
        if number == 1:
            labels[:] = -100
        where = {
            "positions": torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous(),
            "document_ids": torch.randint(0, 2, (ROWS, LENGTH), generator=generator, dtype=torch.int32),
        }
        made.append((tokens, {**where, "labels": labels}))
    return made


def valid(microbatches: Sequence[Inputs]) -> torch.Tensor:
    return torch.tensor(sum(int((given["labels"] != -100).sum()) for _, given in microbatches))


def of_one_process(model: Chain, microbatches: Sequence[Inputs]) -> tuple[float, Gradients]:
    """Sum of losses, and gradients of their mean."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens, given in microbatches:
        loss = model(tokens, **given)
        (loss / valid(microbatches)).backward()
        total += loss.detach()
    return total.item(), {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(grad: torch.Tensor | None) -> list[Any]:
    assert grad is not None, "every parameter takes part"
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).tolist()


def stages_on_rank(
    mesh: FoldedMesh,
    *,
    tied: bool = False,
    blocks: int = BLOCKS,
    recompute: Literal["none", "selective", "full"] = "none",
    sharded: bool = False,
    compute: Literal["fp32", "bf16"] = "fp32",
) -> dict[int, Chain]:
    layout, found = mesh.layout, {}
    for stage in layout.stages_of(mesh.pp.rank):
        model = chain(tied=tied, blocks=blocks)
        last = stage == layout.stages - 1
        cut(model, model.stages, first=stage == 0, last=last, layers=layout.layers_of(stage, blocks))
        apply_recompute(blocks_of(model), recompute)
        if sharded:
            apply_sharding(model, mesh, compute=compute)
        found[stage] = model
    return found


def gathered(found: Sequence[tuple[float, Gradients]]) -> tuple[float, Gradients]:
    """Of all stages; gradients of a parameter that two stages hold are summed."""
    total, grads = 0.0, {}
    for loss, own in found:
        total += loss
        for name, grad in own.items():
            grads[name] = (torch.tensor(grad) + torch.tensor(grads.get(name, 0.0))).tolist()
    return total, grads


def gradients_of(parts: dict[int, Chain]) -> Gradients:
    own: Gradients = {}
    for part in parts.values():
        found = {name: whole(parameter.grad) for name, parameter in part.named_parameters()}
        own = gathered([(0.0, own), (0.0, found)])[1]
    return own


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            torch.tensor(found[1][name]),
            torch.tensor(grad),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def layout_of(name: ScheduleName, pp: int, **more: Any) -> Layout:
    return Layout(**{"dp_replicate": 1, "dp_shard": 1, **more}, pp=pp, schedule=name)


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in SCHEDULES), ("1f1b", True), ("zbv", True)]
)
def test_every_schedule_gives_loss_and_gradients_of_one_process(name: ScheduleName, tied: bool) -> None:
    """An order of work is not a change of numbers: stages of different sizes, unequal counts of labels."""
    microbatches = inputs(6 if SCHEDULES[name].in_rounds else 5)
    cuts = {1: (3, 2), 2: (1, 2, 1, 1)}[SCHEDULES[name].stages_per_rank]
    expected = of_one_process(chain(tied=tied), microbatches)

    def on_rank() -> tuple[float, Gradients]:
        mesh = make_mesh(layout_of(name, 2, stage_layers=cuts), CPU)
        parts = stages_on_rank(mesh, tied=tied)
        loss = Pipeline([*parts.values()], mesh).run(microbatches, valid(microbatches))
        return loss.item(), gradients_of(parts)

    assert_same(gathered(run_ranks(2, on_rank)), expected)


@pytest.mark.parametrize(
    ("name", "more", "recompute", "compute"),
    [
        ("gpipe", {"dp_shard": 2}, "full", "fp32"),
        ("1f1b", {"dp_replicate": 2}, "selective", "bf16"),
        ("interleaved_1f1b", {"dp_shard": 2}, "selective", "bf16"),
        ("interleaved_zero_bubble", {"dp_shard": 2}, "selective", "bf16"),
        ("interleaved_zero_bubble", {"dp_replicate": 2, "stages_per_rank": 4}, "none", "fp32"),
        ("zbv", {"dp_shard": 2}, "full", "bf16"),
        ("dualpipev", {"dp_shard": 2}, "full", "bf16"),
    ],
)
def test_sharding_and_recompute_change_no_gradient(
    name: ScheduleName, more: dict[str, int], recompute: Any, compute: Any
) -> None:
    """FSDP sums once, after the last micro-batch, in fp32; a second step does the same again."""
    blocks = 8 if "stages_per_rank" in more else BLOCKS
    microbatches = inputs(8)

    def on_one_rank() -> tuple[float, Gradients]:
        model: Any = chain(blocks=blocks)
        apply_sharding(model, make_mesh(Layout(dp_replicate=1, dp_shard=1), CPU), compute=compute)
        total = 0.0
        for number, (tokens, given) in enumerate(microbatches):
            model.set_requires_gradient_sync(number == len(microbatches) - 1)
            loss = model(tokens, **given)
            (loss / valid(microbatches)).backward()
            total += loss.item()
        return total, gradients_of({0: model})

    def on_rank() -> tuple[float, Gradients]:
        mesh = make_mesh(layout_of(name, 2, **more), CPU)
        parts = stages_on_rank(mesh, blocks=blocks, recompute=recompute, sharded=True, compute=compute)
        pipeline = Pipeline([*parts.values()], mesh, compute=compute)
        own = microbatches[4 * mesh.data.rank :][:4]
        for _ in range(2):
            for part in parts.values():
                part.zero_grad()
            loss = pipeline.run(own, valid(microbatches))
        grads = gradients_of(parts)
        return loss.item(), grads if mesh.data.rank == 0 else {}

    assert_same(gathered(run_ranks(4, on_rank)), run_ranks(1, on_one_rank)[0])


@pytest.mark.parametrize("name", ["1f1b", "interleaved_zero_bubble", "zbv"])
def test_four_ranks_share_a_model(name: ScheduleName) -> None:
    """Ranks in the middle have a neighbour on either side; stages of a V meet on the last rank."""
    microbatches = inputs(8)
    expected = of_one_process(chain(blocks=9), microbatches)

    def on_rank() -> tuple[float, Gradients]:
        mesh = make_mesh(layout_of(name, 4), CPU)
        parts = stages_on_rank(mesh, blocks=9)
        loss = Pipeline([*parts.values()], mesh).run(microbatches, valid(microbatches))
        return loss.item(), gradients_of(parts)

    assert_same(gathered(run_ranks(4, on_rank)), expected)


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv"])
def test_evaluation_takes_any_number_of_microbatches(name: ScheduleName) -> None:
    """One or many, of other shapes, between two steps: parameters are shards again, the next step stands."""
    training, few, many = inputs(4), inputs(1), inputs(7)
    expected = [of_one_process(chain(), batches)[0] for batches in (training, few, many, many, training)]

    def on_rank() -> list[float]:
        mesh = make_mesh(layout_of(name, 2), CPU)
        parts = stages_on_rank(mesh, sharded=True)
        pipeline = Pipeline([*parts.values()], mesh)
        short, rest = (
            [(tokens[rows], {key: value[rows] for key, value in given.items()}) for tokens, given in many]
            for rows in (slice(1), slice(1, None))
        )
        losses = [
            pipeline.run(training, valid(training)),
            pipeline.evaluate(few),
            pipeline.evaluate(many),
            pipeline.evaluate(short) + pipeline.evaluate(rest),
        ]
        assert all(isinstance(held, DTensor) for part in parts.values() for held in part.parameters())
        losses.append(pipeline.run(training, valid(training)))
        return [loss.item() for loss in losses]

    first, last = run_ranks(2, on_rank)
    assert [a + b for a, b in zip(first, last, strict=True)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "dualpipev"])
def test_ranks_do_what_the_plan_draws(name: ScheduleName) -> None:
    """`rayfold plan --schedule` shows an order; it is the one that runs, or the picture is a story."""
    layout = layout_of(name, 2)

    def on_rank() -> list[str]:
        mesh = make_mesh(layout, CPU)
        parts, seen = stages_on_rank(mesh), []
        for stage, part in parts.items():
            part.register_forward_hook(lambda *_, stage=stage: seen.append(f"{stage}F"))
            blocks_of(part)[0].register_full_backward_hook(lambda *_, stage=stage: seen.append(f"{stage}B"))
        microbatches = inputs(4)
        Pipeline([*parts.values()], mesh).run(microbatches, valid(microbatches))
        return seen

    drawn = [
        [f"{step.stage}{step.kind.replace('I', 'B')}" for step in steps if step.kind != "W"]
        for steps in order_of(layout, 4)
    ]
    assert run_ranks(2, on_rank) == drawn


def test_zero_bubble_leaves_gradients_of_weights_for_later() -> None:
    """What the second half of a backward pass computes is missing after the first."""
    deferred = Deferred(collecting=True)
    block = chain().blocks[0]
    block.up.deferred = deferred
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    where = torch.zeros(1, LENGTH, dtype=torch.int64)
    block(x, where, where).sum().backward()
    assert x.grad is not None
    assert block.plain.weight.grad is not None
    assert block.up.weight.grad is None
    assert [each[0] for each in deferred.waiting] == [block.up.weight]


def test_an_error_in_a_stage_keeps_its_type() -> None:
    """The verdict of a failed run names the cause, not torch's wrapping of it."""

    def on_rank() -> str:
        mesh = make_mesh(layout_of("1f1b", 2), CPU)
        parts = stages_on_rank(mesh)
        microbatches = inputs(2)
        microbatches[1][1]["labels"][0, 0] = VOCABULARY
        try:
            Pipeline([*parts.values()], mesh).run(microbatches, valid(microbatches))
        except IndexError as error:
            return f"{error} / {error.__notes__}"
        except RuntimeError:
            return "the other rank left"
        return "no error"

    first, last = run_ranks(2, on_rank)
    assert first == "the other rank left"
    assert f"Target {VOCABULARY} is out of bounds" in last
    assert "[Stage 1] failed to run forward" in last


def test_a_stage_keeps_the_names_of_the_whole_model() -> None:
    """What lies at rest is named without regard to a pipeline."""
    model, names = chain(tied=True), []
    whole_names = [name for name, _ in model.named_parameters()]
    for first, last, layers in (
        (True, False, range(2)),
        (False, False, range(2, 4)),
        (False, True, range(4, 5)),
    ):
        part = chain(tied=True)
        cut(part, part.stages, first=first, last=last, layers=layers)
        names += [name for name, _ in part.named_parameters()]
    assert sorted(names) == sorted([*whole_names, "embedding.weight"])


def test_a_model_that_keeps_no_contract_is_refused() -> None:
    """Without its loss inside, a last stage would return logits that nobody asked for."""
    model = nn.Linear(2, 2)

    def on_rank() -> None:
        Pipeline([model], make_mesh(layout_of("1f1b", 1), CPU))

    with pytest.raises(AssertionError, match=r"Linear cannot run in a pipeline.*computes_loss = True.*width"):
        run_ranks(1, on_rank)
