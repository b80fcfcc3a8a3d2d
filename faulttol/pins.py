"""A vault's side of pins: which step the ranks of a node shall keep, and what they hold of it.

Steps pass quickly: a step that has been seen may be overwritten before anybody can say that it is wanted.
So a vault does not pin what is there. It writes a step of the near future into the first slot of each of its
ranks; the first step from there on that a rank commits is then never filled again, without another word, and
as all ranks commit the same steps it is the same one on all nodes. Only `settle` lets go of it.

What goes to disk is pinned the other way round: the rank knows which steps are due, says so before it copies
one, and keeps it until the vault says in its turn that it is written. Neither side needs to be there in time.

The words are read and written without locks, and the rank that fills slots does not wait. A rank that was
just choosing a slot may overlook a new word; `still_there` tells, and then the round comes to nothing.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from .header import (
    CHUNK_BYTES,
    COMMITTED,
    HEADER_BYTES,
    PINS_BYTES,
    PINS_START,
    SEALED,
    DamagedImage,
    Header,
    ImageError,
    Record,
)
from .image import Image
from .placement import block_ranges
from .slots import first_from

BLOCK_ALIGN = 4096  # bytes: blocks of a node begin at pages


@dataclass(frozen=True)
class Held:
    """What a node holds of a pinned step: the used parts of slot files, one behind the other, in blocks."""

    files: tuple[tuple[str, int], ...] = ()  # name, bytes from its start
    blocks: tuple[tuple[int, int, int], ...] = ()  # start, bytes, crc32


class Pins:
    """The slots of `ranks`, whose files are in `folder`, as far as they were written in `epoch`; None: in any
    epoch, as what a rank keeps of an earlier one is what it went on from.
    """

    def __init__(self, folder: Path, ranks: Sequence[int], epoch: int | None) -> None:
        self._ranks = {rank: sorted(folder.glob(f"rank-{rank:05d}.slot-*")) for rank in ranks}
        self._folder = folder
        self._epoch = epoch

    def newest(self) -> int | None:
        """The newest step that some rank has committed, -1 without a rank; None where one has none yet."""
        found = [max(self._committed(rank), default=-1) for rank in self._ranks]
        return None if -1 in found else max(found, default=-1)

    def wait_for(self, step: int) -> None:
        """Have every rank keep its first committed step from `step` on."""
        for slots in self._ranks.values():
            for path in slots[:1]:
                with header_of(path) as header:
                    header.awaited = step

    def reached(self, step: int) -> set[int] | None:
        """The steps that ranks keep because of `wait_for(step)`; None while one has none."""
        steps = {first_from(step, self._committed(rank)) for rank in self._ranks}
        return None if -1 in steps else steps

    def due(self) -> int | None:
        """The newest step that a rank says it keeps until it is on disk; None where none does."""
        found = (self._due_of(slots) for slots in self._ranks.values())
        return max((step for step in found if step is not None), default=None)

    def passed(self, step: int) -> bool:
        """Whether every rank has committed `step` or a later one. A rank that has not kept it then, as its
        copy failed or its file was removed, never will.
        """
        return all(max(self._committed(rank), default=-1) >= step for rank in self._ranks)

    def wrote(self, step: int) -> None:
        """Let go of `step`, which is on disk or will not be; where another is due by now, nothing happens."""
        for slots in self._ranks.values():
            for path in slots[:1]:
                with header_of(path) as header:
                    if header.due == step:
                        header.written = step

    def whole(self) -> set[int]:
        """The steps that every rank has a whole copy of, whether they know that of one another or not."""
        each = [{record.step for record, _ in self._records(rank, SEALED, COMMITTED)} for rank in self._ranks]
        return set.intersection(*each) if each else set()

    def image_of(self, rank: int, step: int) -> Path:
        """The whole copy of a step, of the latest epoch. Raises DamagedImage where there is none."""
        records = self._records(rank, SEALED, COMMITTED)
        found = [(record.epoch, path) for record, path in records if record.step == step]
        if not found:
            raise DamagedImage(f"{self._folder}: rank {rank} has no copy of step {step}")
        return max(found)[1]

    def held(self, step: int, *, blocks: int) -> Held:
        """What there is of a step, verified, in that many blocks. Raises DamagedImage where it is damaged."""
        files = []
        for rank in sorted(self._ranks):
            path = self.image_of(rank, step)
            image = Image.open(path)
            for start in range(0, image.nbytes, CHUNK_BYTES):
                image.read(start, min(CHUNK_BYTES, image.nbytes - start))
            files.append((path.name, HEADER_BYTES + image.nbytes))
        total = sum(size for _, size in files)
        made = []
        for start, length in block_ranges(total, blocks, align=BLOCK_ALIGN):
            crc = 0
            for at in range(start, start + length, CHUNK_BYTES):
                crc = isal_zlib.crc32(
                    read_span(self._folder, files, at, min(CHUNK_BYTES, start + length - at)), crc
                )
            made.append((start, length, crc))
        return Held(tuple(files), tuple(made))

    def still_there(self, step: int) -> bool:
        """Whether every rank has committed `step` and holds it."""
        return all(step in self._committed(rank) for rank in self._ranks)

    def settle(self, step: int | None) -> None:
        """Wait for no step any more, and keep `step` instead of the one that was kept; -1: none, None: that
        one still.
        """
        for slots in self._ranks.values():
            for path in slots[:1]:
                with header_of(path) as header:
                    if step is not None:
                        header.kept = step  # before the other word goes, or it could be overwritten meanwhile
                    header.awaited = -1

    def _committed(self, rank: int) -> list[int]:
        return [record.step for record, _ in self._records(rank, COMMITTED)]

    def _records(self, rank: int, *states: str) -> Iterator[tuple[Record, Path]]:
        """What the slots of a rank hold in one of `states`, as far as it is of the epoch."""
        for path in self._ranks[rank]:
            record = _record(path, states)
            if record is not None and self._epoch in (None, record.epoch):
                yield record, path

    @staticmethod
    def _due_of(slots: Sequence[Path]) -> int | None:
        if not slots:
            return None  # not made yet
        with header_of(slots[0]) as header:
            return header.due if header.due > header.written else None


def read_span(folder: Path, files: Sequence[tuple[str, int]], start: int, length: int) -> bytes:
    """Bytes [start, start + length) of files laid one behind the other, without the pins that lie in their
    headers: those go on changing. Raises DamagedImage, OSError.
    """
    pieces, begin = [], 0
    for name, size in files:
        first, last = max(start, begin), min(start + length, begin + size)
        if first < last:
            fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                pieces.append(_without_pins(os.pread(fd, last - first, first - begin), first - begin))
            finally:
                os.close(fd)
        begin += size
    found = b"".join(pieces)
    if len(found) != length:
        raise DamagedImage(f"{folder}: {length} bytes at {start} of {len(files)} files are not all there")
    return found


def _without_pins(piece: bytes, start: int) -> bytes:
    first, last = max(PINS_START - start, 0), min(PINS_START + PINS_BYTES - start, len(piece))
    return piece[:first] + bytes(last - first) + piece[last:] if first < last else piece


@contextmanager
def header_of(path: Path) -> Iterator[Header]:
    """The header of a rank's file, to write pins into. Raises OSError, DamagedImage."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < HEADER_BYTES:
            raise DamagedImage(f"{path}: is shorter than a header")
        with mmap.mmap(fd, HEADER_BYTES) as mapping:
            header = Header(mapping, str(path))
            try:
                yield header
            finally:
                header.close()
    finally:
        os.close(fd)


def _record(path: Path, states: Sequence[str]) -> Record | None:
    try:
        with header_of(path) as header:
            return header.record() if header.state in states else None
    except (ImageError, OSError):
        return None  # being filled, or gone
