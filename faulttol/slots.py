"""Slots: copies of an arena at the end of an update, kept beside it while the run goes on.

    EMPTY -> FILLING -> SEALED -> COMMITTED -> FILLING ...

SEALED: every byte is here, each chunk of 4 MiB with its crc32. COMMITTED: the run knows that every rank has
sealed this step. The newest COMMITTED slot is never filled again, so there is always a step that all ranks
can go back to. A FILLING goes to a slot that holds no step, else to the oldest other one: with two slots a
step must be committed before the next one is captured, or it is overwritten; three slots allow a capture a
step with a commit one step late.

The vault of a node may pin steps (words in the header of the first slot, which the rank only reads): the one
that it has protected, and the next one that it is about to protect. The rank itself pins one that is due on
disk until the vault says that it is written. Their slots are not filled either, as long as one is left to
fill: what is on its way to disk comes before what is to be protected next. While the newest COMMITTED is in
the only slot left, that one is filled: the pinned ones are steps that all ranks can go back to.
"""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from .files import make_file, map_file
from .header import (
    CHUNK_BYTES,
    COMMITTED,
    EMPTY,
    FILLING,
    HEADER_BYTES,
    INDEX_START,
    SEALED,
    TABLE_BYTES,
    TABLE_START,
    ArenaError,
    DamagedImage,
    Header,
    Record,
    TornImage,
)


class Slot:
    """One slot or blob for its one writer. `Image.open(slot.path)` reads it."""

    def __init__(self, mapping: mmap.mmap, path: Path) -> None:
        self.path = path
        self._map = mapping
        self._header = Header(mapping, str(path))
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)[HEADER_BYTES:]
        self._table = np.frombuffer(mapping, dtype="<u4", count=TABLE_BYTES // 4, offset=TABLE_START)
        self._index_crc = -1  # of what lies in the index area, -1 where it is not known
        self._index_length = 0
        self._used = 0
        self._held: tuple[int, Record | None] = -1, None  # what the header said, and at which version

    @staticmethod
    def create(path: str | Path, nbytes: int, *, run: str = "", kind: str = "slot") -> "Slot":
        """Make the file with room for `nbytes` of data. FileExistsError, or OSError when memory is full."""
        if nbytes > TABLE_BYTES // 4 * CHUNK_BYTES:
            most = TABLE_BYTES // 4 * CHUNK_BYTES
            raise ArenaError(f"{path}: {nbytes} bytes; a slot has checksums for {most}. Use more ranks.")
        make_file(Path(path), nbytes, kind=kind, run=run, state=EMPTY)
        return Slot.open(path)

    @staticmethod
    def open(path: str | Path) -> "Slot":
        """Map a file that `create` or a vault made, whatever state it is in. Raises DamagedImage for any
        other.
        """
        # its pages come with the first copy, which is made while the run trains again
        mapping, kind, _ = map_file(Path(path), populate=False)
        if kind == "arena":
            raise ArenaError(f"{path}: is an arena, not a slot")
        return Slot(mapping, Path(path))

    @property
    def nbytes(self) -> int:
        """Room for data."""
        return len(self._bytes)

    @property
    def state(self) -> str:
        """EMPTY, FILLING, SEALED or COMMITTED, or "" for a damaged word."""
        return self._header.state

    @property
    def pins(self) -> tuple[int, int]:
        """(step that is kept, step from which on the first committed one is kept); -1 for none."""
        return self._header.kept, self._header.awaited

    @property
    def due(self) -> int:
        """The step that is kept until it is on disk; -1 where none is, or it has been written."""
        due = self._header.due
        return due if due > self._header.written else -1

    @due.setter
    def due(self, step: int) -> None:
        self._header.due = step

    def forget_due(self) -> None:
        """Nothing is due, and nothing has been written; when ranks form anew, as they may have gone back."""
        self._header.due = self._header.written = -1

    def holds(self) -> Record | None:
        """The record of the whole step that is here by its header, if there is one. Data is not looked at."""
        if self.state not in (SEALED, COMMITTED):
            return None
        version = self._header.version
        if version != self._held[0]:
            try:
                self._held = version, self._header.record()
            except (TornImage, DamagedImage):
                self._held = version, None
        return self._held[1]

    @property
    def step(self) -> int:
        """Of the whole step that is here, or -1."""
        record = self.holds()
        return record.step if record else -1

    def begin(self, used: int, index: bytes) -> None:
        """FILLING from now on, for `used` bytes of data described by `index`."""
        if used > self.nbytes:
            raise ArenaError(
                f"{self.path}: {used} bytes do not fit into {self.nbytes}. "
                f"Reserve at least {used} bytes for this rank."
            )
        self._header.tear()
        self._header.state = FILLING
        crc = isal_zlib.crc32(index)
        if (crc, len(index)) != (self._index_crc, self._index_length):
            self._map[INDEX_START : INDEX_START + len(index)] = index
            self._index_crc, self._index_length = crc, len(index)
        self._used = used

    def chunks(self) -> int:
        """How many chunks this filling has."""
        return -(-self._used // CHUNK_BYTES)

    def end_of(self, chunk: int) -> int:
        """Where a chunk ends in the data."""
        return min((chunk + 1) * CHUNK_BYTES, self._used)

    def put(self, chunk: int, source: np.ndarray) -> None:
        """Copy a chunk ([n] uint8, all of it) here and take its crc while it is in the cache."""
        begin = chunk * CHUNK_BYTES
        target = self._bytes[begin : self.end_of(chunk)]
        np.copyto(
            target, source
        )  # numpy and the sum let other threads run meanwhile; an assigned slice would not
        self._table[chunk] = isal_zlib.crc32(target.data)

    def put_at(self, start: int, source: np.ndarray) -> None:
        """Copy any bytes here; `sum_chunk` takes the crc of a chunk when it has all of its bytes."""
        np.copyto(self._bytes[start : start + len(source)], source)

    def sum_chunk(self, chunk: int) -> None:
        """Take the crc of a chunk as it lies here."""
        begin = chunk * CHUNK_BYTES
        self._table[chunk] = isal_zlib.crc32(self._bytes[begin : self.end_of(chunk)].data)

    def seal(self, *, step: int, epoch: int, fingerprint: str, progress: dict[str, Any]) -> None:
        """SEALED: what was put since `begin` is whole."""
        record = Record(
            step=step,
            epoch=epoch,
            used=self._used,
            index_length=self._index_length,
            index_crc=self._index_crc,
            table_crc=isal_zlib.crc32(self._table[: self.chunks()].data),
            fingerprint=fingerprint,
            progress=progress,
        )
        self._header.publish(record)
        self._held = self._header.version, record
        self._header.state = SEALED

    def commit(self) -> None:
        """SEALED -> COMMITTED."""
        if self.state not in (SEALED, COMMITTED):
            raise ArenaError(
                f"{self.path}: is {self.state or 'damaged'}; only what is SEALED can be committed"
            )
        self._header.state = COMMITTED

    def empty(self) -> None:
        """EMPTY: whatever was here is given up."""
        self._header.tear()
        self._header.state = EMPTY


class Slots:
    """The slots of one rank: where the next copy goes, what is sealed and what is committed."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        if len(slots) < 2:
            raise ArenaError(
                f"{len(slots)} slots: while one is filled another must hold a whole step. Give 2 or more."
            )
        self.slots = tuple(slots)

    @staticmethod
    def open(paths: Sequence[str | Path]) -> "Slots":
        """Map the files that a vault reserved; what they hold stays."""
        return Slots([Slot.open(path) for path in paths])

    @property
    def there(self) -> list[Slot]:
        """The slots whose files are there: what is copied to another, nobody else would find."""
        return [slot for slot in self.slots if slot.path.exists()] or list(self.slots)

    def committed(self) -> Slot | None:
        """The newest COMMITTED slot: of the latest epoch, and of its steps the latest."""
        return _newest(self.there, COMMITTED)

    def sealed(self) -> Slot | None:
        """The newest slot that holds a whole step, committed or not."""
        return _newest(self.there, SEALED, COMMITTED)

    def find(self, step: int) -> Slot | None:
        """The slot of the latest epoch that holds `step`."""
        return _find(self.there, step)

    def next_to_fill(self) -> Slot:
        """Any slot that holds no step, else the oldest that is neither pinned nor the newest COMMITTED."""
        there = self.there  # looked for once: this is on the way of a step
        newest, pinned = _newest(there, COMMITTED), _pinned(there)[: len(there) - 1]
        free = [slot for slot in there if slot not in pinned]
        return min([slot for slot in free if slot is not newest] or free, key=_age)

    @property
    def due(self) -> int:
        """The step that is kept until it is on disk, -1 where none is."""
        return self.there[0].due

    @due.setter
    def due(self, step: int) -> None:
        self.there[0].due = step

    def forget_due(self) -> None:
        """As `Slot.forget_due`."""
        self.there[0].forget_due()

    def commit(self, step: int) -> bool:
        """Mark the slot of `step` COMMITTED; False where no slot holds it any more."""
        slot = self.find(step)
        if slot is None:
            return False
        slot.commit()
        return True

    def discard_after(self, step: int) -> None:
        """Give up steps beyond `step`: a run that went back to it will make them again, perhaps otherwise."""
        for slot in self.there:
            if slot.step > step:
                slot.empty()


def first_from(awaited: int, steps: Iterable[int]) -> int:
    """The smallest of `steps` from `awaited` on, -1 where there is none."""
    return min((step for step in steps if step >= awaited), default=-1)


def _newest(slots: Iterable[Slot], *states: str) -> Slot | None:
    return max((slot for slot in slots if slot.state in states and slot.holds()), key=_age, default=None)


def _find(slots: Iterable[Slot], step: int) -> Slot | None:
    return max((slot for slot in slots if slot.step == step), key=_age, default=None)


def _pinned(slots: Sequence[Slot]) -> list[Slot]:
    """Those that are to be kept, what matters most first."""
    kept, awaited = slots[0].pins
    steps = [kept, slots[0].due]
    if awaited >= 0:
        committed = [slot.step for slot in slots if slot.state == COMMITTED]
        steps.append(first_from(awaited, committed))
    found = [_find(slots, step) for step in dict.fromkeys(steps) if step >= 0]
    return [slot for slot in found if slot is not None and slot.state == COMMITTED]


def _age(slot: Slot) -> tuple[int, int]:
    """Sorts slots from nothing and old to new."""
    record = slot.holds()
    return (record.epoch, record.step) if record else (-1, -1)
