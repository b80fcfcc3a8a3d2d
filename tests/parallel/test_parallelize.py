"""Laying out: names and numbers stay, recompute changes memory only, and collectives carry plain values."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import run_ranks
from torch import nn

from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.collectives import gather_json, share_json, sum_over
from rayfold.parallel.initial import fill
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import Axis, make_mesh
from rayfold.parallel.parallelize import Workings, build_module, parallelize, start_numbers
from rayfold.parallel.recompute import apply_recompute
from rayfold.parallel.shard import blocks_of

SHAPE = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=47, vocab_size=61)
CPU = torch.device("cpu")


WORLD = Layout(dp_replicate=1, dp_shard=3)


@pytest.mark.parametrize("value", [None, [], {"a": [1, 2.5, "ü"]}, "x" * 100_000])
def test_json_reaches_every_rank_in_order(value: Any) -> None:
    """Ranks tell each other values of different lengths; each gets all of them in rank order."""

    def on_rank() -> list[Any]:
        world = make_mesh(WORLD, CPU).world
        return gather_json([world.rank, value if world.rank == 1 else 0], world, CPU)

    assert run_ranks(3, on_rank) == [[[0, 0], [1, value], [2, 0]]] * 3


def test_a_rank_alone_exchanges_nothing_and_gets_what_it_would_from_others() -> None:
    """No group is there to do it by: gloo's threads would slow down all operators from then on."""
    assert not dist.is_initialized()
    alone = Axis(name="world", size=1, rank=0)
    assert gather_json({"a": (1, 2), 3: "x" * 100_000}, alone, CPU) == [{"a": [1, 2], "3": "x" * 100_000}]


def test_json_of_one_rank_reaches_all() -> None:
    """A rank that joins is told what the others know, whichever of them tells it."""

    def on_rank() -> list[Any]:
        world = make_mesh(WORLD, CPU).world
        return [share_json({"from": world.rank}, world, CPU, source) for source in range(3)]

    assert run_ranks(3, on_rank) == [[{"from": source} for source in range(3)]] * 3


def test_numbers_are_drawn_when_they_are_asked_for() -> None:
    """A state that comes from elsewhere needs none; what is drawn later is what is drawn at once."""

    def on_rank() -> bool:
        mesh = make_mesh(Layout(dp_replicate=1, dp_shard=2), CPU)
        at_once, later = (
            parallelize(lambda: Llama(SHAPE), mesh, seed=3, start=start) for start in (True, False)
        )
        for held in later.held:
            held.parameter.detach().to_local().fill_(torch.nan)
        start_numbers(later, seed=3)
        pairs = zip(at_once.held, later.held, strict=True)
        return all(torch.equal(a.parameter.to_local(), b.parameter.to_local()) for a, b in pairs)

    assert run_ranks(2, on_rank) == [True, True]


def test_a_process_that_becomes_another_rank_holds_what_that_rank_holds() -> None:
    """As one does that lived through a loss: the run shrinks, its number changes, and the run grows again."""

    def on_rank() -> list[bool]:
        right, rank = [], dist.get_rank()
        for turn in range(2):
            if turn:
                store = dist.distributed_c10d._get_default_store()
                dist.destroy_process_group()
                dist.init_process_group(
                    "gloo", store=dist.PrefixStore("again", store), rank=1 - rank, world_size=2
                )
            mesh = make_mesh(Layout(dp_replicate=1, dp_shard=2), CPU)
            model = parallelize(lambda: Llama(SHAPE), mesh, seed=3)
            right += [held.box()[1] == tuple(held.parameter.to_local().shape) for held in model.held]
            first = next(held for held in model.held if held.name == "embedding.weight")
            right.append((first.box()[0][0] == 0) == (mesh.world.rank == 0))
        return right

    assert all(all(right) for right in run_ranks(2, on_rank))


def test_sums_can_be_waited_for_later() -> None:
    """The step hides the count's sum behind the forward pass."""

    def on_rank() -> float:
        world = make_mesh(WORLD, CPU).world
        tensor = torch.tensor(float(world.rank + 1))
        pending = sum_over(tensor, world, wait=False)
        assert pending is not None
        pending.wait()
        sum_over(tensor, world)
        return tensor.item()

    assert run_ranks(3, on_rank) == [18.0] * 3


def gradients(recompute: Any, dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
    model = Llama(SHAPE)
    for name, parameter in model.named_parameters():
        fill(parameter, model.initial(name), seed=0, name=name)
    model.to(dtype)
    apply_recompute(blocks_of(model), recompute)
    tokens = torch.randint(0, 61, (2, 15), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(15).expand(2, 15)
    logits = model(tokens, positions=positions, document_ids=(positions > 6).int())
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_bits(recompute: str, dtype: torch.dtype) -> None:
    """Computing again is computing the same: loss and every gradient are bitwise equal."""
    loss, expected = gradients("none", dtype)
    got_loss, got = gradients(recompute, dtype)
    assert got_loss == loss
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


class Plain(nn.Module):
    """A user's model: no `initial`, a buffer, and blocks in a list inside a module."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body.blocks:
            x = block(x)
        return x * self.scale


def test_blocks_are_the_members_of_module_lists() -> None:
    """They are the units of sharding and recompute, however deep the list lies."""
    model = Plain()
    assert blocks_of(model) == list(model.body.blocks)
    assert blocks_of(nn.Linear(2, 2)) == []


def test_a_model_of_the_users_starts_from_its_constructor_everywhere() -> None:
    """Without `initial` the constructor's numbers count; every layout has them, and the buffer survives."""
    whole, in_memory = build_module(Plain, seed=3)
    assert in_memory
    expected = {name: p.tolist() for name, p in whole.named_parameters()}

    def on_rank() -> dict[str, Any]:
        model = parallelize(Plain, make_mesh(Layout(dp_replicate=1, dp_shard=2), CPU), seed=3)
        values = {held.name: held.parameter.full_tensor().tolist() for held in model.held}  # type: ignore[attr-defined]
        return {"parameters": values, "scale": model.buffers["scale"].tolist()}

    assert run_ranks(2, on_rank) == [{"parameters": expected, "scale": [2.0]}] * 2


def test_building_leaves_the_global_generator_alone() -> None:
    """A model must not shift the random numbers of whatever comes after it."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_module(Plain, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_names_stay_as_in_the_plain_model() -> None:
    """Checkpoints are named by the unsharded model, so neither sharding nor recompute may rename."""
    names = [name for name, _ in Llama(SHAPE).named_parameters()]

    def on_rank() -> list[str]:
        mesh = make_mesh(Layout(dp_replicate=1, dp_shard=2), CPU)
        model = parallelize(lambda: Llama(SHAPE), mesh, seed=3, workings=Workings(recompute="selective"))
        return [held.name for held in model.held]

    assert run_ranks(2, on_rank) == [names] * 2


def test_a_mesh_of_the_wrong_size_is_our_own_mistake() -> None:
    """The planner has checked the sizes; a group of another size means a bug, said with both numbers."""

    def on_rank() -> None:
        make_mesh(Layout(dp_replicate=1, dp_shard=3), CPU)

    with pytest.raises(AssertionError, match="needs 3 ranks, the group has 2"):
        run_ranks(2, on_rank)
