"""torch's distributed checkpoint over the folder of `format.py`: planners decide who writes and reads what.

They shard, deduplicate replicas and reshard on load (`planners.py`); these two classes only move bytes.
torch's own file storage is not used because it keeps its metadata as a pickle and has no checksums.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import isal_zlib
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .format import Chunk, Index, TensorEntry, read_bytes, read_index, write_index


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor in row-major order: uint8, sharing its memory where it lies on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_chunk(folder: Path, entry: TensorEntry, chunk: Chunk) -> torch.Tensor:
    """The verified tensor of a chunk, of its sizes; raises DamagedCheckpoint."""
    data = read_bytes(folder, chunk)
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if not data:
        return torch.empty(chunk.sizes, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(chunk.sizes)


class FolderWriter(StorageWriter):
    """Writes one checkpoint into `folder`; `commit(folder)` is called on the coordinator when all of it is
    durable.
    """

    def __init__(self, folder: Path, progress: dict[str, Any], commit: Callable[[Path], None]) -> None:
        self._folder = folder
        self._progress = progress
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints: a writer writes one."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder before any rank writes."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """No change: the planner's items are written as they are."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each writer its own file."""
        return [replace(plan, storage_data=f"rank-{writer:05d}.bin") for writer, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks and make them durable."""
        results = []
        with open(self._folder / plan.storage_data, "wb") as file:
            for item in plan.items:
                if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                    raise TypeError(
                        f"{item.index.fqn}: only tensors are stored; plain values belong into progress"
                    )
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), "checked above"
                data = tensor_bytes(tensor).data
                box = item.tensor_data.chunk
                place = Chunk(
                    offsets=tuple(box.offsets),
                    sizes=tuple(box.sizes),
                    file=plan.storage_data,
                    start=file.tell(),
                    length=len(data),
                    crc32=isal_zlib.crc32(data),
                )
                file.write(data)
                results.append(WriteResult(index=item.index, size_in_bytes=len(data), storage_data=place))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after every rank has written: seal the index and commit."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for result in (r for rank_results in results for r in rank_results):
            chunks[result.index.fqn].append(result.storage_data)
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = TensorEntry(dtype, tuple(entry.size), tuple(chunks[name]))
        write_index(self._folder, Index(self._progress, tensors))
        self._commit(self._folder)

    def storage_meta(self) -> StorageMeta | None:
        """Nothing that the planner needs."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders are given to the constructor, not by id."""
        return False


class ReadOnly(StorageReader):
    """What all our readers leave to torch's planners."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints: a reader reads one."""

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """No change: the planner's items are read as they are."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """No change: every rank reads what it needs."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """What to read is given to the constructor, not by id."""
        return False


def fill_items(stored: torch.Tensor, items: list[ReadItem], planner: LoadPlanner) -> None:
    """Copy out of a stored box what each of `items` overlaps with."""
    for item in items:
        part = stored
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)


class FolderReader(ReadOnly):
    """Reads a checkpoint folder under any layout; raises DamagedCheckpoint rather than give a wrong byte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: Index | None = None

    @property
    def index(self) -> Index:
        """The verified index, read once."""
        if self._index is None:
            self._index = read_index(self._folder)
        return self._index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's words."""
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[TensorEntry, Chunk]] = {}
        for name, entry in self.index.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=getattr(torch, entry.dtype))
            described[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
            places |= {MetadataIndex(name, chunk.offsets): (entry, chunk) for chunk in entry.chunks}
        return Metadata(state_dict_metadata=described, storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep where the coordinator found each chunk."""
        self._places: dict[MetadataIndex, tuple[TensorEntry, Chunk]] = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Verify each needed chunk whole, then copy the part of it; one chunk is in memory at a time."""
        wanted: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)].append(item)
        for where, items in wanted.items():
            entry, chunk = self._places[where]
            fill_items(read_chunk(self._folder, entry, chunk), items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done
