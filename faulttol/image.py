"""An image: an arena, a slot or a stored copy of one, seen as a source of verified bytes and tensors of one
step.

Files are read with `pread` into memory of the reader's own and verified there: what is handed out can no
longer change under the reader, and a file that was cut short is an error instead of a SIGBUS. A slot's bytes
are verified by the crc of every chunk that they touch, against the table as it was when the image was opened,
so a slot that is refilled meanwhile is a DamagedImage. An arena has no crc; its version must be the same
before and after each read. Only what makes tensors imports torch: vaults read images and are light.
"""

import json
import math
import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import isal_zlib

from .header import (
    CHUNK_BYTES,
    COMMITTED,
    EMPTY,
    FILLING,
    HEADER_BYTES,
    INDEX_BYTES,
    INDEX_START,
    LIVE,
    PAGE_BYTES,
    RECORD_BYTES,
    RECORDS_START,
    SEALED,
    TABLE_START,
    ArenaError,
    DamagedImage,
    Record,
    TornImage,
    Words,
    check_words,
    decode_static,
)
from .scatter import read_scattered

if TYPE_CHECKING:
    import torch

_LOOKS = (
    64  # at a header that changes meanwhile; a publish takes microseconds: a second look nearly always does
)


@dataclass(frozen=True)
class PartIndex:
    """Where one box of a whole tensor lies in the data."""

    name: str
    dtype: str  # as torch says it, without "torch."
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]  # of the box in the whole
    sizes: tuple[int, ...]  # of the box
    start: int  # of its bytes in the data
    length: int  # in bytes

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype; ArenaError for a name that torch does not know."""
        import torch

        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ArenaError(f"{self.name}: torch {torch.__version__} has no dtype {self.dtype!r}")
        return dtype


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a header says, without a look at the data."""

    path: str
    kind: str  # "arena", "slot" or "blob"
    run: str
    state: str  # LIVE for arenas; EMPTY, FILLING, SEALED or COMMITTED for slots and blobs
    torn: bool
    version: int
    nbytes: int  # of room for data
    step: int = -1  # -1 where there is no whole step
    epoch: int = -1
    fingerprint: str = ""
    used: int = 0  # bytes of data
    progress: dict[str, Any]

    @property
    def usable(self) -> bool:
        """Whether a run may start from it."""
        return not self.torn and self.state in (LIVE, SEALED, COMMITTED) and self.step >= 0


def encode_index(parts: Sequence[PartIndex], allocations: Sequence[Sequence[Any]] = ()) -> bytes:
    """The bytes of an index; ArenaError where a header has no room for them.

    `allocations` are (start, bytes, dtype) of the arena that the parts lie in.
    """
    value = {"parts": [astuple(part) for part in parts], "allocations": [list(a) for a in allocations]}
    data = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    if len(data) > INDEX_BYTES:
        raise ArenaError(
            f"the index of {len(parts)} parts is {len(data)} bytes compressed; a header has room for "
            f"{INDEX_BYTES}. Cut the model into fewer tensors or over more ranks."
        )
    return data


def decode_index(data: bytes) -> tuple[list[PartIndex], list[tuple[int, int, str]]]:
    """Parts and allocations of an index whose crc has been checked."""
    if not data:
        return [], []
    value = json.loads(zlib.decompress(data))
    parts = [
        PartIndex(name, dtype, tuple(shape), tuple(offsets), tuple(sizes), start, length)
        for name, dtype, shape, offsets, sizes, start, length in value["parts"]
    ]
    return parts, [(start, length, dtype) for start, length, dtype in value["allocations"]]


class Image:
    """One readable step of an arena, a slot or a blob. `open` refuses every other."""

    def __init__(self, fd: int, info: ImageInfo, record: Record, index: bytes, table: np.ndarray) -> None:
        self._fd = fd
        self._closing = weakref.finalize(self, os.close, fd)
        self._table = table  # [chunks] uint32; empty for arenas
        self._scratch = np.empty(CHUNK_BYTES if len(table) else 0, dtype=np.uint8)
        self._in_scratch = -1  # the chunk that lies there, verified
        self.info = info
        self.index_bytes = index
        self.record = record

    @staticmethod
    def open(path: str | Path) -> "Image":
        """Raises TornImage, DamagedImage, and FileNotFoundError."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info, found = _examine(fd, str(path))
            if info.torn:
                raise TornImage(f"{path}: its writer is, or died, in the middle of version {info.version}")
            if found is None or not info.usable:
                raise DamagedImage(f"{path}: is {info.state} and holds no step")
            return Image(fd, info, *found)
        except BaseException:
            os.close(fd)
            raise

    @property
    def step(self) -> int:
        """The update after which this was the state."""
        return self.info.step

    @property
    def epoch(self) -> int:
        """The membership in which it was written."""
        return self.info.epoch

    @property
    def fingerprint(self) -> str:
        """Of the layout and the model."""
        return self.info.fingerprint

    @property
    def progress(self) -> dict[str, Any]:
        """What the run said beside the data."""
        return self.info.progress

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.info.used

    @cached_property
    def index(self) -> list[PartIndex]:
        """Everything in the data, in its order."""
        return decode_index(self.index_bytes)[0]

    def parts(self) -> list[PartIndex]:
        """The index."""
        return self.index

    def part(self, name: str) -> PartIndex:
        """The first part of that name; KeyError where there is none."""
        for part in self.index:
            if part.name == name:
                return part
        raise KeyError(f"{self.info.path}: no part {name!r} among {len(self.index)}")

    def read(self, start: int, length: int) -> memoryview:
        """Verified bytes [start, start + length) of the data, in memory of their own."""
        out = np.empty(length, dtype=np.uint8)
        self.read_into(start, out)
        return out.data

    def tensor(self, part: PartIndex) -> "torch.Tensor":
        """A part with the sizes of its box, in memory of its own, verified."""
        import torch

        if math.prod(part.sizes) * part.torch_dtype.itemsize != part.length:
            raise DamagedImage(
                f"{self.info.path}: {part.name} of sizes {list(part.sizes)} {part.dtype} has {part.length} "
                f"bytes"
            )
        tensor = torch.empty(part.sizes, dtype=part.torch_dtype)
        if part.length:
            self.read_into(part.start, tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` ([n] uint8) with the data from `start` on. Its content is undefined when this raises.

        Raises DamagedImage with the file and the chunk, TornImage for an arena that has moved on, ArenaError.
        """
        end = start + len(out)
        self.check_range(start, len(out))
        if not self.has_sums:
            self._pread(start, [out], -1)
            self._check_unmoved()
            return
        position = start
        while position < end:
            chunk = position // CHUNK_BYTES
            begin = chunk * CHUNK_BYTES
            stop = min(begin + CHUNK_BYTES, self.nbytes)
            piece = out[position - start : min(stop, end) - start]
            if len(piece) == stop - begin:  # a whole chunk needs no detour
                self.read_chunk(chunk, [piece])
            else:
                if self._in_scratch != chunk:
                    self._in_scratch = -1
                    self.read_chunk(chunk, [self._scratch[: stop - begin]])
                    self._in_scratch = chunk
                piece[:] = self._scratch[position - begin : position - begin + len(piece)]
            position += len(piece)

    @property
    def has_sums(self) -> bool:
        """Whether bytes are verified by the crc of their chunk."""
        return bool(len(self._table))

    def check_range(self, start: int, length: int) -> None:
        """Raise ArenaError where there are no such bytes."""
        if start < 0 or start + length > self.nbytes:
            raise ArenaError(
                f"{self.info.path}: no bytes {start} to {start + length}; there are {self.nbytes} of data"
            )

    def read_chunk(self, chunk: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill `buffers` ([n] uint8 each), together as long as the chunk, one after the other, and verify.

        Safe from several threads, for several chunks. Raises DamagedImage; see `read_into`.
        """
        begin = chunk * CHUNK_BYTES
        found = self._pread(begin, buffers, chunk)
        if found != self._table[chunk]:
            end = min(begin + CHUNK_BYTES, self.nbytes)
            raise DamagedImage(
                f"{self.info.path}: chunk {chunk} (bytes {begin} to {end} of the data of step "
                f"{self.step}) has crc {found:08x}, not {int(self._table[chunk]):08x}. Use another slot, a "
                f"peer's copy or a checkpoint."
            )

    def _pread(self, begin: int, buffers: Sequence[np.ndarray], chunk: int) -> int:
        """Fill `buffers` from the data at `begin`; the crc of it all, 0 where `chunk` is -1, for none."""
        done, crc = read_scattered(self._fd, HEADER_BYTES + begin, buffers, summed=chunk >= 0)
        if done < sum(map(len, buffers)):
            where = f"chunk {chunk}" if chunk >= 0 else "the data"
            raise DamagedImage(
                f"{self.info.path}: {where} is cut off at byte {begin + done} of {self.nbytes} bytes of data"
            )
        return crc

    def _check_unmoved(self) -> None:
        words = Words.decode(os.pread(self._fd, PAGE_BYTES, 0).ljust(PAGE_BYTES, b"\x00"))
        if words.torn or words.version != self.info.version:
            raise TornImage(
                f"{self.info.path}: was at version {self.info.version} when opened and is at "
                f"{words.version}: its writer goes on. Read a slot of a running rank, not its arena."
            )


def examine(path: str | Path) -> ImageInfo:
    """What the header says. Raises DamagedImage for what no arena, slot or blob of ours can be; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _examine(fd, str(path))[0]
    finally:
        os.close(fd)


def inspect(path: str | Path) -> ImageInfo | None:
    """What the header says, or None for a file that is missing, foreign or damaged."""
    try:
        return examine(path)
    except (DamagedImage, OSError):
        return None


def _examine(fd: int, path: str) -> tuple[ImageInfo, tuple[Record, bytes, np.ndarray] | None]:
    """The header, and what belongs to a whole step where it has one. All of it verified but the data."""
    for _ in range(_LOOKS):
        head = os.pread(fd, TABLE_START, 0)
        kind, run = decode_static(head, path)
        words = Words.decode(head)
        info = _outline(fd, path, kind, run, words)
        if info.torn or info.state == EMPTY:
            return info, None
        error: DamagedImage | None = None
        try:
            record, index, table = _whole_step(fd, path, head, words, has_table=kind != "arena")
        except DamagedImage as damage:
            error = damage
        # A writer that went on meanwhile explains any disagreement; look again.
        if Words.decode(os.pread(fd, PAGE_BYTES, 0).ljust(PAGE_BYTES, b"\x00")) != words:
            continue
        if error:
            raise error
        whole = replace(
            info,
            step=record.step,
            epoch=record.epoch,
            fingerprint=record.fingerprint,
            used=record.used,
            progress=record.progress,
        )
        return whole, (record, index, table)
    return replace(info, torn=True), None


def _outline(fd: int, path: str, kind: str, run: str, words: Words) -> ImageInfo:
    allowed = (LIVE,) if kind == "arena" else (EMPTY, FILLING, SEALED, COMMITTED)
    if words.state not in allowed:
        raise DamagedImage(f"{path}: the state {words.state or 'in its header'!r} is none of a {kind}'s")
    size = os.fstat(fd).st_size
    if size < HEADER_BYTES:
        raise DamagedImage(f"{path}: is cut off after {size} of {HEADER_BYTES} bytes of header")
    torn = words.torn or words.state == FILLING
    room = size - HEADER_BYTES
    return ImageInfo(
        path=path,
        kind=kind,
        run=run,
        state=words.state,
        torn=torn and words.state != EMPTY,
        version=words.version,
        nbytes=room,
        progress={},
    )


def _whole_step(
    fd: int, path: str, head: bytes, words: Words, *, has_table: bool
) -> tuple[Record, bytes, np.ndarray]:
    check_words(words, path)
    start = RECORDS_START + words.version // 2 % 2 * RECORD_BYTES
    record = Record.decode(head[start : start + RECORD_BYTES], words.version, path)
    size = os.fstat(fd).st_size
    if size < HEADER_BYTES + record.used:
        raise DamagedImage(
            f"{path}: is cut off after {size - HEADER_BYTES} of {record.used} bytes of data of step "
            f"{record.step}"
        )
    index = os.pread(fd, record.index_length, INDEX_START)
    if isal_zlib.crc32(index) != record.index_crc:
        raise DamagedImage(f"{path}: the index does not match its crc")
    chunks = -(-record.used // CHUNK_BYTES) if has_table else 0
    table = os.pread(fd, 4 * chunks, TABLE_START)
    if has_table and isal_zlib.crc32(table) != record.table_crc:
        raise DamagedImage(f"{path}: the table of {chunks} checksums does not match its crc")
    return record, index, np.frombuffer(table, dtype="<u4")
