"""torch's checkpoint planners over the boxes that ranks hold (`runtime/part.py`).

torch's own local plans are made from tensors and DTensors, and a DTensor cannot say that it is a shard of a
piece of a parameter. These make them from boxes. What is done with the plans of all ranks stays torch's: a
box that several ranks hold is written by one of them, the one with the least to write so far, and the boxes
of a tensor must fill it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..part import Part
from .format import DamagedCheckpoint

Parts = dict[str, list[Part]]


def by_name(parts: Iterable[Part]) -> Parts:
    """The parts of each name, as torch's `state_dict` to save or load."""
    named: Parts = {}
    for part in parts:
        named.setdefault(part.name, []).append(part)
    return named


class PartSavePlanner(DefaultSavePlanner):
    """Writes every box once, whichever ranks hold it; an empty one is not written."""

    def __init__(self) -> None:
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False
        )

    def create_local_plan(self) -> SavePlan:
        """One item for each box of this rank; copies of one box on one rank are one."""
        held = (part for parts in self.state_dict.values() for part in parts if part.at_rest)
        self._tensors = {MetadataIndex(part.name, part.offsets): part for part in held}
        return SavePlan([_write_item(index, part) for index, part in self._tensors.items()])

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor of a box."""
        return self._tensors[index].tensor


class PartLoadPlanner(DefaultLoadPlanner):
    """Reads what each box overlaps with; a name that is held twice is filled twice."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep what there is to fill and what is stored."""
        assert metadata is not None, "the reader gives the metadata of the checkpoint"
        self._stored = metadata.state_dict_metadata
        self._wanted: Parts = {
            name: [part for part in parts if part.tensor.numel()] for name, parts in state_dict.items()
        }

    def create_local_plan(self) -> LoadPlan:
        """Raises DamagedCheckpoint where the stored boxes leave a hole."""
        items = []
        for name, parts in self._wanted.items():
            stored = self._stored[name]
            assert isinstance(stored, TensorStorageMetadata), f"{name} is no tensor"
            reads = create_read_items_for_chunk_list(name, stored, [_chunk(part) for part in parts])
            found, needed = sum(math.prod(r.lengths) for r in reads), sum(p.tensor.numel() for p in parts)
            if found != needed:
                raise DamagedCheckpoint(f"the chunks of {name} hold {found} of the {needed} numbers needed")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor that a read fills; `index.index` tells copies of a box apart."""
        assert index.index is not None, "torch's list of reads numbers the boxes"
        return self._wanted[index.fqn][index.index].tensor


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes))


def _write_item(index: MetadataIndex, part: Part) -> WriteItem:
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(part),
            properties=TensorProperties.create_from_tensor(part.tensor),
            size=torch.Size(part.shape),
        ),
    )
