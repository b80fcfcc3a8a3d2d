"""Process groups of a layout: one `FoldedMesh` value, passed to whoever communicates."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .layout import Layout


@dataclass(frozen=True)
class FoldedMesh:
    """The ranks of a run seen along each axis.

    `dense` has the axes (dp_replicate, dp_shard), dp_shard innermost so that the ranks that gather parameters
    in every block are neighbours. `data` holds all ranks that read different samples; loss and token counts
    are summed over it.
    """

    layout: Layout
    dense: DeviceMesh
    data: dist.ProcessGroup
    device: torch.device

    @property
    def data_rank(self) -> int:
        """This rank's place among the readers of different samples."""
        return dist.get_rank(self.data)


def make_mesh(layout: Layout, device: torch.device) -> FoldedMesh:
    """Split the default process group along the axes of `layout`.

    The default group must be initialised and hold `layout.world_size` ranks.
    """
    ranks = dist.get_world_size()
    assert ranks == layout.world_size, (
        f"layout {layout} needs {layout.world_size} ranks, the group has {ranks}"
    )
    axes = ("dp_replicate", "dp_shard")
    dense = init_device_mesh(device.type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=axes)
    everyone = dist.group.WORLD
    assert everyone is not None, "the default process group is initialised above"
    return FoldedMesh(layout=layout, dense=dense, data=everyone, device=device)
