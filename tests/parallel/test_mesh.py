"""Groups of ranks: they partition the world, views agree, and what travels in them arrives."""

import math
from typing import Any

import pytest
import torch
from harness import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from rayfold.parallel.collectives import all_to_all, gather, max_over, reduce_scatter, ring_shift, sum_over
from rayfold.parallel.folding import coordinate, dense_view, groups
from rayfold.parallel.layout import AXES, Layout
from rayfold.parallel.mesh import Axis, make_mesh, pretended_mesh

SIZES = st.integers(1, 3)
CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(**{axis: draw(SIZES) for axis in AXES})


@st.composite
def topologies(draw: st.DrawFn) -> tuple[Layout, list[int]]:
    layout = draw(layouts())
    return layout, draw(st.permutations(range(layout.world_size)))


@given(topologies(), st.sets(st.sampled_from(AXES)))
def test_groups_partition_the_world(world: tuple[Layout, list[int]], axes: set[str]) -> None:
    """Whatever axes and whichever order of ranks: each rank is in one group, all are of one size."""
    layout, topology = world
    found = groups(dense_view(layout), axes, topology)
    assert sorted(rank for ranks in found for rank in ranks) == list(range(layout.world_size))
    assert {len(ranks) for ranks in found} == {math.prod(getattr(layout, axis) for axis in axes)}


@given(topologies(), st.sampled_from(AXES))
def test_ranks_of_a_group_differ_in_its_axis_alone(world: tuple[Layout, list[int]], axis: str) -> None:
    """And stand in it in the order of the axis."""
    layout, topology = world
    view = dense_view(layout)
    for ranks in groups(view, (axis,), topology):
        places = [coordinate(view, rank, topology) for rank in ranks]
        assert [place.pop(axis) for place in places] == list(range(len(ranks)))
        assert all(place == places[0] for place in places)


@given(topologies(), st.data())
def test_another_view_of_the_ranks_agrees_on_the_pipeline(
    world: tuple[Layout, list[int]], data: st.DataObject
) -> None:
    """Experts will fold the ranks of a stage in their own way; stages are the same ranks in every view."""
    layout, topology = world
    inside = layout.world_size // layout.pp
    ep = data.draw(st.sampled_from([d for d in range(1, inside + 1) if inside % d == 0]))
    experts = {"pp": layout.pp, "expert_shard": inside // ep, "ep": ep}
    for rank in range(layout.world_size):
        dense = coordinate(dense_view(layout), rank, topology)
        assert coordinate(experts, rank, topology)["pp"] == dense["pp"]
    stages = groups(experts, ("expert_shard", "ep"), topology)
    assert stages == groups(dense_view(layout), set(AXES) - {"pp"}, topology)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    """They exchange most, so they are counted first; stages are farthest apart."""
    layout = Layout(dp_replicate=1, dp_shard=1, tp=2, cp=2, pp=2)
    assert groups(dense_view(layout), ("tp",)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups(dense_view(layout), ("pp",)) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_a_topology_moves_ranks() -> None:
    """A cluster's wiring may want other ranks beside each other: places are given to the ranks it names."""
    layout = Layout(dp_replicate=1, dp_shard=2, tp=2)

    def on_rank() -> tuple[Any, ...]:
        mesh = make_mesh(layout, CPU, topology=(0, 2, 1, 3))
        total = torch.tensor(float(mesh.world.rank))
        sum_over(total, mesh.tp)
        return mesh.tp.ranks, mesh.tp.rank, mesh.data.rank, total.item()

    assert run_ranks(4, on_rank) == [
        ((0, 2), 0, 0, 2.0),
        ((1, 3), 0, 1, 4.0),
        ((0, 2), 1, 0, 2.0),
        ((1, 3), 1, 1, 4.0),
    ]


def test_the_ends_of_a_pipeline_share_a_group() -> None:
    """A tied embedding is in the first and the last stage; those between have no part in it."""

    def on_rank() -> Any:
        ends = make_mesh(Layout(dp_replicate=1, dp_shard=1, pp=3), CPU).ends
        return None if ends is None else (ends.ranks, ends.rank)

    assert run_ranks(3, on_rank) == [((0, 2), 0), None, ((0, 2), 1)]


def both_ways(x: torch.Tensor, made: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """A result, and the gradient of x where made's is its own place times the rank after next."""
    made.backward(torch.arange(made.numel(), dtype=x.dtype).view(made.shape))
    assert x.grad is not None
    return made.tolist(), x.grad.tolist()


def test_exchanges_and_their_gradients() -> None:
    """gather and reduce_scatter are each other's backward pass, all_to_all is its own."""

    def on_rank() -> dict[str, Any]:
        axis = make_mesh(Layout(dp_replicate=1, dp_shard=1, tp=2), CPU).tp

        def own() -> torch.Tensor:
            return (torch.arange(4.0).view(2, 2) + 10 * axis.rank).requires_grad_()

        a, b, c = own(), own(), own()
        top = torch.tensor([1.0 + axis.rank, 5.0 - axis.rank])
        max_over(top, axis)
        return {
            "gather": both_ways(a, gather(a, 1, axis)),
            "reduce_scatter": both_ways(b, reduce_scatter(b, 1, axis)),
            "all_to_all": both_ways(c, all_to_all(c, 1, 0, axis)),
            "max": top.tolist(),
            "shift": [t.item() for t in ring_shift([torch.tensor(axis.rank)], axis).wait()],
        }

    first, second = run_ranks(2, on_rank)
    assert first["gather"] == ([[0, 1, 10, 11], [2, 3, 12, 13]], [[0, 2], [8, 10]])
    assert second["gather"] == ([[0, 1, 10, 11], [2, 3, 12, 13]], [[4, 6], [12, 14]])
    assert first["reduce_scatter"] == ([[10], [14]], [[0, 0], [1, 1]])
    assert second["reduce_scatter"] == ([[12], [16]], [[0, 0], [1, 1]])
    assert first["all_to_all"] == ([[0], [2], [10], [12]], [[0, 0], [1, 1]])
    assert second["all_to_all"] == ([[1], [3], [11], [13]], [[2, 2], [3, 3]])
    assert first["max"] == second["max"] == [2.0, 5.0]
    assert (first["shift"], second["shift"]) == ([1], [0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_pretended_axis_keeps_shapes(dim: int) -> None:
    """A planner runs a rank's model alone: everything has the size that it has among ranks."""
    mesh = pretended_mesh(Layout(dp_replicate=1, dp_shard=1, tp=2, cp=2), CPU, pp_rank=0)
    x = torch.zeros(2, 4, 6)
    wide = [n * 2 if at == dim else n for at, n in enumerate(x.shape)]
    assert list(gather(x, dim, mesh.tp).shape) == wide
    assert list(reduce_scatter(torch.zeros(wide), dim, mesh.tp).shape) == list(x.shape)
    assert [list(t.shape) for t in ring_shift([x], mesh.cp).wait()] == [[2, 4, 6]]
    assert sum_over(x, mesh.tp) is None
    other = (dim + 1) % 3
    exchanged = all_to_all(torch.zeros(wide), dim, other, mesh.tp)
    assert exchanged.shape[dim] == x.shape[dim]
    assert exchanged.shape[other] == 2 * x.shape[other]


def test_an_axis_of_one_rank_is_no_exchange() -> None:
    """Nothing is copied and no group is needed."""
    x = torch.ones(3)
    axis = Axis("tp", 1, 0)
    assert gather(x, 0, axis) is x
    assert reduce_scatter(x, 0, axis) is x
    assert all_to_all(x, 0, 0, axis) is x
