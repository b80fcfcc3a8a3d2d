"""Reads a stretch of a file into buffers that lie anywhere, one after the other, and sums what it read."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from isal import isal_zlib

VIEWS = 512  # for one read; systems take 1,024


def read_scattered(fd: int, start: int, buffers: Sequence[np.ndarray], *, summed: bool) -> tuple[int, int]:
    """Fill `buffers` ([n] uint8 each) from byte `start` of the file on: the bytes read, fewer where the file
    ends, and their crc32, 0 unless it is to be `summed`. Holds no lock of the interpreter while it works.
    """
    done = crc = 0
    for views in _portions(buffers):
        wanted = sum(map(len, views))
        count = _read_fully(fd, start + done, views)
        done += count
        if count < wanted:
            break
        if summed:
            for view in views:
                crc = isal_zlib.crc32(view, crc)
    return done, crc


def _read_fully(fd: int, start: int, views: Sequence[memoryview]) -> int:
    rest, done = list(views), 0
    while rest and (count := os.preadv(fd, rest, start + done)):
        done += count
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
    return done


def _portions(buffers: Sequence[np.ndarray]) -> Iterator[list[memoryview]]:
    """The memory of the buffers in order, as much as one read takes at a time."""
    views = [buffer.data for buffer in buffers if len(buffer)]
    for first in range(0, len(views), VIEWS):
        yield views[first : first + VIEWS]
