"""A checkpoint written out of images in memory, by those who keep them; the ranks that made them train on.

Every keeper says what boxes its images of a step hold; `assign` gives each box to one of the images that hold
it; the keepers write their shares, one file an image; `index_of` makes the index of what they wrote. What is
read is verified before it is written, and no more than a few MiB of it are in memory or unwritten at a time.
No torch here.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from isal import isal_zlib

from ...faulttol.header import CHUNK_BYTES
from ...faulttol.image import Image, PartIndex
from .format import Chunk, Index, TensorEntry

UNWRITTEN_BYTES = 64 << 20  # that the system may hold back before the writer waits for the disk

Wrote: TypeAlias = list[tuple[int, int]]  # of each box in order: where its bytes lie in the file, their crc32


class Unusable(RuntimeError):
    """Images that do not make one whole state; the message says why."""


class GivenUp(RuntimeError):
    """Whoever asked for the checkpoint wants it no more."""


@dataclass(frozen=True)
class Holding:
    """What a rank's image of a step holds."""

    path: str
    fingerprint: str
    progress: Mapping[str, Any]
    parts: tuple[PartIndex, ...]


@dataclass(frozen=True)
class Share:
    """What is written from one image into one file."""

    path: str
    step: int
    parts: tuple[PartIndex, ...]
    file: str


def look_at(path: Path, step: int) -> Holding:
    """What the image there holds. Raises Unusable where it is of another step, and what `Image.open` does."""
    image = _open(str(path), step)
    return Holding(str(path), image.fingerprint, image.progress, tuple(image.parts()))


def assign(holdings: Mapping[int, Holding]) -> dict[int, tuple[PartIndex, ...]]:
    """The boxes that are written from each rank's image, by rank: every box once, from the one among those
    that hold it which has the fewest bytes by then.

    Raises Unusable unless the images are of one state and their boxes fill every tensor.
    """
    if len({holding.fingerprint for holding in holdings.values()}) != 1:
        raise Unusable("the images are not of one layout")
    held: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[tuple[int, PartIndex]]] = defaultdict(list)
    for rank, holding in sorted(holdings.items()):
        for part in holding.parts:
            if part.length or 0 in part.shape:
                held[part.name, part.offsets, part.sizes].append((rank, part))
    load: Counter[int] = Counter()
    given: dict[int, list[PartIndex]] = {rank: [] for rank in holdings}
    filled: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for (name, _, sizes), holders in held.items():
        rank, part = min(holders, key=lambda holder: (load[holder[0]], holder[0]))
        given[rank].append(part)
        load[rank] += part.length
        filled[name] += math.prod(sizes)
        shapes[name] = part.shape
    for name, shape in shapes.items():
        if filled[name] != math.prod(shape):
            raise Unusable(f"the images hold {filled[name]} of the {math.prod(shape)} numbers of {name}")
    return {rank: tuple(sorted(parts, key=lambda part: part.start)) for rank, parts in given.items()}


def write_share(share: Share, folder: Path, given_up: Callable[[], bool]) -> Wrote:
    """Write the boxes of `share` into its file in `folder`, one behind the other, and make them durable.

    Raises DamagedImage where an image is not what it was, OSError, Unusable, and GivenUp.
    """
    image = _open(share.path, share.step)
    piece = np.empty(CHUNK_BYTES, dtype=np.uint8)
    wrote: Wrote = []
    at = unwritten = 0
    with open(folder / share.file, "wb", buffering=0) as file:
        for part in share.parts:
            crc, position, end = 0, part.start, part.start + part.length
            while position < end:
                if given_up():
                    raise GivenUp(f"{share.file}: its checkpoint was given up")
                stop = min(end, (position // CHUNK_BYTES + 1) * CHUNK_BYTES)  # each is verified once
                data = piece[: stop - position]
                image.read_into(position, data)
                crc = isal_zlib.crc32(data.data, crc)
                _write_all(file.fileno(), data)
                position = stop
                unwritten += len(data)
                if unwritten >= UNWRITTEN_BYTES:
                    os.fsync(file.fileno())
                    unwritten = 0
            wrote.append((at, crc))
            at += part.length
        os.fsync(file.fileno())
    return wrote


def index_of(progress: Mapping[str, Any], shares: Sequence[Share], wrote: Sequence[Wrote]) -> Index:
    """The index of a checkpoint of which every share is written."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for share, places in zip(shares, wrote, strict=True):
        for part, (start, crc) in zip(share.parts, places, strict=True):
            kinds[part.name] = part.dtype, part.shape
            chunks[part.name].append(Chunk(part.offsets, part.sizes, share.file, start, part.length, crc))
    entries = {name: TensorEntry(*kinds[name], tuple(found)) for name, found in chunks.items()}
    return Index(dict(progress), entries)


def _open(path: str, step: int) -> Image:
    image = Image.open(path)
    if image.step != step:
        raise Unusable(f"{path} is at step {image.step} by now, not {step}")
    return image


def _write_all(fd: int, data: np.ndarray) -> None:
    left = data.data
    while left:
        left = left[os.write(fd, left) :]
