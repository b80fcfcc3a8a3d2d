"""State out of images in memory: the same boxes by name, or any other layout's by torch's planners.

An image (`faulttol/image.py`) is one rank's state at one step. A rank under the same layout finds its own
boxes in one; under another layout every rank reads what its boxes overlap with, from any that has it.
Every byte is verified; where a box lies in several images, a damaged one is passed over.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..faulttol.choice import Source
from ..faulttol.filling import fill
from ..faulttol.header import DamagedImage, ImageError
from ..faulttol.image import Image, PartIndex
from ..parallel.collectives import gather_json
from ..parallel.mesh import FoldedMesh
from .checkpoint.storage import ReadOnly, fill_items
from .part import Part
from .place import SnapshotPlace


@dataclass(frozen=True)
class Entry:
    """What one image holds."""

    parts: Sequence[PartIndex]
    progress: Mapping[str, Any]


Catalogue: TypeAlias = Mapping[str, Entry]  # by where the image lies


class ImagesLost(RuntimeError):
    """Images do not hold what they were chosen for; the message says which and what is wrong."""

    def __init__(self, message: str, where: tuple[str, ...] = ()) -> None:
        super().__init__(message, where)  # both, as they cross processes
        self.where = where

    def __str__(self) -> str:
        return str(self.args[0])


def fill_from(image: Image, parts: Sequence[Part]) -> None:
    """Copy into each of `parts` its own box; ImagesLost where the image has no such box, ImageError."""
    found = {(part.name, part.offsets, part.sizes): part for part in image.parts()}
    pieces = []
    for part in parts:
        if part.tensor.numel():
            key = part.name, part.offsets, part.sizes
            if key not in found:
                raise ImagesLost(
                    f"{image.info.path} holds no {part.name} {list(part.sizes)} at {part.offsets}"
                )
            if (memory := _memory_for(part.tensor, found[key])) is not None:
                pieces.append((found[key].start, memory))
            else:
                part.tensor.copy_(image.tensor(found[key]))
    fill(image, pieces)


def _memory_for(tensor: torch.Tensor, part: PartIndex) -> np.ndarray | None:
    """The memory that the bytes of `part` belong into; None where they do not lie in `tensor` as they are."""
    alike = tensor.dtype == part.torch_dtype and tensor.nbytes == part.length
    if not alike or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    memory: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memory


def read_catalogue(images: Sequence[Source], place: SnapshotPlace, mesh: FoldedMesh) -> Catalogue:
    """What the images hold: each index is read by one rank, where the image lies, and told to all.

    Raises ImagesLost on all ranks when one cannot be read.
    """
    nodes = gather_json(place.node, mesh.world, mesh.device)
    readers = [
        nodes.index(node) if (node := image.where.partition(":")[0]) in nodes else number % len(nodes)
        for number, image in enumerate(images)
    ]
    own: dict[str, Any] = {}
    for image, reader in zip(images, readers, strict=True):
        if reader == mesh.world.rank:
            try:
                opened = place.open(image.where)
                if opened.step != image.step:
                    raise DamagedImage(f"{image.where} is at step {opened.step} by now, not {image.step}")
                own[image.where] = [[astuple(part) for part in opened.parts()], opened.progress]
            except (ImageError, OSError) as error:
                own[image.where] = str(error)
    told = {k: v for every in gather_json(own, mesh.world, mesh.device) for k, v in every.items()}
    if lost := {where: problem for where, problem in told.items() if isinstance(problem, str)}:
        raise ImagesLost("; ".join(lost.values()), tuple(lost))
    return {where: Entry([_part(part) for part in parts], said) for where, (parts, said) in told.items()}


def _part(values: Sequence[Any]) -> PartIndex:
    name, dtype, shape, offsets, sizes, start, length = values
    return PartIndex(name, dtype, tuple(shape), tuple(offsets), tuple(sizes), start, length)


class ImagesReader(ReadOnly):
    """Reads the images of a catalogue under any layout, those on this node first."""

    def __init__(self, catalogue: Catalogue, place: SnapshotPlace) -> None:
        self._place = place
        self._held: dict[MetadataIndex, list[tuple[str, PartIndex]]] = defaultdict(list)
        near = place.where(place.folder).partition(":")[0] + ":"
        for where in sorted(catalogue, key=lambda where: not where.startswith(near)):
            for part in catalogue[where].parts:
                if part.length or 0 in part.shape:
                    self._held[MetadataIndex(part.name, part.offsets)].append((where, part))
        self._open: dict[str, Image] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every box once, in torch's words."""
        boxes: dict[str, list[PartIndex]] = defaultdict(list)
        for held in self._held.values():
            boxes[held[0][1].name].append(held[0][1])
        described: dict[str, Any] = {}
        for name, parts in boxes.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in parts]
            properties = TensorProperties(dtype=parts[0].torch_dtype)
            described[name] = TensorStorageMetadata(properties, torch.Size(parts[0].shape), chunks)
        return Metadata(state_dict_metadata=described)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what overlaps; one box is in memory at a time."""
        wanted: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)].append(item)
        for where, items in wanted.items():
            fill_items(self._read(where), items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, index: MetadataIndex) -> torch.Tensor:
        problems = []
        for where, part in self._held[index]:
            try:
                if where not in self._open:
                    self._open[where] = self._place.open(where)
                return self._open[where].tensor(part)
            except (ImageError, OSError) as error:
                problems.append(str(error))
        raise ImagesLost("; ".join(problems), tuple(where for where, _ in self._held[index]))
