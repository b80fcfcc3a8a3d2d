"""Rows of different lengths, end to end in one array: how documents travel through the pipeline.

`n` rows, `T` elements in all. No Python object per row, so decoding a block costs a few array operations.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Row i is `values[offsets[i] : offsets[i + 1]]`: values [T] of integers, offsets int64 [n + 1]."""

    values: Array
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Elements of every row: int64 [n]."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Memory the two arrays take, in bytes."""
        return self.values.nbytes + self.offsets.nbytes

    def rows(self) -> Iterator[Array]:
        """Every row as a view."""
        for start, stop in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield self.values[start:stop]

    def select(self, keep: npt.NDArray[np.bool_]) -> "Ragged":
        """The rows where keep [n] is true, in order."""
        if keep.all():
            return self
        lengths = self.lengths
        return Ragged(values=self.values[np.repeat(keep, lengths)], offsets=offsets_of(lengths[keep]))

    def with_end(self, end: int, dtype: type[np.unsignedinteger[Any]]) -> "Ragged":
        """Every row followed by `end`, as `dtype`."""
        offsets = self.offsets + np.arange(len(self) + 1)
        values = np.empty(int(offsets[-1]), dtype=dtype)
        is_text = np.ones(len(values), dtype=bool)
        is_text[offsets[1:] - 1] = False
        values[is_text] = self.values
        values[offsets[1:] - 1] = end
        return Ragged(values=values, offsets=offsets)

    def crc32(self) -> int:
        """A checksum of the rows and of where each one ends."""
        return isal_zlib.crc32(self.offsets.data, isal_zlib.crc32(np.ascontiguousarray(self.values).data))

    def content_keys(self) -> npt.NDArray[np.uint64]:
        """A 64-bit hash of every row's bytes: uint64 [n]."""
        digests = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in self.rows())
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def offsets_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Lengths [n] to offsets [n + 1]."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)


def ragged_of(rows: Sequence[bytes]) -> Ragged:
    """Byte strings as rows of uint8."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    return Ragged(values=np.frombuffer(b"".join(rows), dtype=np.uint8), offsets=offsets_of(lengths))


def join_ragged(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, in order; no parts give no rows of uint8."""
    if not parts:
        return ragged_of([])
    if len(parts) == 1:
        return parts[0]
    return Ragged(
        values=np.concatenate([part.values for part in parts]),
        offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
    )
