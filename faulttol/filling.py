"""Fills memory from an image, every byte verified: a whole state is back as fast as its node can copy it.

A chunk is read straight to where its bytes belong and its crc taken over them there: each byte is copied once
and looked at once. Chunks are shared out over a few threads; neither reading nor the crc holds the
interpreter's lock. For single parts `Image.tensor` is enough.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from .header import CHUNK_BYTES
from .image import Image

# The ranks beside one that is restored wait for it, so cores are free; with more the memory is the limit.
THREADS = 4

Tile: TypeAlias = tuple[int, np.ndarray]  # where it begins in the data, and [n] uint8 to fill


def fill(image: Image, pieces: Sequence[Tile]) -> None:
    """Fill each of `pieces` with the data from its start on. Their content is undefined when this raises.

    Raises as `Image.read_into` does.
    """
    chunks, again = _cut(pieces)
    for start, out in pieces:
        image.check_range(start, len(out))
    if image.has_sums and chunks:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1, len(chunks)), "fill") as pool:
            for _ in pool.map(lambda chunk: _fill_chunk(image, chunk, chunks[chunk]), sorted(chunks)):
                pass  # the first problem is raised, and what has not begun is given up
    else:
        again = [piece for piece in pieces if len(piece[1])]
    for start, out in again:
        image.read_into(start, out)


def _cut(pieces: Sequence[Tile]) -> tuple[Mapping[int, list[Tile]], list[Tile]]:
    """The tiles of each chunk in order, and those pieces that overlap with one before them."""
    chunks: dict[int, list[Tile]] = defaultdict(list)
    overlapping, filled = [], 0
    for start, out in sorted((piece for piece in pieces if len(piece[1])), key=lambda piece: piece[0]):
        if start < filled:
            overlapping.append((start, out))
            continue
        filled = start + len(out)
        for chunk in range(start // CHUNK_BYTES, (filled - 1) // CHUNK_BYTES + 1):
            begin = max(start, chunk * CHUNK_BYTES)
            end = min(filled, (chunk + 1) * CHUNK_BYTES)
            chunks[chunk].append((begin, out[begin - start : end - start]))
    return chunks, overlapping


def _fill_chunk(image: Image, chunk: int, tiles: Sequence[Tile]) -> None:
    """Read one chunk into its tiles; what lies between them is verified too and dropped."""
    position, end = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, image.nbytes)
    buffers = []
    for begin, out in tiles:
        buffers += [np.empty(begin - position, dtype=np.uint8), out]
        position = begin + len(out)
    image.read_chunk(chunk, [*buffers, np.empty(end - position, dtype=np.uint8)])
