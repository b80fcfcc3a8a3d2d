"""An arena: the live state of one rank in a file of shared memory, which outlives the process.

Tensors are taken from it one after the other, so building the same rank under the same layout again gives
every tensor the same place, and what an earlier life left there can be adopted without a copy. `begin_update`
and `end_update` stand around every change (`header.py` says what a kill between them leaves); a change
outside them is not seen as torn, so gradients and scratch do not belong here.

A plain file and mmap, not `multiprocessing.shared_memory`: its resource tracker removes the memory when any
process that knew it ends. The pages are allocated when the file is made, because a full file system found
later is a SIGBUS.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import isal_zlib

from .files import make_file, map_file
from .filling import fill
from .header import HEADER_BYTES, INDEX_START, LIVE, ArenaError, DamagedImage, Header, Record, TornImage
from .image import Image, PartIndex, decode_index, encode_index

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Arena:
    """One rank's arena; one process writes it. Not thread-safe, but `version` may be read from any thread.

    A life of it: `adopt` (or not), `take` for every tensor, `seal_index`, then `begin_update`/`end_update`
    for ever; `rewind` before the same process builds its model again.
    """

    def __init__(self, mapping: mmap.mmap, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        self._map = mapping
        self._header = Header(mapping, str(path))
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)[HEADER_BYTES:]
        self._allocations: list[tuple[int, int, str]] = []
        self._kept: list[tuple[int, int, str]] | None = None  # of the adopted content
        self._end = 0
        self._record: Record | None = None
        self._index = b""

    @staticmethod
    def create(path: str | Path, nbytes: int, *, run: str = "") -> "Arena":
        """Make the file with room for `nbytes` of data. FileExistsError, or OSError when memory is full."""
        make_file(Path(path), nbytes, kind="arena", run=run, state=LIVE)
        return Arena.open(path)

    @staticmethod
    def open(path: str | Path) -> "Arena":
        """Map a file that `create` or a vault made. Raises DamagedImage for any other."""
        # populated at once: the first update must not pay for a fault every 4 KiB
        mapping, kind, run = map_file(Path(path), populate=True)
        if kind != "arena":
            raise ArenaError(f"{path}: is a {kind}, not an arena")
        return Arena(mapping, Path(path), run)

    @property
    def nbytes(self) -> int:
        """Room for data."""
        return len(self._bytes)

    @property
    def used(self) -> int:
        """Bytes of data taken so far."""
        return self._end

    @property
    def data(self) -> np.ndarray:
        """[used] uint8: the data itself, not a copy."""
        return self._bytes[: self._end]

    @property
    def version(self) -> int:
        """Odd while an update is under way."""
        return self._header.version

    @property
    def torn(self) -> bool:
        """Whether the content is between two steps."""
        return self._header.words.torn

    @property
    def record(self) -> Record:
        """What the content is, as last sealed or ended in this process; ArenaError before."""
        if self._record is None:
            raise ArenaError(f"{self.path}: has no step yet; call seal_index and end_update first")
        return self._record

    @property
    def index_bytes(self) -> bytes:
        """The sealed index as it lies in the header."""
        return self._index

    def adopt(self, fingerprint: str | None = None) -> bool:
        """Whether an earlier life left a whole step, of this `fingerprint` if one is given; then `take` keeps
        it.

        Call it before the first `take`. On False the content is given up by the first `take`.
        """
        if self._allocations:
            raise ArenaError(f"{self.path}: adopt() comes before take(); call rewind() first")
        try:
            image = Image.open(self.path)
        except (TornImage, DamagedImage):
            return False
        if fingerprint is not None and image.fingerprint != fingerprint:
            return False
        self._kept = decode_index(image.index_bytes)[1]
        self._record = image.record
        self._index = image.index_bytes
        return True

    @property
    def adopted(self) -> bool:
        """Whether `take` hands out content of an earlier life."""
        return self._kept is not None

    def rewind(self) -> None:
        """Hand out the same memory again from its start. The content stays until a `take` without `adopt`.

        Tensors taken before still point into it: drop them first.
        """
        self._allocations = []
        self._kept = None
        self._end = 0
        self._record = None
        self._index = b""

    def take(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """The next [numel] of the file, 64-byte aligned, and whether its content is an adopted one.

        Content that is not adopted is undefined. Raises ArenaError when the file is full, or when adopted
        content was allocated otherwise.
        """
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        length = numel * dtype.itemsize
        if start + length > self.nbytes:
            raise ArenaError(
                f"{self.path}: {length} bytes at {start} do not fit into {self.nbytes}. Reserve at least "
                f"{start + length} bytes for this rank."
            )
        allocation = (start, length, str(dtype).removeprefix("torch."))
        if self._kept is None:
            if not self._allocations:
                self._header.tear()  # whatever was here is overwritten from now on
        elif (before := self._kept[len(self._allocations) :][:1]) != [allocation]:
            raise ArenaError(
                f"{self.path}: allocation {len(self._allocations)} is {allocation}, in the adopted content "
                f"{before}: the model was built otherwise. Give adopt() a fingerprint of all that decides "
                f"the allocations, or rewind() and load."
            )
        self._allocations.append(allocation)
        self._end = start + length
        if not numel:
            return torch.empty(0, dtype=dtype), self.adopted
        return torch.frombuffer(
            self._map, dtype=dtype, count=numel, offset=HEADER_BYTES + start
        ), self.adopted

    def part(
        self, name: str, tensor: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]
    ) -> PartIndex:
        """Where `tensor`, a contiguous view of something taken, lies; it is the box at `offsets` of a whole
        of `shape`.
        """
        length = tensor.numel() * tensor.element_size()
        start = tensor.data_ptr() - self._bytes.ctypes.data if length else 0
        if not tensor.is_contiguous() or not 0 <= start <= start + length <= self._end:
            raise ArenaError(
                f"{self.path}: {name} is not a contiguous part of this arena's {self._end} bytes; "
                f"take() its memory here"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        return PartIndex(name, dtype, tuple(shape), tuple(offsets), tuple(tensor.shape), start, length)

    def seal_index(self, parts: Sequence[PartIndex], fingerprint: str, epoch: int) -> None:
        """Say what lies where, once everything is taken.

        Adopted content stays whole and becomes that of `epoch`; other content becomes whole with the next
        `end_update`. Raises ArenaError when adopted content was described otherwise.
        """
        index = encode_index(parts, self._allocations)
        numbers = {"used": self._end, "index_length": len(index), "index_crc": isal_zlib.crc32(index)}
        if self._kept is None:
            self._header.tear()
            self._map[INDEX_START : INDEX_START + len(index)] = index
            self._index = index
            self._record = Record(step=-1, epoch=epoch, fingerprint=fingerprint, progress={}, **numbers)
            return
        old = self.record
        if decode_index(index) != decode_index(self._index) or fingerprint != old.fingerprint:
            raise ArenaError(
                f"{self.path}: the adopted content of step {old.step} has another index or fingerprint "
                f"({old.fingerprint!r}, now {fingerprint!r}). Give adopt() the fingerprint, or rewind() "
                f"and load."
            )
        self._publish(old.step, epoch, old.progress)

    def begin_update(self) -> None:
        """From here to `end_update` the content is of no step."""
        self._header.tear()

    def end_update(self, step: int, progress: dict[str, Any]) -> None:
        """The content is that of `step`, with `progress` (plain JSON, at most about 16 KB) beside it."""
        if step < 0:
            raise ArenaError(f"{self.path}: step {step}; steps count from 0")
        self._publish(step, self.record.epoch, progress)

    def load(self, image: Image) -> None:
        """Copy a whole image of the same fingerprint and index here, verified, and become its step.

        Raises what reading raises; the arena is torn then.
        """
        old = self.record
        if (image.fingerprint, image.record.used) != (old.fingerprint, self._end):
            raise ArenaError(
                f"{self.path}: {image.info.path} has fingerprint {image.fingerprint!r} and {image.nbytes} "
                f"bytes, this arena {old.fingerprint!r} and {self._end}. Read it part by part instead."
            )
        self.begin_update()
        fill(image, [(0, self.data)])
        self.end_update(image.step, image.progress)

    def _publish(self, step: int, epoch: int, progress: dict[str, Any]) -> None:
        old = self.record
        record = Record(
            step=step,
            epoch=epoch,
            used=old.used,
            index_length=old.index_length,
            index_crc=old.index_crc,
            fingerprint=old.fingerprint,
            progress=progress,
        )
        self._header.publish(record)
        self._record = record
