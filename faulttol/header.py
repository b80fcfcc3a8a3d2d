"""The header of a file of state in memory: what it holds, of which step, and whether it can be trusted.

One page says what the file is, words in it change while a run lives (a version, the same again, a state, and
those by which a rank and its node's vault tell each other what to keep, see `pins.py`), two record areas say
what the data is, a table has a crc32 for each chunk, an index the boxes in it; then comes data:

    0        magic, format, kind, run key, crc        never changes after the file is made
    1024     version | version again | state          8-byte words, each in a cache line of its own
             | kept | awaited | due | written         of a rank's first slot; a step and 1, or 0
    4096     record 0, record 1                       step, epoch, lengths, crcs, progress, and its own crc
    36 KiB   crc32 of every chunk of 4 MiB            slots only: the data of an arena changes all the time
    292 KiB  index, compressed JSON                   PartIndex of everything in the data
    2 MiB    data

A version is odd while data is being changed. Record `version / 2 % 2` describes the data of an even version,
so the record of the next version is written beside the valid one and becomes valid by one store. Order of the
stores:

    tear:     version = v + 1, again = v + 1, then data
    publish:  the other record, version = v + 2, again = v + 2

A process that is killed leaves the memory as its last store left it, on every processor; so at any
instruction the file is either of an even version whose record and data are whole, or at least one of the two
words is odd or they differ by more than one publish. Readers in other processes also need loads and stores to
be seen in order. x86 does that for ordinary stores; other processors do not, where a reader is safe only once
the writer has stopped, or by the crc of chunks. A word twice, states far apart in Hamming distance and a crc
over all else make a flipped bit a refusal. Words are stored in the machine's order, which is little-endian
everywhere torch runs.
"""

import json
import mmap
import struct
from dataclasses import dataclass
from typing import Any

from isal import isal_zlib

MAGIC = b"RAYFOLD\x00"
FORMAT = 2
KINDS = {1: "arena", 2: "slot", 3: "blob"}
CHUNK_BYTES = 4 << 20
PAGE_BYTES = 4096
WORDS_START = 1024
WORDS_BYTES = 448
RECORDS_START = PAGE_BYTES
RECORD_BYTES = 16 << 10
TABLE_START = RECORDS_START + 2 * RECORD_BYTES
TABLE_BYTES = 256 << 10  # 65,536 chunks: 256 GiB a file
INDEX_START = TABLE_START + TABLE_BYTES
HEADER_BYTES = 2 << 20
INDEX_BYTES = HEADER_BYTES - INDEX_START

EMPTY, FILLING, SEALED, COMMITTED, LIVE = "EMPTY", "FILLING", "SEALED", "COMMITTED", "LIVE"
# As 8 letters each: no single flipped bit makes one of another.
_STATES = {
    name: int.from_bytes(name.encode()[:8].ljust(8, b"."), "little")
    for name in (EMPTY, FILLING, SEALED, COMMITTED, LIVE)
}
_NAMES = {word: name for name, word in _STATES.items()}
_STATIC = struct.Struct("<8sIIH202s")
_RECORD = struct.Struct("<QqqQQII64sI")
_CRC = struct.Struct("<I")
PINS_START, PINS_BYTES = WORDS_START + 192, 256  # of it, which change while the data stays as it is
_VERSION, _AGAIN, _STATE, _KEPT, _AWAITED, _DUE, _WRITTEN = range(0, 56, 8)  # in words


class ImageError(Exception):
    """A file of state in memory cannot be used.

    ├── DamagedImage   bytes are not what was written
    ├── TornImage      its writer is, or died, in the middle of changing it
    └── ArenaError     an arena or a slot is used in a way that it cannot be
    """


class DamagedImage(ImageError):
    """Bytes are missing or not those that were written; the message names the file and the place."""


class TornImage(ImageError):
    """The content is between two steps: its writer is changing it, or died doing so."""


class ArenaError(ImageError):
    """A call that the arena, slot or capture cannot carry out as it stands."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the data of one even version is."""

    step: int
    epoch: int = 0
    used: int = 0  # bytes of data
    index_length: int = 0
    index_crc: int = 0
    table_crc: int = 0
    fingerprint: str = ""
    progress: dict[str, Any]

    def encode(self, version: int, path: str) -> bytes:
        """The bytes of a record area; ArenaError where they do not fit."""
        progress = json.dumps(self.progress, separators=(",", ":"), allow_nan=False).encode()
        fingerprint = self.fingerprint.encode()
        room = RECORD_BYTES - _RECORD.size - _CRC.size
        if len(progress) > room or len(fingerprint) > 64:
            raise ArenaError(
                f"{path}: the progress of step {self.step} is {len(progress)} bytes and the fingerprint "
                f"{len(fingerprint)}; a header has room for {room} and 64. Keep large values in tensors, and "
                f"give a digest as the fingerprint."
            )
        numbers = (self.index_length, self.index_crc, self.table_crc)
        body = _RECORD.pack(version, self.step, self.epoch, self.used, *numbers, fingerprint, len(progress))
        body += progress
        return _CRC.pack(isal_zlib.crc32(body)) + body

    @staticmethod
    def decode(area: bytes, version: int, path: str) -> "Record":
        """The record of `version`; DamagedImage where the area does not hold exactly that."""
        where = f"{path}: record of version {version}"
        if len(area) < RECORD_BYTES:
            raise DamagedImage(f"{where} is cut off after {len(area)} of {RECORD_BYTES} bytes")
        found, step, epoch, used, length, index_crc, table_crc, name, size = _RECORD.unpack_from(area, 4)
        end = _CRC.size + _RECORD.size + size
        if end > RECORD_BYTES or isal_zlib.crc32(area[4:end]) != _CRC.unpack_from(area)[0]:
            raise DamagedImage(f"{where} does not match its crc")
        if found != version:
            raise DamagedImage(f"{where} is of version {found}")
        return Record(
            step=step,
            epoch=epoch,
            used=used,
            index_length=length,
            index_crc=index_crc,
            table_crc=table_crc,
            fingerprint=name.rstrip(b"\x00").decode(),
            progress=json.loads(area[end - size : end]),
        )


@dataclass(frozen=True)
class Words:
    """The words of the one who writes the data, as seen at one moment."""

    version: int
    again: int
    state: str  # "" for a word that is no state

    @staticmethod
    def decode(page: bytes) -> "Words":
        """From the first page of a file."""
        words = memoryview(page)[WORDS_START : WORDS_START + WORDS_BYTES].cast("Q")
        return Words(words[_VERSION], words[_AGAIN], _NAMES.get(words[_STATE], ""))

    @property
    def torn(self) -> bool:
        """Whether data may be between two versions.

        A publish between its two stores counts as torn only when it ends a change: there the second word is
        still odd.
        """
        return bool(self.version % 2 or self.again % 2)


def encode_static(kind: str, run: str) -> bytes:
    """The part of the first page that never changes."""
    key = run.encode()
    if len(key) > 202:
        raise ArenaError(f"run key {run!r} is {len(key)} bytes; a header has room for 202. Shorten it.")
    number = next(number for number, name in KINDS.items() if name == kind)
    body = _STATIC.pack(MAGIC, FORMAT, number, len(key), key)
    return body + _CRC.pack(isal_zlib.crc32(body))


def decode_static(page: bytes, path: str) -> tuple[str, str]:
    """Kind and run key; DamagedImage for anything that this format did not write."""
    if len(page) < PAGE_BYTES or page[: len(MAGIC)] != MAGIC:
        raise DamagedImage(f"{path}: does not start like an arena or a slot")
    body = page[: _STATIC.size]
    _, version, number, length, key = _STATIC.unpack(body)
    if isal_zlib.crc32(body) != _CRC.unpack_from(page, _STATIC.size)[0]:
        raise DamagedImage(f"{path}: the first page does not match its crc")
    if version != FORMAT or number not in KINDS:
        raise DamagedImage(
            f"{path}: is of format {version}, kind {number}; this version reads format {FORMAT}"
        )
    return KINDS[number], key[:length].decode()


class Header:
    """The header of a mapped file, for its one writer."""

    def __init__(self, mapping: mmap.mmap, path: str) -> None:
        self._map = mapping
        self._path = path
        # One store of 8 bytes an assignment; struct.pack_into would store byte by byte.
        self._words = memoryview(mapping)[WORDS_START : WORDS_START + WORDS_BYTES].cast("Q")

    def initialise(self, kind: str, run: str, state: str) -> None:
        """Make a new file's header: torn, with nothing in it."""
        self._words[_VERSION] = self._words[_AGAIN] = 1
        self.state = state
        static = encode_static(kind, run)
        self._map[: len(static)] = static

    def close(self) -> None:
        """Let go of the mapping."""
        self._words.release()

    @property
    def version(self) -> int:
        """Odd while data is being changed."""
        return self._words[_VERSION]

    @property
    def words(self) -> Words:
        """All three."""
        return Words.decode(self._map[:RECORDS_START])

    @property
    def state(self) -> str:
        """One of the states, or "" for a damaged word."""
        return _NAMES.get(self._words[_STATE], "")

    @state.setter
    def state(self, name: str) -> None:
        self._words[_STATE] = _STATES[name]

    @property
    def kept(self) -> int:
        """The step that a rank keeps for its node's vault, -1: none."""
        return self._words[_KEPT] - 1

    @kept.setter
    def kept(self, step: int) -> None:
        self._words[_KEPT] = step + 1

    @property
    def awaited(self) -> int:
        """The rank keeps its first committed step from this one on as well, -1: none."""
        return self._words[_AWAITED] - 1

    @awaited.setter
    def awaited(self, step: int) -> None:
        self._words[_AWAITED] = step + 1

    @property
    def due(self) -> int:
        """The step that the rank keeps until it is written to disk, -1: none. Written by the rank alone."""
        return self._words[_DUE] - 1

    @due.setter
    def due(self, step: int) -> None:
        self._words[_DUE] = step + 1

    @property
    def written(self) -> int:
        """The newest due step that the vault has written to disk, or given up; -1: none."""
        return self._words[_WRITTEN] - 1

    @written.setter
    def written(self, step: int) -> None:
        self._words[_WRITTEN] = step + 1

    def tear(self) -> None:
        """From now on the data may change; returns when that stands in the file. Twice is as good as once."""
        odd = self._words[_VERSION] | 1
        self._words[_VERSION] = odd
        self._words[_AGAIN] = odd

    def publish(self, record: Record) -> None:
        """Declare the data to be what `record` says."""
        # Up to the next even version from a torn one, and past it where the data did not change.
        version = (self._words[_VERSION] | 1) + 1
        area = record.encode(version, self._path)
        start = RECORDS_START + version // 2 % 2 * RECORD_BYTES
        self._map[start : start + len(area)] = area
        self._words[_VERSION] = version
        self._words[_AGAIN] = version

    def record(self) -> Record:
        """What the data is. Raises TornImage, DamagedImage."""
        words = self.words
        check_words(words, self._path)
        start = RECORDS_START + words.version // 2 % 2 * RECORD_BYTES
        return Record.decode(self._map[start : start + RECORD_BYTES], words.version, self._path)


def check_words(words: Words, path: str) -> None:
    """Raise TornImage or DamagedImage unless the words are those of an even version."""
    if words.torn:
        raise TornImage(f"{path}: its writer is, or died, in the middle of version {words.version}")
    # One publish apart: killed between the two stores of a publish that changed no data.
    if words.version != words.again and words.version != words.again + 2:
        raise DamagedImage(f"{path}: its two versions {words.version} and {words.again} are no pair")
