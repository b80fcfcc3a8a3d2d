"""Process groups of a layout: one `FoldedMesh` value, passed to whoever communicates."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .folding import View, dense_view, groups
from .layout import Layout


@dataclass(frozen=True)
class Axis:
    """One axis of parallelism, or several together, seen from this rank.

    Without a group the axis is pretended: collectives over it keep shapes and move nothing, so that a planner
    can run a rank's model alone. An axis of one rank needs no group.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = ()  # of the world, in the order of the axis


@dataclass(frozen=True)
class FoldedMesh:
    """The ranks of a run seen along each axis.

    `data` holds the ranks that read different samples, `world` all: loss, counts and norms are summed over
    it, each by one of the ranks that know it. `ends` joins the ranks of the first and the last pipeline
    stage, where this rank holds either. `sharding` is FSDP's mesh (dp_replicate, dp_shard * cp): the ranks of
    a context share a copy of the model too. A pretended mesh has none.
    """

    layout: Layout
    device: torch.device
    world: Axis
    data: Axis
    cp: Axis
    tp: Axis
    pp: Axis
    ends: Axis | None
    sharding: DeviceMesh | None

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that counts the samples it read: others read the same."""
        return self.cp.rank == self.tp.rank == self.pp.rank == 0


def make_mesh(
    layout: Layout,
    device: torch.device,
    topology: Sequence[int] | None = None,
    timeout: timedelta | None = None,
) -> FoldedMesh:
    """Split the default process group along the axes of `layout`.

    The default group must be initialised and hold `layout.world_size` ranks; all of them call this. The rank
    at each place of the layout is `topology[place]`, its own number unless given; on each axis ranks must
    ascend. `timeout` is the longest
    wait of a collective in the new groups.
    """
    ranks = dist.get_world_size()
    assert ranks == layout.world_size, (
        f"layout {layout} needs {layout.world_size} ranks, the group has {ranks}"
    )
    split = _Splitter(dense_view(layout), topology, timeout)
    shards, replicas = split.axis("shard", ("dp_shard", "cp")), split.axis("dp_replicate", ("dp_replicate",))
    mesh = FoldedMesh(
        layout=layout,
        device=device,
        world=Axis("world", ranks, dist.get_rank(), dist.group.WORLD, tuple(range(ranks))),
        data=split.axis("data", ("dp_replicate", "dp_shard")),
        cp=split.axis("cp", ("cp",)),
        tp=split.axis("tp", ("tp",)),
        pp=split.axis("pp", ("pp",)),
        ends=split.ends() if layout.pp > 1 else None,
        sharding=_sharding(split, replicas, shards, device),
    )
    return mesh


def pretended_mesh(layout: Layout, device: torch.device, *, pp_rank: int) -> FoldedMesh:
    """The mesh of one rank of pipeline rank `pp_rank`, the first on all other axes, without any process
    group: to look at a rank's model where the ranks are not.
    """

    def axis(name: str, size: int, rank: int = 0) -> Axis:
        return Axis(name, size, rank)

    return FoldedMesh(
        layout=layout,
        device=device,
        world=axis("world", layout.world_size),
        data=axis("data", layout.dp_size),
        cp=axis("cp", layout.cp),
        tp=axis("tp", layout.tp),
        pp=axis("pp", layout.pp, pp_rank),
        ends=None,
        sharding=None,
    )


class _Splitter:
    """Makes process groups; equal partitions of the ranks share theirs."""

    def __init__(self, view: View, topology: Sequence[int] | None, timeout: timedelta | None) -> None:
        self.view = view
        self.topology = topology
        self._timeout = timeout
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def axis(self, name: str, axes: Collection[str]) -> Axis:
        """The ranks that differ from this one in `axes` alone."""
        partition = groups(self.view, axes, self.topology)
        own = next(ranks for ranks in partition if dist.get_rank() in ranks)
        return Axis(name, len(own), own.index(dist.get_rank()), self._group(partition), own)

    def ends(self) -> Axis | None:
        """The first and the last rank of this rank's pipeline, if it is one of them."""
        pipelines = groups(self.view, ("pp",), self.topology)
        partition: list[tuple[int, ...]] = [(ranks[0], ranks[-1]) for ranks in pipelines]
        group = self._group(partition)
        own = next((ranks for ranks in partition if dist.get_rank() in ranks), None)
        return None if own is None else Axis("ends", 2, own.index(dist.get_rank()), group, own)

    def _group(self, partition: list[tuple[int, ...]]) -> dist.ProcessGroup:
        key = tuple(sorted(partition))
        if key not in self._made:
            everyone = dist.group.WORLD
            assert everyone is not None, "the caller initialised the default group"
            for own in partition:
                assert list(own) == sorted(own), (
                    f"the topology puts ranks {own} in this order on an axis, and torch counts the ranks of "
                    "a group upwards; keep them so on every axis"
                )
            if partition == [tuple(range(dist.get_world_size()))]:
                self._made[key] = everyone
            else:
                # all ranks make all groups, in one order
                lists = [list(ranks) for ranks in partition]
                self._made[key] = dist.new_subgroups_by_enumeration(lists, timeout=self._timeout)[0]
        return self._made[key]


def _sharding(split: _Splitter, replicas: Axis, shards: Axis, device: torch.device) -> DeviceMesh:
    """FSDP's mesh of this rank, made of groups that exist."""
    own = next(
        ranks
        for ranks in groups(split.view, ("dp_replicate", "dp_shard", "cp"), split.topology)
        if dist.get_rank() in ranks
    )
    made = [axis.group for axis in (replicas, shards) if axis.group is not None]
    return DeviceMesh.from_group(
        made,
        device.type,
        mesh=torch.tensor(own).view(replicas.size, shards.size),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
