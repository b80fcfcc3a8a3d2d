"""What a rank really sends, counted where torch hands tensors to the process groups."""

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rayfold.parallel.mesh import FoldedMesh
from rayfold.parallel.ring import ring_attention, ring_attention_backward

RINGS = {each._opoverload: each._init_fn for each in (ring_attention, ring_attention_backward)}


class Counted(TorchDispatchMode):
    """Adds up the bytes that leave this rank, by group, as `parallel/traffic.py` counts them by axis."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._count(op._schema.name.removeprefix("c10d::"), args)
        if (ring := RINGS.get(op)) is not None:  # torch looks into no operator, and these send
            with self:
                return ring(*args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(
            dist.ProcessGroup.unbox(a) for a in args if "ProcessGroup" in str(type(a)) or _is_group(a)
        )
        tensors = args[0] if isinstance(args[0], list) else [args[0]]
        size, ranks = sum(t.numel() * t.element_size() for t in tensors), group.size()
        share = (ranks - 1) / ranks
        if name == "allreduce_":
            sent = 2 * share * size
        elif name == "_allgather_base_":
            sent = share * size  # the first is the output
        elif name == "_reduce_scatter_base_":
            sent = share * args[1].numel() * args[1].element_size()
        elif name == "alltoall_base_":
            sent = share * size
        elif name == "send":
            sent = size
        elif name in ("recv_", "recv_any_source_"):
            sent = 0
        else:
            raise NotImplementedError(f"nobody counts c10d::{name}")
        self.sent[group.group_name] += sent


def _is_group(value: Any) -> bool:
    return type(value).__name__ == "ScriptObject" and "ProcessGroup" in str(value._type())


def by_group(mesh: FoldedMesh, by_axis: dict[str, int]) -> dict[str, float]:
    """Bytes by axis as bytes by group: axes along which the ranks are the same share one."""
    assert mesh.sharding is not None, "a real mesh"
    groups = {"dp_replicate": mesh.sharding.get_group(0), "shard": mesh.sharding.get_group(1)}
    for axis in (mesh.world, mesh.tp, mesh.cp, mesh.pp, mesh.ends):
        if axis is not None and axis.group is not None:
            groups[axis.name] = axis.group
    found: dict[str, float] = defaultdict(float)
    for name, size in by_axis.items():
        found[groups[name].group_name] += size
    return dict(found)
